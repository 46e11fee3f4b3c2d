"""The operator that joins router and experts of one token.

op  `one_token_experts`, its arguments and their checks, its launches and its CPU kernel
"""
