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
def diagonal_blocks(a, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """[SIZE, SIZE] -> the blocks on its diagonal, [SIZE / BLOCK, BLOCK, BLOCK]."""
    BLOCKS: tl.constexpr = SIZE // BLOCK
    block = tl.arange(0, BLOCKS)
    same = block[:, None, None, None] == block[None, None, :, None]
    return tl.sum(tl.where(same, a.reshape(BLOCKS, BLOCK, BLOCKS, BLOCK), 0.0), axis=2)


@triton.jit
def merge(x, a, BLOCK: tl.constexpr, PTX: tl.constexpr):
    """Inverses of neighboring blocks -> inverses of blocks of twice their size: [2N, B, B] -> [N, 2B, 2B].

    The lower left part of [[A, 0], [C, B]]^-1 is -B^-1 C A^-1.
    a: the blocks of twice the size, [N, 2B, 2B], without their diagonal of ones.
    """
    N: tl.constexpr = a.shape[0]
    half = tl.arange(0, 2)
    pairs = x.reshape(N, 2, BLOCK, BLOCK)
    is_first = half[None, :, None, None] == 0
    first = tl.sum(tl.where(is_first, pairs, 0.0), axis=1)
    second = tl.sum(tl.where(is_first, 0.0, pairs), axis=1)
    row, column = half[None, :, None, None, None], half[None, None, None, :, None]
    corner = tl.sum(tl.where(row > column, a.reshape(N, 2, BLOCK, 2, BLOCK), 0.0), axis=3)
    corner = tl.sum(corner, axis=1)
    if N == 1:
        none = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
        a_part, b_part = first.reshape(BLOCK, BLOCK), second.reshape(BLOCK, BLOCK)
        corner = dot(dot(b_part, corner.reshape(BLOCK, BLOCK), none, PTX), a_part, none, PTX).reshape(N, BLOCK, BLOCK)
    else:
        none = tl.zeros((N, BLOCK, BLOCK), dtype=tl.float32)
        corner = dot(dot(second, corner, none, PTX), first, none, PTX)
    merged = tl.where(row == column, pairs[:, :, :, None, :], 0.0)
    merged = tl.where(row > column, -corner[:, None, :, None, :], merged)
    return merged.reshape(N, 2 * BLOCK, 2 * BLOCK)


@triton.jit
def inverse(a, PTX: tl.constexpr):
    """(I + a)^-1 for a strictly lower triangular matrix, fp32 [64, 64].

    Blocks of 16 on the diagonal by elimination, one row of all of them at a time; then neighboring blocks are merged.
    Powers of `a`, as in the series I - a + a^2 - ..., would lose all precision for keys that are alike.
    """
    small = diagonal_blocks(a, 64, 16)
    row, column = tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    x = tl.where((row == column) & (tl.arange(0, 4)[:, None, None] >= 0), 1.0, 0.0)
    for i in range(15):
        pivot = tl.sum(tl.where(row == i, x, 0.0), axis=1)  # row i, complete
        factor = tl.sum(tl.where(column == i, small, 0.0), axis=2)  # zero for the rows up to i
        x -= factor[:, :, None] * pivot[:, None, :]
    x = merge(x, diagonal_blocks(a, 64, 32), 16, PTX)
    x = merge(x, a.reshape(1, 64, 64), 32, PTX)
    return x.reshape(64, 64)
