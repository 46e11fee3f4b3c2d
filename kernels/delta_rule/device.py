"""Device functions of the kernels for the delta rule.

PTX: see `executorch_moe.kernels._device`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from executorch_moe.kernels._device import to_bf16


@triton.jit
def rounded(x, like_ptr, PTX: tl.constexpr):
    """fp32 -> the number format that a pointer points to."""
    if like_ptr.dtype.element_ty == tl.bfloat16:
        return to_bf16(x, PTX)
    else:
        return x.to(like_ptr.dtype.element_ty)


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def log_decay(a, dt_bias, a_log):
    """-exp(a_log) * softplus(a + dt_bias), at least -128: exp of less is 0 in fp32, and sums of it stay exact enough."""
    x = a + dt_bias
    softplus = tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))
    return tl.maximum(-tl.exp(a_log) * softplus, -128.0)
