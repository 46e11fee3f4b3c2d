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
    """-exp(a_log) * softplus(a + dt_bias), at least -128, whose exp is 0 in fp32: differences of sums stay exact."""
    x = a + dt_bias
    softplus = tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))
    return tl.maximum(-tl.exp(a_log) * softplus, -128.0)


@triton.jit
def dot(a, b, acc, PTX: tl.constexpr):
    """acc + a @ b with an fp32 accumulator. fp32 operands take three products of tf32 each."""
    if not PTX:  # the interpreter multiplies raw bf16 bits; fp32 holds the same values
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    elif a.dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision="tf32x3")
    else:
        return tl.dot(a, b, acc)


@triton.jit
def eliminated(a):
    """(I + a)^-1 for strictly lower triangular blocks, fp32 [BLOCKS, 16, 16], one row of all blocks at a time."""
    row, column = tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    x = tl.where((row == column) & (tl.arange(0, a.shape[0])[:, None, None] >= 0), 1.0, 0.0)
    for i in range(15):  # not unrolled: the compiler would compute all factors ahead and run out of registers
        pivot = tl.sum(tl.where(row == i, x, 0.0), axis=1)  # row i, complete
        factor = tl.sum(tl.where(column == i, a, 0.0), axis=2)  # zero for the rows up to i
        x -= factor[:, :, None] * pivot[:, None, :]
    return x


@triton.jit
def merged(x, corner, PTX: tl.constexpr):
    """Inverses of neighboring blocks -> inverses of blocks of twice their size: [2N, 16, 16] -> [N, 32, 32].

    The lower left part of [[A, 0], [C, B]]^-1 is -B^-1 C A^-1. corner: C of each pair, [N, 16, 16].
    """
    N: tl.constexpr = corner.shape[0]
    half = tl.arange(0, 2)
    pairs = x.reshape(N, 2, 16, 16)
    is_first = half[None, :, None, None] == 0
    first = tl.sum(tl.where(is_first, pairs, 0.0), axis=1)
    second = tl.sum(tl.where(is_first, 0.0, pairs), axis=1)
    none = tl.zeros((N, 16, 16), dtype=tl.float32)
    corner = dot(dot(second, corner, none, PTX), first, none, PTX)
    row, column = half[None, :, None, None, None], half[None, None, None, :, None]
    whole = tl.where(row == column, pairs[:, :, :, None, :], 0.0)
    return tl.where(row > column, -corner[:, None, :, None, :], whole).reshape(N, 32, 32)
