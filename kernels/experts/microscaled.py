"""MXFP4 weights in kernels: decoding for tensor cores, and products with integers for the matrix-vector path.

packing/fragments.py describes the layout of codes and scales.
"""

from __future__ import annotations

import triton
import triton.language as tl

from executorch_moe.kernels._device import dot_two, to_bf16


@triton.jit
def e2m1(code):
    """e2m1 codes, int32 in [0, 15] -> fp32. For Triton's interpreter."""
    i = (code & 7).to(tl.float32)
    magnitude = tl.maximum(tl.maximum(i * 0.5, i - 2.0), i * 2.0 - 8.0)
    return magnitude * tl.where(code > 7, -1.0, 1.0)  # Triton's minus would make 0 of code 8, -0


@triton.jit
def decode_e2m1(half, f0, f1, f2, f3, PTX: tl.constexpr):
    """Halfwords of four e2m1 codes -> four bf16 tensors value * factor / 2^126, quarters 0..3. Exact.

    With its sign at bit 15 and the other bits at 8..6, a code is a bf16 number, its value / 2^126, subnormal or not. So
    one multiplication decodes and scales two codes. The masks take two signs at a time, at bits 15 and 7 of a
    halfword: magnitudes replace the sign at bit 7, which is that of another code. Nibbles 3 and 1 share a mask, so they
    are the first two quarters of a K block: then products of these do not have to keep masks for the others.

    Args:
        half: int16 [BLOCK_N, 32].
        f0..f3: bf16, shaped like `half`: factors of quarters 0..3, powers of two from 2^-6 on.
    """
    if not PTX:
        word = half.to(tl.int32)
        unit = 1.1754943508222875e-38  # 2^-126; times the factor first: 6 * 2^127 would overflow
        v0 = e2m1((word >> 12) & 15) * (f0.to(tl.float32) * unit)
        v1 = e2m1((word >> 4) & 15) * (f1.to(tl.float32) * unit)
        v2 = e2m1((word >> 8) & 15) * (f2.to(tl.float32) * unit)
        v3 = e2m1(word & 15) * (f3.to(tl.float32) * unit)
        return to_bf16(v0, PTX), to_bf16(v1, PTX), to_bf16(v2, PTX), to_bf16(v3, PTX)
    else:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 s, t, neg0;
            mov.b32 neg0, 0x80008000;
            and.b32 s, $4, 0x80808080;
            shr.u32 t, $4, 6;
            lop3.b32 t, s, t, 0x01C001C0, 0xd8;
            fma.rn.bf16x2 $0, t, $5, neg0;
            shl.b32 s, s, 8;
            shl.b32 t, $4, 2;
            lop3.b32 t, s, t, 0x01C001C0, 0xd8;
            fma.rn.bf16x2 $1, t, $6, neg0;
            shl.b32 s, $4, 4;
            and.b32 s, s, 0x80808080;
            shr.u32 t, $4, 2;
            lop3.b32 t, s, t, 0x01C001C0, 0xd8;
            fma.rn.bf16x2 $2, t, $7, neg0;
            shl.b32 s, s, 8;
            shl.b32 t, $4, 6;
            lop3.b32 t, s, t, 0x01C001C0, 0xd8;
            fma.rn.bf16x2 $3, t, $8, neg0;
            }
            """,
            "=&r,=&r,=&r,=&r,r,r,r,r,r",
            [half, f0, f1, f2, f3],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )


@triton.jit
def load_exponents(ptr, kb, n_block, N: tl.constexpr, BLOCK_N: tl.constexpr, PAIRS: tl.constexpr):
    """MXFP4 scales of K block `kb` for the rows of a tile: int32, a word for the four groups of a row.

    PAIRS: two [BLOCK_N // 2], in the first the rows 16b + j, in the second those 8 below; otherwise both are [BLOCK_N].
    With few tokens and small tiles, pairs take fewer registers, else whole rows.
    ptr: uint8 [K/128, N, 4] of one expert.
    """
    words = ptr.to(tl.pointer_type(tl.int32), bitcast=True) + kb * N + n_block * BLOCK_N
    if PAIRS:
        pair = tl.arange(0, BLOCK_N // 2)
        words += pair // 8 * 16 + pair % 8
        return tl.load(words), tl.load(words + 8)
    else:
        rows = tl.load(words + tl.arange(0, BLOCK_N))
        return rows, rows


@triton.jit
def rotated(word):
    """int32, rotated left by 8: brings the exponents of groups 2 and 3 to where those of groups 0 and 1 are."""
    return (word << 8) | ((word >> 24) & 255)


@triton.jit
def factors_of_exponents(first, second, BLOCK_N: tl.constexpr, PAIRS: tl.constexpr):
    """Words of `load_exponents` -> bf16 [BLOCK_N] for each of the four groups."""
    if PAIRS:
        words = tl.join(first, second).reshape(BLOCK_N // 16, 8, 2).permute(0, 2, 1).reshape(BLOCK_N)
    else:
        words = first
    low = words & 0x7F807F80
    high = rotated(words) & 0x7F807F80
    f0 = low.to(tl.int16).to(tl.bfloat16, bitcast=True)
    f1 = (low >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    f2 = high.to(tl.int16).to(tl.bfloat16, bitcast=True)
    f3 = (high >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return f0, f1, f2, f3


@triton.jit
def scales_of_exponents(words):
    """Words of a row's four groups, int32 -> four fp32, shaped like `words`. Exact."""
    low = words & 0x7F807F80
    high = rotated(words) & 0x7F807F80
    offset: tl.constexpr = 94 << 23  # packing/mxfp4.py
    e0 = ((low << 16) - offset).to(tl.float32, bitcast=True)
    e1 = ((low & -65536) - offset).to(tl.float32, bitcast=True)
    e2 = ((high << 16) - offset).to(tl.float32, bitcast=True)
    e3 = ((high & -65536) - offset).to(tl.float32, bitcast=True)
    return e0, e1, e2, e3


@triton.jit
def dot_e2m1(w, p0, p1, p2, p3, a0, a1, a2, a3, PTX: tl.constexpr):
    """Adds the products of a packed word's e2m1 codes: activations times 2 * value - 112, int32, for each quarter.

    Two tables of eight bytes hold the 16 numbers. A lookup (prmt) whose fourth bit is set gives the sign of a byte
    eight times, and so all ones in the first table, whose numbers are negative, and zeros in the second. With the
    signs flipped for the second lookup, the xor of both is 2 * value - 112. The caller adds 112 times the sums of
    activations.

    Args:
        w: int32, packed word. p0..p3: words of two int16, the activations of quarters 0..3.
    """
    if PTX:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 f, g, low, high, t;
            xor.b32 f, $4, 0x88888888;
            prmt.b32 low, 0x93929190, 0x9C989694, $4;
            prmt.b32 t, 0x7271706F, 0x7B777573, f;
            xor.b32 low, low, t;
            shr.u32 g, $4, 16;
            shr.u32 f, f, 16;
            prmt.b32 high, 0x93929190, 0x9C989694, g;
            prmt.b32 t, 0x7271706F, 0x7B777573, f;
            xor.b32 high, high, t;
            prmt.b32 t, low, high, 0x5173;
            dp2a.lo.s32.s32 $0, $5, t, $9;
            dp2a.hi.s32.s32 $1, $6, t, $10;
            prmt.b32 t, low, high, 0x4062;
            dp2a.lo.s32.s32 $2, $7, t, $11;
            dp2a.hi.s32.s32 $3, $8, t, $12;
            }
            """,
            "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",
            [w, p0, p1, p2, p3, a0, a1, a2, a3],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        low = halfword_bytes(w)
        high = halfword_bytes(w >> 16)
        a0 += dot_two(p0, (low >> 24) & 255 | ((high >> 16) & 0xFF00), 0, 1)
        a1 += dot_two(p1, (low >> 8) & 255 | (high & 0xFF00), 0, 1)
        a2 += dot_two(p2, (low >> 16) & 255 | ((high >> 8) & 0xFF00), 0, 1)
        a3 += dot_two(p3, low & 255 | ((high & 255) << 8), 0, 1)
        return a0, a1, a2, a3


@triton.jit
def halfword_bytes(half):
    """Four e2m1 codes in the low half of an int32 -> four bytes 2 * value - 112. For Triton's interpreter."""
    b0 = (2.0 * e2m1(half & 15)).to(tl.int32) + 144
    b1 = (2.0 * e2m1((half >> 4) & 15)).to(tl.int32) + 144
    b2 = (2.0 * e2m1((half >> 8) & 15)).to(tl.int32) + 144
    b3 = (2.0 * e2m1((half >> 12) & 15)).to(tl.int32) + 144
    return b0 | (b1 << 8) | (b2 << 16) | (b3 << 24)


@triton.jit
def sum_left_out(p, q, r, t):
    """112 times the sum of the int16 in these words, int32: what `dot_e2m1` leaves out."""
    total = ((p << 16) >> 16) + (p >> 16) + ((q << 16) >> 16) + (q >> 16)
    return 112 * (total + ((r << 16) >> 16) + (r >> 16) + ((t << 16) >> 16) + (t >> 16))


@triton.jit
def sum_e2m1(
    w0, w1, w2, w3, p0, p1, p2, p3, q0, q1, q2, q3, r0, r1, r2, r3, t0, t1, t2, t3, words, PTX: tl.constexpr
):  # fmt: skip
    """Products of four packed words and their activations, times 2: fp32, the four quarters scaled and added.

    Args:
        w0..w3: int32. p, q, r, t: words of two int16, the activations of w0..w3 for each quarter.
        words: the exponents of the quarters, see `scales_of_exponents`.
    """
    none = tl.zeros_like(w0)
    a0, a1 = none + sum_left_out(p0, q0, r0, t0), none + sum_left_out(p1, q1, r1, t1)
    a2, a3 = none + sum_left_out(p2, q2, r2, t2), none + sum_left_out(p3, q3, r3, t3)
    a0, a1, a2, a3 = dot_e2m1(w0, p0, p1, p2, p3, a0, a1, a2, a3, PTX)
    a0, a1, a2, a3 = dot_e2m1(w1, q0, q1, q2, q3, a0, a1, a2, a3, PTX)
    a0, a1, a2, a3 = dot_e2m1(w2, r0, r1, r2, r3, a0, a1, a2, a3, PTX)
    a0, a1, a2, a3 = dot_e2m1(w3, t0, t1, t2, t3, a0, a1, a2, a3, PTX)
    e0, e1, e2, e3 = scales_of_exponents(words)
    sums = a0.to(tl.float32) * e0 + a1.to(tl.float32) * e1
    return sums + a2.to(tl.float32) * e2 + a3.to(tl.float32) * e3
