"""Operators for one token of each of several texts: all of a decoder layer but the experts and the norms.

op         `rows_linear`, `rows_attention`, `rows_router`
arguments  their arguments and the checks of them
launches   from arguments to kernel launches
kernels    the Triton kernels
aten       the same operators in ATen, for the CPU
"""
