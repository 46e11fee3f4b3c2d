"""The tensor-core mainloop: one persistent grouped GEMM for GEMM1 and GEMM2, every scheme and both schedules.

Weights are the M side of the MMA: a tile is BLOCK_N weight rows by BLOCK_M tokens, so the few tokens that an expert has
sit on the flexible side of the instruction, and decoded weights go from registers into it without a trip through
shared memory. The packed layout (packing.py) is in the order of those registers.

Letters: P pairs (token, expert), M tokens of one tile, N weight rows, K reduction, Kp K padded to 128.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._device import decode_bf16, decode_codes, decode_int8, gated_activation, grouped_tile, load_groups, to_bf16


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
def weight_operand(
    raw, s0, s1, s2, s3, z0, z1, z2, z3, HAS_ZERO: tl.constexpr, BLOCK_N: tl.constexpr, PTX: tl.constexpr
):
    """Decode int16 [BN, 32] into the bf16 operand [BN, 128] in natural K order. Register moves only, no shuffles."""
    half = raw.reshape(BLOCK_N, 4, 2, 2, 2).permute(0, 2, 3, 1, 4).reshape(BLOCK_N, 32)
    s0 = tl.broadcast_to(s0[:, None], (BLOCK_N, 32))
    s1 = tl.broadcast_to(s1[:, None], (BLOCK_N, 32))
    s2 = tl.broadcast_to(s2[:, None], (BLOCK_N, 32))
    s3 = tl.broadcast_to(s3[:, None], (BLOCK_N, 32))
    if HAS_ZERO:
        z0 = tl.broadcast_to(z0[:, None], (BLOCK_N, 32))
        z1 = tl.broadcast_to(z1[:, None], (BLOCK_N, 32))
        z2 = tl.broadcast_to(z2[:, None], (BLOCK_N, 32))
        z3 = tl.broadcast_to(z3[:, None], (BLOCK_N, 32))
    w0, w1, w2, w3 = decode_bf16(half, s0, s1, s2, s3, z0, z1, z2, z3, HAS_ZERO, PTX)
    quarters = tl.join(tl.join(w0, w1), tl.join(w2, w3))  # [BN, 32, s % 2, s // 2]
    return quarters.permute(0, 3, 2, 1).reshape(BLOCK_N, 128)


@triton.jit
def code_operand(raw, BLOCK_N: tl.constexpr, PTX: tl.constexpr):
    """`weight_operand` without scales: the codes -8..7 as bf16, exact."""
    half = raw.reshape(BLOCK_N, 4, 2, 2, 2).permute(0, 2, 3, 1, 4).reshape(BLOCK_N, 32)
    w0, w1, w2, w3 = decode_codes(half, PTX)
    quarters = tl.join(tl.join(w0, w1), tl.join(w2, w3))  # [BN, 32, s % 2, s // 2]
    return quarters.permute(0, 3, 2, 1).reshape(BLOCK_N, 128)


@triton.jit
def dot_f32(w, x, acc, PTX: tl.constexpr):
    """acc + w [BN, K] @ x [BM, K].T, bf16 operands, fp32 accumulator."""
    if PTX:
        return tl.dot(w, x.trans(), acc)
    else:  # the interpreter multiplies raw bf16 bits; fp32 holds the same values
        return tl.dot(w.to(tl.float32), x.to(tl.float32).trans(), acc, input_precision="ieee")


@triton.jit
def dot_int8(acc, w, x, w_scale, x_scale):
    """acc + (w int8 [BN, K] @ x int8 [BM, K].T) * w_scale [BN] * x_scale [BM]."""
    exact = tl.dot(w, x.trans(), out_dtype=tl.int32).to(tl.float32)
    return acc + exact * x_scale[None, :] * w_scale.to(tl.float32)[:, None]


@triton.jit
def accumulate_int8(
    acc, raw, s0, s1, s2, s3, x_rows, x_scale_rows, kb, mask_m,
    BLOCK_N: tl.constexpr, SUB: tl.constexpr, ACT_GROUP: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """One K block in int8: a dot and a scaling for every SUB values, SUB the finer of weight and activation group."""
    natural = raw.reshape(BLOCK_N, 4, 2, 2, 4).permute(0, 2, 3, 1, 4).reshape(BLOCK_N, 64)
    lo, hi = decode_int8(natural, PTX)
    offs = tl.arange(0, SUB)
    rows = mask_m[:, None]
    x0 = tl.load(x_rows[:, None] + kb * 128 + offs[None, :], mask=rows, other=0)
    a0 = tl.load(x_scale_rows + kb * 128 // ACT_GROUP)
    if SUB == 128:
        w = tl.join(lo, hi).permute(0, 2, 1).reshape(BLOCK_N, 128)
        acc = dot_int8(acc, w, x0, s0, a0)
    elif SUB == 64:
        x1 = tl.load(x_rows[:, None] + kb * 128 + 64 + offs[None, :], mask=rows, other=0)
        a1 = tl.load(x_scale_rows + (kb * 128 + 64) // ACT_GROUP)
        acc = dot_int8(acc, lo, x0, s0, a0)
        acc = dot_int8(acc, hi, x1, s2, a1)
    else:
        tl.static_assert(SUB == 32)
        x1 = tl.load(x_rows[:, None] + kb * 128 + 32 + offs[None, :], mask=rows, other=0)
        x2 = tl.load(x_rows[:, None] + kb * 128 + 64 + offs[None, :], mask=rows, other=0)
        x3 = tl.load(x_rows[:, None] + kb * 128 + 96 + offs[None, :], mask=rows, other=0)
        a1 = tl.load(x_scale_rows + (kb * 128 + 32) // ACT_GROUP)
        a2 = tl.load(x_scale_rows + (kb * 128 + 64) // ACT_GROUP)
        a3 = tl.load(x_scale_rows + (kb * 128 + 96) // ACT_GROUP)
        w0, w1 = tl.split(lo.reshape(BLOCK_N, 2, 32).permute(0, 2, 1))
        w2, w3 = tl.split(hi.reshape(BLOCK_N, 2, 32).permute(0, 2, 1))
        acc = dot_int8(acc, w0, x0, s0, a0)
        acc = dot_int8(acc, w1, x1, s1, a1)
        acc = dot_int8(acc, w2, x2, s2, a2)
        acc = dot_int8(acc, w3, x3, s3, a3)
    return acc


@triton.jit
def gemm_tile(
    x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, w_zero_ptr, bias_ptr, out_ptr, pair_weight_ptr,
    sorted_pair_ids_ptr, expert_offsets_ptr, block_expert_ptr, block_row_ptr, num_row_blocks, tile,
    N: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, OUT_COLS: tl.constexpr, STRIDE_X: tl.constexpr,
    TOP_K: tl.constexpr, GROUP: tl.constexpr, W_BITS: tl.constexpr, ACT_GROUP: tl.constexpr, HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, GEMM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_SIZE_M: tl.constexpr, NUM_STAGES: tl.constexpr,
    SCALE_AFTER: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """One output tile: BLOCK_N weight rows of one expert by up to BLOCK_M of its tokens."""
    INT8: tl.constexpr = ACT_GROUP > 0
    row_block, n_block = grouped_tile(tile, num_row_blocks, N // BLOCK_N, GROUP_SIZE_M)
    expert = tl.load(block_expert_ptr + row_block).to(tl.int64)
    offs_m = tl.load(block_row_ptr + row_block) + tl.arange(0, BLOCK_M)
    mask_m = offs_m < tl.load(expert_offsets_ptr + expert + 1)
    # Rows past the expert's end are loaded as zeros, which costs no memory traffic, and never stored.
    pair = tl.load(sorted_pair_ids_ptr + offs_m, mask=mask_m, other=0)
    row = (pair // TOP_K if GEMM == 1 else tl.where(mask_m, offs_m, 0)).to(tl.int64)
    offs_n = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
    x_rows = x_ptr + row * STRIDE_X
    if INT8:
        x_scale_rows = x_scale_ptr + row * (KP // ACT_GROUP)
    w_ptr += expert * ((N * KP) if W_BITS == 16 else (N * KP // 2))
    s_ptr = w_scale_ptr + expert * (KP // GROUP * N)
    z_ptr = w_zero_ptr + expert * (KP // GROUP * N)
    offs_k = tl.arange(0, 128)

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    if W_BITS == 4:  # scales of the next block are fetched one iteration ahead: too narrow for an asynchronous copy
        s0, s1, s2, s3 = load_groups(s_ptr, 0, offs_n, N, GROUP)
        if HAS_ZERO:
            z0, z1, z2, z3 = load_groups(z_ptr, 0, offs_n, N, GROUP)
        else:
            z0, z1, z2, z3 = s0, s1, s2, s3
    for kb in tl.range(0, KP // 128, num_stages=NUM_STAGES):
        raw = load_weight_block(w_ptr, kb, offs_n, N, W_BITS, INT8, KP)
        if W_BITS == 4:
            ahead = tl.minimum(kb + 1, KP // 128 - 1)
            t0, t1, t2, t3 = load_groups(s_ptr, ahead, offs_n, N, GROUP)
        if INT8:
            SUB: tl.constexpr = min(GROUP, min(ACT_GROUP, 128))
            acc = accumulate_int8(
                acc, raw, s0, s1, s2, s3, x_rows, x_scale_rows, kb, mask_m, BLOCK_N, SUB, ACT_GROUP, PTX
            )
        else:
            if K == KP:
                x = tl.load(x_rows[:, None] + kb * 128 + offs_k[None, :], mask=mask_m[:, None], other=0.0)
            else:  # the padded weights are zero, but what lies behind the row may be NaN
                inside = mask_m[:, None] & (kb * 128 + offs_k < K)[None, :]
                x = tl.load(x_rows[:, None] + kb * 128 + offs_k[None, :], mask=inside, other=0.0)
            if W_BITS == 16:
                acc = dot_f32(raw, x, acc, PTX)
            elif SCALE_AFTER:
                codes = code_operand(raw, BLOCK_N, PTX)
                acc += dot_f32(codes, x, tl.zeros_like(acc), PTX) * s0.to(tl.float32)[:, None]
            else:
                acc = dot_f32(weight_operand(raw, s0, s1, s2, s3, z0, z1, z2, z3, HAS_ZERO, BLOCK_N, PTX), x, acc, PTX)
        if W_BITS == 4:
            s0, s1, s2, s3 = t0, t1, t2, t3
            if HAS_ZERO:
                z0, z1, z2, z3 = load_groups(z_ptr, ahead, offs_n, N, GROUP)
            else:
                z0, z1, z2, z3 = t0, t1, t2, t3
    if INT8:
        acc *= 0.0625  # decode_int8 gives 16 times the weight

    if HAS_BIAS:
        acc += tl.load(bias_ptr + expert * N + offs_n)[:, None]
    if GEMM == 1:
        # gate and up rows alternate in runs of 8: rows r and r + 8 of an accumulator belong to one thread.
        gate, up = tl.split(acc.reshape(BLOCK_N // 16, 2, 8, BLOCK_M).permute(0, 2, 3, 1))
        value = gated_activation(gate, up, ACTIVATION).reshape(BLOCK_N // 2, BLOCK_M)
        offs_o = n_block * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        out_row = offs_m.to(tl.int64)
    else:
        value = acc * tl.load(pair_weight_ptr + pair, mask=mask_m, other=0.0).to(tl.float32)[None, :]
        offs_o = offs_n
        out_row = pair.to(tl.int64)
    pointers = out_ptr + out_row[None, :] * OUT_COLS + offs_o[:, None]
    if OUT_COLS % 128 == 0:
        tl.store(pointers, to_bf16(value, PTX), mask=mask_m[None, :])
    else:
        tl.store(pointers, to_bf16(value, PTX), mask=mask_m[None, :] & (offs_o < OUT_COLS)[:, None])


@triton.jit
def moe_grouped_gemm(
    x_ptr,  # GEMM1: bf16 [T, STRIDE_X] or int8 [T, KP]; GEMM2: [P, KP], rows sorted by expert
    x_scale_ptr,  # fp32 [rows of x, KP/ACT_GROUP], int8 activations only
    w_ptr,  # uint8 [E, KP/128, N, 64] packed, or bf16 [E, N, KP]
    w_scale_ptr,  # bf16 [E, KP/GROUP, N]
    w_zero_ptr,  # bf16 [E, KP/GROUP, N], HAS_ZERO only
    bias_ptr,  # fp32 [E, N], HAS_BIAS only
    out_ptr,  # GEMM1: bf16 [P, OUT_COLS] sorted by expert; GEMM2: bf16 [P, OUT_COLS] in pair order
    pair_weight_ptr,  # float [P] routing weights, GEMM2 only
    sorted_pair_ids_ptr,  # int32 [P]
    expert_offsets_ptr,  # int32 [E + 1], first row of each expert
    block_expert_ptr,  # int32 [max row blocks]
    block_row_ptr,  # int32 [max row blocks], first row of the block
    num_row_blocks_ptr,  # int32 [1]: how many row blocks routing wrote
    N: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, OUT_COLS: tl.constexpr, STRIDE_X: tl.constexpr,
    TOP_K: tl.constexpr, GROUP: tl.constexpr, W_BITS: tl.constexpr, ACT_GROUP: tl.constexpr, HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, GEMM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_SIZE_M: tl.constexpr, NUM_STAGES: tl.constexpr,
    SCALE_AFTER: tl.constexpr, PERSISTENT: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """GEMM1 (gate+up with the activation) or GEMM2 (down with the routing weight) of the expert layer.

    PERSISTENT: any number of programs walk the tile list to the count on the device. Else program i does tile i, and
    the grid must cover every tile. A tile is computed the same way in both, so the results are equal bit for bit.
    """
    num_row_blocks = tl.load(num_row_blocks_ptr)
    num_tiles = num_row_blocks * (N // BLOCK_N)
    if PERSISTENT:
        for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0)):
            gemm_tile(
                x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, w_zero_ptr, bias_ptr, out_ptr, pair_weight_ptr,
                sorted_pair_ids_ptr, expert_offsets_ptr, block_expert_ptr, block_row_ptr, num_row_blocks, tile,
                N, K, KP, OUT_COLS, STRIDE_X, TOP_K, GROUP, W_BITS, ACT_GROUP, HAS_ZERO, HAS_BIAS, ACTIVATION, GEMM,
                BLOCK_M, BLOCK_N, GROUP_SIZE_M, NUM_STAGES, SCALE_AFTER, PTX,
            )  # fmt: skip
    else:
        tile = tl.program_id(0)
        if tile < num_tiles:
            gemm_tile(
                x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, w_zero_ptr, bias_ptr, out_ptr, pair_weight_ptr,
                sorted_pair_ids_ptr, expert_offsets_ptr, block_expert_ptr, block_row_ptr, num_row_blocks, tile,
                N, K, KP, OUT_COLS, STRIDE_X, TOP_K, GROUP, W_BITS, ACT_GROUP, HAS_ZERO, HAS_BIAS, ACTIVATION, GEMM,
                BLOCK_M, BLOCK_N, GROUP_SIZE_M, NUM_STAGES, SCALE_AFTER, PTX,
            )  # fmt: skip
