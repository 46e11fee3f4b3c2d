"""Operators for decoding one token: everything in a decoder layer except the experts.

op         `one_token_attention`, `one_token_router`, `one_token_linear`
arguments  their arguments and the checks of them
launches   from arguments to kernel launches
kernels, attention_kernels, shared_kernels, device  the Triton kernels
aten       the same operators in ATen, for the CPU
"""
