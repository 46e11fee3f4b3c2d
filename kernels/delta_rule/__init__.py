"""The gated delta rule: linear attention with a recurrent state, as in Qwen3-Next and Qwen3.5-MoE.

op               `gated_delta_net`: everything in such a layer between its input and output projections
arguments        its arguments and their checks
launches         from arguments to kernel launches
decode_kernels   the Triton kernels for one token
prefill_kernels  the Triton kernels for several tokens
aten             the operator in ATen, for the CPU
reference        the operator in plain fp32, token by token, which tests compare with
"""
