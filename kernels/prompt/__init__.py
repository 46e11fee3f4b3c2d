"""Operators of attention for several tokens: norm and rotation of the heads, and attention over the cache.

op         `rotated_heads`, `cached_attention`
arguments  their arguments and the checks of them
launches   from arguments to kernel launches
kernels    the Triton kernels
aten       the same operators in ATen, for the CPU
"""
