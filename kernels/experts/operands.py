"""Packed weights as operands: loaded and decoded into the registers of an MMA, or multiplied as integers (dp2a).

The packed layout (packing/fragments.py) has the order of an MMA's registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from executorch_moe.kernels._device import (
    bf16_rows_of_pairs,
    decode_bf16,
    decode_codes,
    decode_int8,
    dot_two,
    rows_of_pairs,
)

from .microscaled import decode_e2m1, factors_of_exponents


@triton.jit
def load_weight_block(w_ptr, kb, offs_n, N: tl.constexpr, W_BITS: tl.constexpr, INT8: tl.constexpr, KP: tl.constexpr):
    """Raw weights of K block `kb` for rows `offs_n` of one expert: int16 [BN, 32], int8 [BN, 64] or bf16 [BN, 128]."""
    if W_BITS == 16:
        return tl.load(w_ptr + offs_n[:, None] * KP + kb * 128 + tl.arange(0, 128)[None, :])
    elif INT8:
        bytes_ptr = w_ptr.to(tl.pointer_type(tl.int8), bitcast=True)
        return tl.load(bytes_ptr + (kb * N + offs_n[:, None]) * 64 + tl.arange(0, 64)[None, :])
    else:
        half_ptr = w_ptr.to(tl.pointer_type(tl.int16), bitcast=True)
        return tl.load(half_ptr + (kb * N + offs_n[:, None]) * 32 + tl.arange(0, 32)[None, :])


@triton.jit
def fetch_weights(
    w_ptr, expert, n_block, split, N: tl.constexpr, KP: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT_K: tl.constexpr
):  # fmt: skip
    """Prefetch a tile's packed weights, up to the first eight K blocks, into L2: loads without a use."""
    KB: tl.constexpr = (KP // 128 + SPLIT_K - 1) // SPLIT_K
    words_ptr = w_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + expert * (N * KP // 8)
    offs = n_block * BLOCK_N * 16 + tl.arange(0, BLOCK_N * 16)
    for step in tl.static_range(min(KB, 8)):
        kb = split * KB + step
        tl.load(words_ptr + kb * N * 16 + offs, mask=(offs >= 0) & (kb < KP // 128), volatile=True)


@triton.jit
def broadcast_groups(s0, s1, s2, s3, INT8_ORDER: tl.constexpr, BLOCK_N: tl.constexpr):
    """Words of `load_groups` -> bf16 [BN, 32] for nibbles 0..3 of the halfword in the same place."""
    s0 = tl.broadcast_to(bf16_rows_of_pairs(s0, BLOCK_N)[:, None], (BLOCK_N, 32))
    s1 = tl.broadcast_to(bf16_rows_of_pairs(s1, BLOCK_N)[:, None], (BLOCK_N, 32))
    s2 = tl.broadcast_to(bf16_rows_of_pairs(s2, BLOCK_N)[:, None], (BLOCK_N, 32))
    s3 = tl.broadcast_to(bf16_rows_of_pairs(s3, BLOCK_N)[:, None], (BLOCK_N, 32))
    if INT8_ORDER:  # nibbles alternate between the halves of the K block; columns from 16 on are the odd quarters
        even_quarter = (tl.arange(0, 32) < 16)[None, :]
        low = tl.where(even_quarter, s0, s1)
        high = tl.where(even_quarter, s2, s3)
        return low, high, low, high
    else:
        return s0, s1, s2, s3


@triton.jit
def natural_halfwords(raw, BLOCK_N: tl.constexpr):
    """int16 [BN, 32] as packed (t, c, h, l) -> in the order of an operand's columns (c, h, t, l)."""
    return raw.reshape(BLOCK_N, 4, 2, 2, 2).permute(0, 2, 3, 1, 4).reshape(BLOCK_N, 32)


@triton.jit
def join_quarters(w0, w1, w2, w3, BLOCK_N: tl.constexpr):
    """Four [BN, 32] side by side: [BN, 128]."""
    quarters = tl.join(tl.join(w0, w1), tl.join(w2, w3))  # [BN, 32, s % 2, s // 2]
    return quarters.permute(0, 3, 2, 1).reshape(BLOCK_N, 128)


@triton.jit
def weight_operand(
    raw, s0, s1, s2, s3, z0, z1, z2, z3,
    HAS_ZERO: tl.constexpr, INT8_ORDER: tl.constexpr, BLOCK_N: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Decode int16 [BN, 32] into the bf16 operand [BN, 128]. Register moves only, no shuffles.

    s0..s3, z0..z3: words of `load_groups`, scales and zeros. Columns are in natural order, or in that of `k_order`.
    """
    s0, s1, s2, s3 = broadcast_groups(s0, s1, s2, s3, INT8_ORDER, BLOCK_N)
    if HAS_ZERO:
        z0, z1, z2, z3 = broadcast_groups(z0, z1, z2, z3, INT8_ORDER, BLOCK_N)
    else:
        z0, z1, z2, z3 = s0, s1, s2, s3
    half = natural_halfwords(raw, BLOCK_N)
    w0, w1, w2, w3 = decode_bf16(half, s0, s1, s2, s3, z0, z1, z2, z3, HAS_ZERO, PTX)
    return join_quarters(w0, w1, w2, w3, BLOCK_N)


@triton.jit
def mx_operand(raw, first, second, BLOCK_N: tl.constexpr, PAIRS: tl.constexpr, PTX: tl.constexpr):
    """`weight_operand` for MXFP4: weights / 2^32, exact. Register moves only.

    first, second: words of `load_exponents`.
    """
    f0, f1, f2, f3 = factors_of_exponents(first, second, BLOCK_N, PAIRS)
    f0 = tl.broadcast_to(f0[:, None], (BLOCK_N, 32))
    f1 = tl.broadcast_to(f1[:, None], (BLOCK_N, 32))
    f2 = tl.broadcast_to(f2[:, None], (BLOCK_N, 32))
    f3 = tl.broadcast_to(f3[:, None], (BLOCK_N, 32))
    w0, w1, w2, w3 = decode_e2m1(natural_halfwords(raw, BLOCK_N), f0, f1, f2, f3, PTX)
    return join_quarters(w0, w1, w2, w3, BLOCK_N)


@triton.jit
def code_operand(raw, BLOCK_N: tl.constexpr, PTX: tl.constexpr):
    """`weight_operand` without scales: the codes -8..7 as bf16. Exact."""
    w0, w1, w2, w3 = decode_codes(natural_halfwords(raw, BLOCK_N), PTX)
    return join_quarters(w0, w1, w2, w3, BLOCK_N)


@triton.jit
def k_order(INT8_ORDER: tl.constexpr, COLUMNS: tl.constexpr):
    """Position in the K block of the first COLUMNS columns of `weight_operand`: int32 [COLUMNS]."""
    i = tl.arange(0, COLUMNS)
    if INT8_ORDER:
        # Column (n, c, h, t, l) of bf16 fragments holds k = (n % 2, c, h, t, n // 2, l) of int8 fragments.
        k = ((i >> 5) & 1) * 64 + ((i >> 3) & 3) * 16 + ((i >> 1) & 3) * 4 + (i >> 6) * 2 + (i & 1)
        return tl.max_contiguous(tl.multiple_of(k, 2), 2)
    else:
        return i


@triton.jit
def broadcast_multipliers(m0, m1, BLOCK_N: tl.constexpr):
    """Words of `load_groups` for two quarters of a K block -> int32 [BN, 64], their multipliers."""
    m0 = rows_of_pairs(m0, BLOCK_N).to(tl.int32)[:, None]
    m1 = rows_of_pairs(m1, BLOCK_N).to(tl.int32)[:, None]
    return tl.where((tl.arange(0, 64) < 32)[None, :], m0, m1)


@triton.jit
def int8_operands(raw, m0, m1, m2, m3, BLOCK_N: tl.constexpr, PTX: tl.constexpr):
    """Decode int8 [BN, 64] into int8 operands [BN, 64] of both halves of the K block, codes times their multipliers.

    Register moves only. m0..m3: words of `load_groups`.
    """
    natural = raw.reshape(BLOCK_N, 4, 2, 2, 4).permute(0, 2, 3, 1, 4).reshape(BLOCK_N, 64)
    m_low, m_high = broadcast_multipliers(m0, m1, BLOCK_N), broadcast_multipliers(m2, m3, BLOCK_N)
    return decode_int8(natural, m_low, m_high, PTX)


@triton.jit
def dot_codes(w, p0, p1, p2, p3, acc, PTX: tl.constexpr):
    """acc + 16 * (the eight codes of a packed word times eight activations), int32.

    A code in the upper half of a byte, with zeros below, is the signed number 16 * code.

    Args:
        p0..p3: words of two int16: activations of nibbles 0 and 2, 4 and 6, 1 and 3, 5 and 7.
    """
    if PTX:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 even, odd, sum;
            shl.b32 even, $1, 4;
            and.b32 even, even, 0xF0F0F0F0;
            and.b32 odd, $1, 0xF0F0F0F0;
            dp2a.lo.s32.s32 sum, $2, even, $6;
            dp2a.hi.s32.s32 sum, $3, even, sum;
            dp2a.lo.s32.s32 sum, $4, odd, sum;
            dp2a.hi.s32.s32 $0, $5, odd, sum;
            }
            """,
            "=r,r,r,r,r,r,r",
            [w, p0, p1, p2, p3, acc],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        even = (w << 4) & -252645136  # 0xF0F0F0F0
        odd = w & -252645136
        acc += dot_two(p0, even, 0, 1) + dot_two(p1, even, 2, 3)
        return acc + dot_two(p2, odd, 0, 1) + dot_two(p3, odd, 2, 3)


@triton.jit
def dot_codes_apart(w, p0, p1, p2, p3, a0, a1, a2, a3, PTX: tl.constexpr):
    """`dot_codes` with one sum for each nibble n of a halfword, and p_n: activations of nibbles n and n + 4."""
    if PTX:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 even, odd;
            shl.b32 even, $4, 4;
            and.b32 even, even, 0xF0F0F0F0;
            and.b32 odd, $4, 0xF0F0F0F0;
            prmt.b32 even, even, even, 0x3120;
            prmt.b32 odd, odd, odd, 0x3120;
            dp2a.lo.s32.s32 $0, $5, even, $9;
            dp2a.lo.s32.s32 $1, $6, odd, $10;
            dp2a.hi.s32.s32 $2, $7, even, $11;
            dp2a.hi.s32.s32 $3, $8, odd, $12;
            }
            """,
            "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",
            [w, p0, p1, p2, p3, a0, a1, a2, a3],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        even = (w << 4) & -252645136
        odd = w & -252645136
        a0 += dot_two(p0, even, 0, 2)
        a1 += dot_two(p1, odd, 0, 2)
        a2 += dot_two(p2, even, 1, 3)
        a3 += dot_two(p3, odd, 1, 3)
        return a0, a1, a2, a3
