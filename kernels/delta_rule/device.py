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
def inverse(a, SIZE: tl.constexpr, PTX: tl.constexpr):
    """(I + a)^-1 for a strictly lower triangular matrix, fp32 [SIZE, SIZE]; SIZE is 16 times a power of two.

    Blocks of 16 on the diagonal by elimination, one row of all of them at a time. Then neighboring blocks become one of
    twice the size: the lower left part of [[A, 0], [C, B]]^-1 is -B^-1 C A^-1. Powers of `a`, as in the series
    I - a + a^2 - ..., would grow beyond fp32's precision for keys that are alike.
    """
    BLOCKS: tl.constexpr = SIZE // 16
    block = tl.arange(0, BLOCKS)
    same = block[:, None, None, None] == block[None, None, :, None]
    small = tl.sum(tl.where(same, a.reshape(BLOCKS, 16, BLOCKS, 16), 0.0), axis=2)
    row, column = tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    x = tl.where((row == column) & (block >= 0)[:, None, None], 1.0, 0.0)
    for i in tl.static_range(15):
        pivot = tl.sum(tl.where(row == i, x, 0.0), axis=1)  # row i, complete
        factor = tl.sum(tl.where(column == i, small, 0.0), axis=2)  # zero for the rows up to i
        x -= factor[:, :, None] * pivot[:, None, :]
    x = tl.where(same, x[:, :, None, :], 0.0).reshape(SIZE, SIZE)
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    none = tl.zeros((SIZE, SIZE), dtype=tl.float32)
    if SIZE >= 32:
        lower = tl.where((i // 32 == j // 32) & (i // 16 != j // 16), a, 0.0)
        x -= dot(dot(x, lower, none, PTX), x, none, PTX)
    if SIZE >= 64:
        lower = tl.where((i // 64 == j // 64) & (i // 32 != j // 32), a, 0.0)
        x -= dot(dot(x, lower, none, PTX), x, none, PTX)
    return x
