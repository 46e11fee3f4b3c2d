"""One output tile of the tensor-core mainloop, for all schemes and both GEMMs, few tokens and many.

Weights are the M side of the MMA: a tile is BLOCK_N weight rows by BLOCK_M tokens. So the tokens of an expert, often
few, are on the side of the instruction with flexible size, and weights are decoded in registers and multiplied from
there, not from shared memory.

Letters: P pairs (token, expert), M tokens of one tile, N weight rows, K reduction, Kp: K padded to a multiple of 128.
"""

from __future__ import annotations

import triton
import triton.language as tl

from executorch_moe.kernels._device import (
    decode_codes,
    gated_activation,
    load_groups,
    load_pairs,
    rows_of_pairs,
    to_bf16,
)

from .microscaled import load_exponents
from .operands import (
    code_operand,
    int8_operands,
    k_order,
    load_weight_block,
    mx_operand,
    natural_halfwords,
    weight_operand,
)


@triton.jit
def dot_f32(w, x, acc, PTX: tl.constexpr):
    """acc + w [BN, K] @ x [BM, K].T, bf16 operands, fp32 accumulator."""
    if PTX:
        return tl.dot(w, x.trans(), acc)
    else:  # the interpreter multiplies raw bf16 bits; fp32 holds the same values
        return tl.dot(w.to(tl.float32), x.to(tl.float32).trans(), acc, input_precision="ieee")


@triton.jit
def done_with_registers(acc, PTX: tl.constexpr):
    """Returns the sums of a product, fp32, and waits until the registers of its first operand may be written.

    Without this, Triton lets wgmmas of a K block (3.6: up to seven) run into the next iteration, which decodes weights
    into the registers that they still read: on an H200, one tile in about 500,000 was wrong. Inline assembly that uses
    the sums makes the compiler wait for them.
    """
    if PTX:
        return tl.inline_asm_elementwise("", "=f,0", [acc], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return acc


@triton.jit
def dot_quarters(raw, x_ptr, inside, zero, INT8_ORDER: tl.constexpr, BLOCK_N: tl.constexpr, PTX: tl.constexpr):
    """`code_operand` times x [BM, 128].T, as two independent chains of two products.

    With few tokens, the chain of MMAs on one accumulator takes most of the time of a K block.

    x_ptr: [BM, 32], addresses of the first quarter, in `k_order`. zero: fp32 [BN, BM].
    """
    # Offsets of the other quarters' columns from those of the first, by `k_order`.
    ODD: tl.constexpr = 64 if INT8_ORDER else 32
    LATER: tl.constexpr = 2 if INT8_ORDER else 64
    w0, w1, w2, w3 = decode_codes(natural_halfwords(raw, BLOCK_N), PTX)
    low = dot_f32(w0, tl.load(x_ptr, mask=inside, other=0), zero, PTX)
    low += dot_f32(w1, tl.load(x_ptr + ODD, mask=inside, other=0), zero, PTX)
    high = dot_f32(w2, tl.load(x_ptr + LATER, mask=inside, other=0), zero, PTX)
    high += dot_f32(w3, tl.load(x_ptr + (ODD + LATER), mask=inside, other=0), zero, PTX)
    return low + high


@triton.jit
def rescale_sums(acc, scale_ptr):
    """Converts int32 sums [BN, BM] from units of one activation group's scale to units of the next one's.

    scale_ptr: [BM], addresses of the next group's scale of each row.
    """
    ratio = tl.load(scale_ptr - 1) / tl.load(scale_ptr)
    return (acc.to(tl.float32) * ratio[None, :]).to(tl.int32)


@triton.jit
def gemm_tile(
    x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, w_zero_ptr, bias_ptr, out_ptr, pair_weight_ptr,
    expert, pair, x_row, out_row, mask_m, n_block, split,
    N: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, OUT_COLS: tl.constexpr, STRIDE_X: tl.constexpr,
    WIDE_X: tl.constexpr,
    GROUP: tl.constexpr, W_BITS: tl.constexpr, INT8_ORDER: tl.constexpr, ACT_GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, GEMM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT_K: tl.constexpr, NUM_STAGES: tl.constexpr,
    UNROLL: tl.constexpr, SCALE_AFTER: tl.constexpr, FEW: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """One output tile: BLOCK_N weight rows of one expert by up to BLOCK_M of its tokens.

    expert: int64. pair, x_row, out_row: int32 [BM], each row's pair, row in x and row in out; 0 where mask_m is False.
    Those rows are loaded as zeros, without memory traffic, and never stored.
    split: which of the SPLIT_K parts of K. FEW: few tokens, where latency within each program decides the time.
    """
    INT8: tl.constexpr = ACT_GROUP > 0
    MX: tl.constexpr = W_BITS == 4 and w_scale_ptr.dtype.element_ty == tl.uint8  # MXFP4 has scales of one byte
    SEGMENTS: tl.constexpr = (KP + ACT_GROUP - 1) // ACT_GROUP if INT8 else 1
    KB: tl.constexpr = (KP // 128 + SPLIT_K - 1) // SPLIT_K  # K blocks of a part
    offs_n = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows are 32-bit offsets to a shared base if those suffice: 64-bit offsets take twice the registers.
    x_offs = x_row.to(tl.int64 if WIDE_X else tl.uint32) * STRIDE_X
    if INT8:
        x_scale_rows = x_scale_ptr + x_row.to(tl.int64) * SEGMENTS
    w_ptr += expert * ((N * KP) if W_BITS == 16 else (N * KP // 2))
    # For int8 fragments, the rows' scales follow the multipliers of the groups.
    s_ptr = w_scale_ptr + expert * ((KP // GROUP + INT8_ORDER) * N)  # MX: bytes, as many as groups
    z_ptr = w_zero_ptr + expert * (KP // GROUP * N)
    # Padded columns need a mask for each K block, but the four quarters share one mask.
    QUARTERS: tl.constexpr = FEW and SCALE_AFTER and W_BITS == 4 and not INT8 and K == KP
    if QUARTERS:
        offs_k = k_order(INT8_ORDER, 32)
    elif INT8:
        offs_k = tl.arange(0, 64)
    else:
        offs_k = k_order(INT8_ORDER, 128)

    EARLY: tl.constexpr = GEMM == 2 and FEW
    if EARLY:  # loaded before the loop, so that the epilogue does not wait for it
        pair_weight = tl.load(pair_weight_ptr + pair, mask=mask_m, other=0.0).to(tl.float32)

    first = split * KB
    last = KP // 128 if SPLIT_K == 1 else tl.minimum(first + KB, KP // 128)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32 if INT8 else tl.float32)
    for segment in tl.static_range(SEGMENTS):
        start = first if SEGMENTS == 1 else segment * (ACT_GROUP // 128)
        end = last if segment == SEGMENTS - 1 else (segment + 1) * (ACT_GROUP // 128)
        if segment > 0:
            acc = rescale_sums(acc, x_scale_rows + segment)
        # Scales are loaded one iteration ahead, because they are too narrow for asynchronous copies.
        if W_BITS == 4:
            begin = start if SPLIT_K == 1 else tl.minimum(start, KP // 128 - 1)  # the last part may be empty
            if MX:
                s0, s1 = load_exponents(s_ptr, begin, n_block, N, BLOCK_N, FEW)
                s2, s3 = s0, s1
            else:
                s0, s1, s2, s3 = load_groups(s_ptr, begin, n_block, N, GROUP, BLOCK_N)
            if HAS_ZERO:
                z0, z1, z2, z3 = load_groups(z_ptr, begin, n_block, N, GROUP, BLOCK_N)
            else:
                z0, z1, z2, z3 = s0, s1, s2, s3
        for kb in tl.range(start, end, num_stages=NUM_STAGES, loop_unroll_factor=UNROLL):
            raw = load_weight_block(w_ptr, kb, offs_n, N, W_BITS, INT8, KP)
            ahead = tl.minimum(kb + 1, KP // 128 - 1)
            if K == KP or INT8:  # rows of int8 are padded
                inside = mask_m[:, None]
            else:  # padded weights are zero, but memory after the row may hold NaN
                inside = mask_m[:, None] & (kb * 128 + offs_k < K)[None, :]
            x_block = x_ptr + kb * 128 + (x_offs[:, None] + offs_k[None, :])
            if QUARTERS:
                codes_x = dot_quarters(raw, x_block, inside, tl.zeros_like(acc), INT8_ORDER, BLOCK_N, PTX)
                acc += codes_x * rows_of_pairs(s0, BLOCK_N)[:, None]
            else:
                x = tl.load(x_block, mask=inside, other=0)
            if W_BITS == 16:
                acc = dot_f32(raw, x, acc, PTX)
            elif INT8:
                # Half a block at a time: operands take fewer registers, so more programs are resident.
                x_high = tl.load(x_block + 64, mask=inside, other=0)
                low, high = int8_operands(raw, s0, s1, s2, s3, BLOCK_N, PTX)
                acc = tl.dot(low, x.trans(), acc, out_dtype=tl.int32)
                acc = tl.dot(high, x_high.trans(), acc, out_dtype=tl.int32)
            elif SCALE_AFTER and not QUARTERS:
                codes = code_operand(raw, BLOCK_N, PTX)
                acc += dot_f32(codes, x, tl.zeros_like(acc), PTX) * rows_of_pairs(s0, BLOCK_N)[:, None]
            elif MX:
                operand = mx_operand(raw, s0, s1, BLOCK_N, FEW, PTX)
                acc = done_with_registers(dot_f32(operand, x, acc, PTX), PTX)
            elif not QUARTERS:
                operand = weight_operand(raw, s0, s1, s2, s3, z0, z1, z2, z3, HAS_ZERO, INT8_ORDER, BLOCK_N, PTX)
                acc = done_with_registers(dot_f32(operand, x, acc, PTX), PTX)
            if MX:
                s0, s1 = load_exponents(s_ptr, ahead, n_block, N, BLOCK_N, FEW)
            elif W_BITS == 4:
                s0, s1, s2, s3 = load_groups(s_ptr, ahead, n_block, N, GROUP, BLOCK_N)
                if HAS_ZERO:
                    z0, z1, z2, z3 = load_groups(z_ptr, ahead, n_block, N, GROUP, BLOCK_N)
                else:
                    z0, z1, z2, z3 = s0, s1, s2, s3
    if MX:
        acc *= 4294967296.0  # 2^32
    if INT8:
        acc = acc.to(tl.float32) * tl.load(x_scale_rows + SEGMENTS - 1)[None, :]
    if INT8_ORDER:
        rows = load_pairs(s_ptr, KP // GROUP, n_block, N, BLOCK_N)
        acc *= rows_of_pairs(rows, BLOCK_N)[:, None]

    if HAS_BIAS:
        bias = tl.load(bias_ptr + expert * N + offs_n)
        acc += (bias if SPLIT_K == 1 else tl.where(split == 0, bias, 0.0))[:, None]
    if GEMM == 1:
        # Gate and up rows alternate in runs of 8: one thread has rows r and r + 8 of an accumulator.
        gate, up = tl.split(acc.reshape(BLOCK_N // 16, 2, 8, BLOCK_M).permute(0, 2, 3, 1))
        value = gated_activation(gate, up, ACTIVATION).reshape(BLOCK_N // 2, BLOCK_M)
        offs_o = n_block * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    else:
        if not EARLY:
            pair_weight = tl.load(pair_weight_ptr + pair, mask=mask_m, other=0.0).to(tl.float32)
        value = acc * pair_weight[None, :]
        offs_o = offs_n
    pointers = out_ptr + out_row.to(tl.int64)[None, :] * OUT_COLS + offs_o[:, None]
    wanted = mask_m[None, :]
    if OUT_COLS % 128 != 0:
        wanted = wanted & (offs_o < OUT_COLS)[:, None]
    if out_ptr.dtype.element_ty == tl.float32:
        tl.store(pointers, value, mask=wanted)
    else:
        tl.store(pointers, to_bf16(value, PTX), mask=wanted)
