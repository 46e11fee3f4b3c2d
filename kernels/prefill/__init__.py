"""Operators for several tokens: all of a decoder layer but the experts.

op         `residual_norm`, `rotated_heads`, `cached_attention`, `top_experts`, `prompt_linear`
arguments  their arguments and the checks of them
launches   from arguments to kernel launches
kernels    the Triton kernels
linear, linear_kernels   launches and kernels of `prompt_linear`
aten       the same operators in ATen, for the CPU
"""
