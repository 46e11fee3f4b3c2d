"""Packed weights in shared memory -> bf16 operands in registers, a piece of a K block at a time."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .layouts import scale_layout


@gluon.jit
def natural_halfwords(raw, ROWS: gl.constexpr):
    """int16 [ROWS, 32] as packed (t, c, h, l) -> in the order of an operand's columns (c, h, t, l)."""
    return raw.reshape(ROWS, 4, 2, 2, 2).permute(0, 2, 3, 1, 4).reshape(ROWS, 32)


@gluon.jit
def scales_of_rows(words_smem, half, ROWS: gl.constexpr, WARPS: gl.constexpr):
    """int32 [ROWS // 2] in shared memory, words of rows r and r + 8 -> bf16 [ROWS, 1]; rows as in `half`."""
    LAYOUT: gl.constexpr = gl.SliceLayout(1, half.type.layout)
    words = words_smem.load(scale_layout(ROWS, WARPS))
    low = words.to(gl.int16).to(gl.bfloat16, bitcast=True)
    high = (words >> 16).to(gl.int16).to(gl.bfloat16, bitcast=True)
    rows = gl.join(low, high).reshape(ROWS // 16, 8, 2).permute(0, 2, 1).reshape(ROWS)
    return gl.expand_dims(gl.convert_layout(rows, LAYOUT, assert_trivial=True), 1)


@gluon.jit
def decode_quarter(half, scale, QUARTER: gl.constexpr):
    """Nibble QUARTER of each halfword times its row's scale: bf16 [ROWS, 32]. The same bits as `decode_bf16`.

    half: int16 [ROWS, 32]. scale: bf16 [ROWS, 1].
    """
    SHIFT: gl.constexpr = 4 * QUARTER
    return gl.inline_asm_elementwise(
        f"""
        {{
        .reg .b32 t, one, m136, neg0;
        mov.b32 one, 0x3F803F80;
        mov.b32 m136, 0xC308C308;
        mov.b32 neg0, 0x80008000;
        shr.u32 t, $1, {SHIFT};
        lop3.b32 $0, t, 0x000F000F, 0x43084308, 0x6a;
        fma.rn.bf16x2 $0, $0, one, m136;
        fma.rn.bf16x2 $0, $0, $2, neg0;
        }}
        """,
        "=&r,r,r",
        [half, scale],
        dtype=gl.bfloat16,
        is_pure=True,
        pack=2,
    )


@gluon.jit
def operand_piece(
    half, s0, s1, s2, s3, PIECE: gl.constexpr, PIECES: gl.constexpr, ROWS: gl.constexpr, LAYOUT: gl.constexpr
):
    """Piece PIECE of PIECES (2 or 4) of a K block, the first operand of a wgmma: bf16 [ROWS, 128 / PIECES].

    s0..s3: bf16 [ROWS, 1], scales of the quarters.
    """
    if PIECES == 4:
        scale = s0 if PIECE == 0 else s1 if PIECE == 1 else s2 if PIECE == 2 else s3
        return gl.convert_layout(decode_quarter(half, scale, PIECE), LAYOUT, assert_trivial=True)
    else:
        w0 = decode_quarter(half, s0 if PIECE == 0 else s2, 2 * PIECE)
        w1 = decode_quarter(half, s1 if PIECE == 0 else s3, 2 * PIECE + 1)
        return gl.convert_layout(gl.join(w0, w1).permute(0, 2, 1).reshape(ROWS, 64), LAYOUT, assert_trivial=True)
