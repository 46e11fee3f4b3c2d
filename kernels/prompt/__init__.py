"""Operators for several tokens: norm and rotation of the heads, attention over the cache, and the choice of experts.

op         `rotated_heads`, `cached_attention`, `top_experts`
arguments  their arguments and the checks of them
launches   from arguments to kernel launches
kernels    the Triton kernels
aten       the same operators in ATen, for the CPU
"""
