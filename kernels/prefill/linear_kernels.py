"""The kernels of linear layers for several tokens.

Letters: T tokens, N out, K in.
"""

from __future__ import annotations

import triton
import triton.language as tl

from executorch_moe.kernels._device import dot_bf16, grouped_tile, launches_before, to_bf16


@triton.jit
def int8_to_bf16(x, PTX: tl.constexpr):
    """int8 -> bf16, exact.

    The bits of bf16 128 + n are 0x4300 | n for n in [0, 128), and 0x4300 | 0x80 is 256. So for a byte b,
    0x4300 | (b & 0x7F) is 128 + (b & 0x7F), and 0x4300 | (b & 0x80) is 128, or 256 if b is negative: their difference
    is b. This takes two instructions a value; the conversion through fp32 takes more, at a quarter of their rate.
    """
    if PTX:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 two, low, high, minus;
            mov.b32 minus, 0xBF80BF80;
            prmt.b32 two, $2, 0, 0x4140;
            lop3.b32 low, two, 0x007F007F, 0x43004300, 0xea;
            lop3.b32 high, two, 0x00800080, 0x43004300, 0xea;
            fma.rn.bf16x2 $0, high, minus, low;
            prmt.b32 two, $2, 0, 0x4342;
            lop3.b32 low, two, 0x007F007F, 0x43004300, 0xea;
            lop3.b32 high, two, 0x00800080, 0x43004300, 0xea;
            fma.rn.bf16x2 $1, high, minus, low;
            }
            """,
            "=&r,=&r,r",
            [x],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=4,
        )
    else:
        return x.to(tl.float32).to(tl.bfloat16)


@triton.jit
def moe_weights_to_bf16(
    w_ptr,  # int8 [SIZE]
    out_ptr,  # bf16 [SIZE]
    SIZE: tl.constexpr, BLOCK: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """A matrix as bf16; a program does BLOCK elements. It reads the weights while it waits."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < SIZE
    w = tl.load(w_ptr + offs, mask=inside, other=0)
    zero = launches_before(False, PTX)
    tl.store(out_ptr + zero + offs, int8_to_bf16(w, PTX), mask=inside)


@triton.jit
def moe_prompt_linear(
    x_ptr,  # bf16 [T, K]
    w_ptr,  # bf16 [N, K]
    scale_ptr,  # fp32 [N], HAS_SCALE only
    out_ptr,  # bf16 [T, N]
    T,
    N: tl.constexpr, K: tl.constexpr, HAS_SCALE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """x @ W.T * scale; a program does a tile of BLOCK_T tokens and BLOCK_N columns."""
    row_block, n_block = grouped_tile(tl.program_id(0), tl.cdiv(T, BLOCK_T), (N + BLOCK_N - 1) // BLOCK_N, GROUP)
    offs_t = row_block * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_n, offs_k = n_block * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    rows, columns = (offs_t < T)[:, None], (offs_n < N)[:, None]
    zero = launches_before(False, PTX)
    x_ptr += zero
    w_ptr += zero
    out_ptr += zero
    # 64 bits: a matrix may have more elements than 32 bits can address.
    x_rows = x_ptr + offs_t.to(tl.int64)[:, None] * K + offs_k[None, :]
    w_rows = w_ptr + offs_n.to(tl.int64)[:, None] * K + offs_k[None, :]
    acc = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        if K % BLOCK_K == 0:
            x = tl.load(x_rows + start, mask=rows, other=0.0)
            w = tl.load(w_rows + start, mask=columns, other=0.0)
        else:
            inside = (start + offs_k < K)[None, :]
            x = tl.load(x_rows + start, mask=rows & inside, other=0.0)
            w = tl.load(w_rows + start, mask=columns & inside, other=0.0)
        acc = dot_bf16(x, w.trans(), acc, PTX)
    if HAS_SCALE:
        acc *= tl.load(scale_ptr + offs_n, mask=offs_n < N, other=0.0)[None, :]
    cells = offs_t.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(out_ptr + cells, to_bf16(acc, PTX), mask=rows & (offs_n < N)[None, :])
