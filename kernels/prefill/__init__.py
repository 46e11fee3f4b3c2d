"""Operators for several tokens: all of a decoder layer but the experts and the linear layers.

op         `residual_norm`, `rotated_heads`, `cached_attention`, `top_experts`
arguments  their arguments and the checks of them
launches   from arguments to kernel launches
kernels    the Triton kernels
aten       the same operators in ATen, for the CPU
"""
