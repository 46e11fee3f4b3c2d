"""The gated delta rule: linear attention with a recurrent state, as in Qwen3-Next and Qwen3.5-MoE.

op               `gated_delta_net`: everything in such a layer between its input and output projections, and
                 `rows_delta_rule`, the same for one token of each of several texts
arguments        their arguments and checks
launches         from arguments to kernel launches
decode_kernels   the Triton kernels for one token of a text
prefill_kernels  the Triton kernels for several tokens
aten             the operators in ATen, for the CPU
reference        the operator in plain fp32, token by token, which tests compare with
"""
