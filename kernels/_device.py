"""Device functions that several kernels share: tile order, waiting for launches, bf16, weight decoding, activation.

Inductor copies them into its output under their global names, so kernels must import each by name: neither through the
module nor with `as`.

PTX is a constexpr: the compute capability for inline PTX, 90 for sm_90, or 0 under Triton's interpreter, which supports
neither inline PTX nor bf16 dots. Both forms give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def grouped_tile(tile, num_row_blocks, num_n_blocks, GROUP_SIZE_M: tl.constexpr):
    """Tile index -> (row block, n block): groups of GROUP_SIZE_M row blocks, column-major within a group."""
    group_tiles = GROUP_SIZE_M * num_n_blocks
    first = (tile // group_tiles) * GROUP_SIZE_M
    rows = tl.minimum(num_row_blocks - first, GROUP_SIZE_M)
    within = tile % group_tiles
    return first + within % rows, within // rows


@triton.jit
def launches_before(NEXT_MAY_START: tl.constexpr, PTX: tl.constexpr):
    """Wait for the previous launches.

    From sm_90 on, a launch may start while the previous one still runs (programmatic dependent launch); before sm_90
    there is nothing to wait for. Code before this call must not write. It may read weights, and data that was written
    before the previous launch ended its own wait.

    NEXT_MAY_START lets the next launch start when all programs of this one have reached this call. It pays off for few
    programs: those of the next launch are placed where there is room now, not where there will be.

    Returns 0, a multiple of 16. Add it to all addresses that are read or written after the wait: only this dependency
    keeps the compiler from moving the accesses. With a call that has side effects instead, torch would take every
    tensor for written.
    """
    if PTX >= 90:
        if NEXT_MAY_START:
            zero = tl.inline_asm_elementwise(
                "griddepcontrol.wait; griddepcontrol.launch_dependents; mov.b32 $0, 0;",
                "=r",
                [],
                dtype=tl.int32,
                is_pure=True,
                pack=1,
            )
        else:
            zero = tl.inline_asm_elementwise(
                "griddepcontrol.wait; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=True, pack=1
            )
        return zero * 16
    else:
        return 0


@triton.jit
def to_bf16(x, PTX: tl.constexpr):
    """fp32 -> bf16, round to nearest even. The conversion of Triton's interpreter truncates."""
    if PTX:
        return x.to(tl.bfloat16)
    else:
        bits = x.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return nearest.to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def bf16_round(x, PTX: tl.constexpr):
    """fp32 -> the nearest bf16, as fp32."""
    return to_bf16(x, PTX).to(tl.float32)


@triton.jit
def dot_bf16(a, b, acc, PTX: tl.constexpr):
    """acc + a @ b of bf16 operands, fp32 accumulator."""
    if PTX:
        return tl.dot(a, b, acc)
    else:  # the interpreter multiplies raw bf16 bits; fp32 holds the same values
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")


@triton.jit
def decode_bf16(half, s0, s1, s2, s3, z0, z1, z2, z3, HAS_ZERO: tl.constexpr, PTX: tl.constexpr):
    """Halfwords of four signed nibbles -> four bf16 tensors nibble * scale (+ zero), lowest nibble first.

    The bits of bf16 128 + n are 0x4300 | n for n in [0, 128). A two's complement nibble with its top bit flipped is
    q + 8, so 0x4308 ^ nibble is bf16 136 + q: one lop3 decodes two values, and subtracting 136 is exact. The only
    rounding is that of q * scale (+ zero) to bf16.

    Args:
        half: int16 [BLOCK_N, 32].
        s0..s3, z0..z3: bf16, shaped like `half`: scales and zeros of nibbles 0..3. Zeros are used with HAS_ZERO only.
    """
    if not PTX:
        q0 = (((half & 15) ^ 8) - 8).to(tl.float32)
        q1 = ((((half >> 4) & 15) ^ 8) - 8).to(tl.float32)
        q2 = ((((half >> 8) & 15) ^ 8) - 8).to(tl.float32)
        q3 = ((((half >> 12) & 15) ^ 8) - 8).to(tl.float32)
        v0 = q0 * s0.to(tl.float32)
        v1 = q1 * s1.to(tl.float32)
        v2 = q2 * s2.to(tl.float32)
        v3 = q3 * s3.to(tl.float32)
        if HAS_ZERO:
            v0 += z0.to(tl.float32)
            v1 += z1.to(tl.float32)
            v2 += z2.to(tl.float32)
            v3 += z3.to(tl.float32)
        return to_bf16(v0, PTX), to_bf16(v1, PTX), to_bf16(v2, PTX), to_bf16(v3, PTX)
    elif HAS_ZERO:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 t, one, m136;
            mov.b32 one, 0x3F803F80;
            mov.b32 m136, 0xC308C308;
            lop3.b32 $0, $4, 0x000F000F, 0x43084308, 0x6a;
            shr.u32 t, $4, 4;
            lop3.b32 $1, t, 0x000F000F, 0x43084308, 0x6a;
            shr.u32 t, $4, 8;
            lop3.b32 $2, t, 0x000F000F, 0x43084308, 0x6a;
            shr.u32 t, $4, 12;
            lop3.b32 $3, t, 0x000F000F, 0x43084308, 0x6a;
            fma.rn.bf16x2 $0, $0, one, m136;
            fma.rn.bf16x2 $1, $1, one, m136;
            fma.rn.bf16x2 $2, $2, one, m136;
            fma.rn.bf16x2 $3, $3, one, m136;
            fma.rn.bf16x2 $0, $0, $5, $9;
            fma.rn.bf16x2 $1, $1, $6, $10;
            fma.rn.bf16x2 $2, $2, $7, $11;
            fma.rn.bf16x2 $3, $3, $8, $12;
            }
            """,
            "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",
            [half, s0, s1, s2, s3, z0, z1, z2, z3],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    else:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 t, one, m136, neg0;
            mov.b32 one, 0x3F803F80;
            mov.b32 m136, 0xC308C308;
            mov.b32 neg0, 0x80008000;
            lop3.b32 $0, $4, 0x000F000F, 0x43084308, 0x6a;
            shr.u32 t, $4, 4;
            lop3.b32 $1, t, 0x000F000F, 0x43084308, 0x6a;
            shr.u32 t, $4, 8;
            lop3.b32 $2, t, 0x000F000F, 0x43084308, 0x6a;
            shr.u32 t, $4, 12;
            lop3.b32 $3, t, 0x000F000F, 0x43084308, 0x6a;
            fma.rn.bf16x2 $0, $0, one, m136;
            fma.rn.bf16x2 $1, $1, one, m136;
            fma.rn.bf16x2 $2, $2, one, m136;
            fma.rn.bf16x2 $3, $3, one, m136;
            fma.rn.bf16x2 $0, $0, $5, neg0;
            fma.rn.bf16x2 $1, $1, $6, neg0;
            fma.rn.bf16x2 $2, $2, $7, neg0;
            fma.rn.bf16x2 $3, $3, $8, neg0;
            }
            """,
            "=&r,=&r,=&r,=&r,r,r,r,r,r",
            [half, s0, s1, s2, s3],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )


@triton.jit
def decode_codes(half, PTX: tl.constexpr):
    """Halfwords of four signed nibbles -> four bf16 tensors of the codes, lowest nibble first. Exact.

    Args:
        half: int16 [BLOCK_N, 32].
    """
    if not PTX:
        q0 = (((half & 15) ^ 8) - 8).to(tl.float32)
        q1 = ((((half >> 4) & 15) ^ 8) - 8).to(tl.float32)
        q2 = ((((half >> 8) & 15) ^ 8) - 8).to(tl.float32)
        q3 = ((((half >> 12) & 15) ^ 8) - 8).to(tl.float32)
        return q0.to(tl.bfloat16), q1.to(tl.bfloat16), q2.to(tl.bfloat16), q3.to(tl.bfloat16)
    else:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 t, one, m136;
            mov.b32 one, 0x3F803F80;
            mov.b32 m136, 0xC308C308;
            lop3.b32 $0, $4, 0x000F000F, 0x43084308, 0x6a;
            shr.u32 t, $4, 4;
            lop3.b32 $1, t, 0x000F000F, 0x43084308, 0x6a;
            shr.u32 t, $4, 8;
            lop3.b32 $2, t, 0x000F000F, 0x43084308, 0x6a;
            shr.u32 t, $4, 12;
            lop3.b32 $3, t, 0x000F000F, 0x43084308, 0x6a;
            fma.rn.bf16x2 $0, $0, one, m136;
            fma.rn.bf16x2 $1, $1, one, m136;
            fma.rn.bf16x2 $2, $2, one, m136;
            fma.rn.bf16x2 $3, $3, one, m136;
            }
            """,
            "=&r,=&r,=&r,=&r,r",
            [half],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )


@triton.jit
def decode_int8(byte, m_low, m_high, PTX: tl.constexpr):
    """Bytes of two signed nibbles -> two int8 tensors nibble * multiplier, low nibble first. Exact.

    All four bytes of a word are multiplied at once: nibble ^ 8 is q + 8, and (q + 8) * m + 128 - 8m = q * m + 128 fits
    a byte for m up to 16. Flipping its top bit subtracts the 128.

    Args:
        byte: int8 [BLOCK_N, 64].
        m_low, m_high: int32 in [0, 16], shaped like `byte` and constant over every four columns.
    """
    if not PTX:
        low = (((byte & 15) ^ 8) - 8).to(tl.int32) * m_low
        high = ((((byte >> 4) & 15) ^ 8) - 8).to(tl.int32) * m_high
        return low.to(tl.int8), high.to(tl.int8)
    else:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 t, c, d;
            lop3.b32 $0, $2, 0x0F0F0F0F, 0x08080808, 0x6a;
            shr.u32 t, $2, 4;
            lop3.b32 $1, t, 0x0F0F0F0F, 0x08080808, 0x6a;
            mad.lo.s32 c, $3, -0x08080808, 0x80808080;
            mad.lo.s32 d, $7, -0x08080808, 0x80808080;
            mad.lo.s32 $0, $0, $3, c;
            mad.lo.s32 $1, $1, $7, d;
            xor.b32 $0, $0, 0x80808080;
            xor.b32 $1, $1, 0x80808080;
            }
            """,
            "=&r,=&r,r,r,r,r,r,r,r,r,r",
            [byte, m_low, m_high],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )


@triton.jit
def load_pairs(ptr, group, n_block, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """Scales (or zeros) of one group for the rows of a tile, two in each word: int32 [BLOCK_N // 2].

    Word 8b + j holds rows 16b + j (low half) and 16b + j + 8, which one thread has in its accumulator. Values that are
    loaded as words, not halfwords, can also stay in their registers until the next iteration uses them.
    ptr: bf16 [K/GROUP, N] of one expert.
    """
    words = ptr.to(tl.pointer_type(tl.int32), bitcast=True) + group * (N // 2) + n_block * (BLOCK_N // 2)
    return tl.load(words + tl.arange(0, BLOCK_N // 2))


@triton.jit
def load_groups(ptr, kb, n_block, N: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr):
    """`load_pairs` for each quarter (32 values) of K block `kb`."""
    if GROUP >= 128:
        q0 = load_pairs(ptr, kb * 128 // GROUP, n_block, N, BLOCK_N)
        return q0, q0, q0, q0
    elif GROUP == 64:
        q0 = load_pairs(ptr, kb * 2, n_block, N, BLOCK_N)
        q2 = load_pairs(ptr, kb * 2 + 1, n_block, N, BLOCK_N)
        return q0, q0, q2, q2
    else:
        tl.static_assert(GROUP == 32)
        q0 = load_pairs(ptr, kb * 4, n_block, N, BLOCK_N)
        q1 = load_pairs(ptr, kb * 4 + 1, n_block, N, BLOCK_N)
        q2 = load_pairs(ptr, kb * 4 + 2, n_block, N, BLOCK_N)
        q3 = load_pairs(ptr, kb * 4 + 3, n_block, N, BLOCK_N)
        return q0, q1, q2, q3


@triton.jit
def rows_of_pairs(words, BLOCK_N: tl.constexpr):
    """int32 [BLOCK_N // 2] of `load_pairs` -> fp32 [BLOCK_N] in row order. A bf16 is the upper half of an fp32."""
    low = (words << 16).to(tl.float32, bitcast=True)
    high = (words & -65536).to(tl.float32, bitcast=True)
    return tl.join(low, high).reshape(BLOCK_N // 16, 8, 2).permute(0, 2, 1).reshape(BLOCK_N)


@triton.jit
def bf16_rows_of_pairs(words, BLOCK_N: tl.constexpr):
    """`rows_of_pairs` as bf16."""
    low = words.to(tl.int16).to(tl.bfloat16, bitcast=True)
    high = (words >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return tl.join(low, high).reshape(BLOCK_N // 16, 8, 2).permute(0, 2, 1).reshape(BLOCK_N)


@triton.jit
def gated_activation(gate, up, ACTIVATION: tl.constexpr):
    """fp32 act(gate, up). ACTIVATION is a value of `schemes.ACTIVATIONS`: 0 is silu, 1 is swiglu_oai."""
    if ACTIVATION == 0:
        return gate / (1.0 + tl.exp(-gate)) * up
    else:
        tl.static_assert(ACTIVATION == 1)
        limited = tl.minimum(gate, 7.0)
        return limited / (1.0 + tl.exp(-1.702 * limited)) * (tl.minimum(tl.maximum(up, -7.0), 7.0) + 1.0)


@triton.jit
def dot_two(pair, codes, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """The two int16 of `pair` times bytes FIRST and SECOND of `codes`, int32. For Triton's interpreter."""
    low = ((pair << 16) >> 16) * ((codes << (24 - 8 * FIRST)) >> 24)
    return low + (pair >> 16) * ((codes << (24 - 8 * SECOND)) >> 24)


@triton.jit
def larger(a, b):
    """The larger number, NaN if one is NaN: integers could not carry it."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
