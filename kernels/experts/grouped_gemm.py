"""The tensor-core mainloop: one grouped GEMM for GEMM1 and GEMM2, every scheme, every schedule, few tokens and many.

Weights are the M side of the MMA: a tile is BLOCK_N weight rows by BLOCK_M tokens, so the few tokens that an expert has
sit on the flexible side of the instruction, and decoded weights go from registers into it without a trip through
shared memory. The packed layout (packing.py) is in the order of those registers.

Which rows a tile multiplies comes from the lists that routing.py wrote (many tokens), or is found by each program from
the expert ids themselves (few tokens: a launch less, and the ids are a cache line or two).

Letters: P pairs (token, expert), M tokens of one tile, N weight rows, K reduction, Kp K padded to 128.
"""

from __future__ import annotations

import triton
import triton.language as tl

from executorch_moe.kernels._device import (
    bf16_rows_of_pairs,
    decode_bf16,
    decode_codes,
    decode_int8,
    gated_activation,
    grouped_tile,
    launches_before,
    load_groups,
    load_pairs,
    rows_of_pairs,
    to_bf16,
)

from .routing import leads_row_block, rows_of_leader


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
    """Bring a tile's packed weights, the first blocks of K, into L2: they are read, and thrown away."""
    KB: tl.constexpr = (KP // 128 + SPLIT_K - 1) // SPLIT_K
    words_ptr = w_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + expert * (N * KP // 8)
    offs = n_block * BLOCK_N * 16 + tl.arange(0, BLOCK_N * 16)
    for step in tl.static_range(min(KB, 8)):
        kb = split * KB + step
        tl.load(words_ptr + kb * N * 16 + offs, mask=(offs >= 0) & (kb < KP // 128), volatile=True)


@triton.jit
def broadcast_groups(s0, s1, s2, s3, INT8_ORDER: tl.constexpr, BLOCK_N: tl.constexpr):
    """Words of `load_groups` -> bf16 [BN, 32] for the nibbles 0..3 of the halfwords at that place."""
    s0 = tl.broadcast_to(bf16_rows_of_pairs(s0, BLOCK_N)[:, None], (BLOCK_N, 32))
    s1 = tl.broadcast_to(bf16_rows_of_pairs(s1, BLOCK_N)[:, None], (BLOCK_N, 32))
    s2 = tl.broadcast_to(bf16_rows_of_pairs(s2, BLOCK_N)[:, None], (BLOCK_N, 32))
    s3 = tl.broadcast_to(bf16_rows_of_pairs(s3, BLOCK_N)[:, None], (BLOCK_N, 32))
    if INT8_ORDER:  # nibbles alternate between the halves of the K block, columns from 16 on are the odd quarters
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

    s0..s3, z0..z3: words of `load_groups`, scales and zeros. K is in natural order, or in that of `k_order`.
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
def dot_f32(w, x, acc, PTX: tl.constexpr):
    """acc + w [BN, K] @ x [BM, K].T, bf16 operands, fp32 accumulator."""
    if PTX:
        return tl.dot(w, x.trans(), acc)
    else:  # the interpreter multiplies raw bf16 bits; fp32 holds the same values
        return tl.dot(w.to(tl.float32), x.to(tl.float32).trans(), acc, input_precision="ieee")


@triton.jit
def done_with_registers(acc, PTX: tl.constexpr):
    """The product's sums, fp32; behind this its first operand's registers may be written to.

    Left alone, Triton lets wgmmas of a K block (3.6: up to seven) run on into the next iteration, which decodes its
    weights into the registers that they still read: on an H200 one tile in some 500,000 came out wrong. What uses the
    sums waits for them.
    """
    if PTX:
        return tl.inline_asm_elementwise("", "=f,0", [acc], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return acc


@triton.jit
def dot_quarters(raw, x_ptr, inside, zero, INT8_ORDER: tl.constexpr, BLOCK_N: tl.constexpr, PTX: tl.constexpr):
    """`code_operand` times x [BM, 128].T, as four products that do not wait for each other.

    With few tokens, the chain of MMAs on one accumulator is most of the time that a K block takes.

    x_ptr: [BM, 32], addresses of the first quarter, in `k_order`. zero: fp32 [BN, BM].
    """
    # Where the other quarters' columns are from those of the first, by `k_order`.
    ODD: tl.constexpr = 64 if INT8_ORDER else 32
    LATER: tl.constexpr = 2 if INT8_ORDER else 64
    w0, w1, w2, w3 = decode_codes(natural_halfwords(raw, BLOCK_N), PTX)
    low = dot_f32(w0, tl.load(x_ptr, mask=inside, other=0), zero, PTX)
    low += dot_f32(w1, tl.load(x_ptr + ODD, mask=inside, other=0), zero, PTX)
    high = dot_f32(w2, tl.load(x_ptr + LATER, mask=inside, other=0), zero, PTX)
    high += dot_f32(w3, tl.load(x_ptr + (ODD + LATER), mask=inside, other=0), zero, PTX)
    return low + high


@triton.jit
def code_operand(raw, BLOCK_N: tl.constexpr, PTX: tl.constexpr):
    """`weight_operand` without scales: the codes -8..7 as bf16, exact."""
    w0, w1, w2, w3 = decode_codes(natural_halfwords(raw, BLOCK_N), PTX)
    return join_quarters(w0, w1, w2, w3, BLOCK_N)


@triton.jit
def k_order(INT8_ORDER: tl.constexpr, COLUMNS: tl.constexpr):
    """Position in its K block of each of the first columns of `weight_operand`: int32 [COLUMNS]."""
    i = tl.arange(0, COLUMNS)
    if INT8_ORDER:
        # Column (n, c, h, t, l) of the bf16 fragments holds k = (n % 2, c, h, t, n // 2, l) of the int8 ones.
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
def rescale_sums(acc, scale_ptr):
    """int32 sums [BN, BM] in units of one activation group's scale -> in units of the next one's.

    scale_ptr: [BM], where the next group's scale of each row is.
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

    expert: int64. pair, x_row, out_row: int32 [BM], of each row its pair, its row in x and its row in out, 0 where
    mask_m is not set. Such rows are loaded as zeros, which costs no memory traffic, and are never stored.
    split: which of the SPLIT_K parts of K. FEW: of few tokens, where the time is the chain of waits of each program.
    """
    INT8: tl.constexpr = ACT_GROUP > 0
    SEGMENTS: tl.constexpr = (KP + ACT_GROUP - 1) // ACT_GROUP if INT8 else 1
    KB: tl.constexpr = (KP // 128 + SPLIT_K - 1) // SPLIT_K  # K blocks of a part
    offs_n = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows are held as 32-bit offsets to a base that all share, where these reach: wider ones take twice the registers.
    x_offs = x_row.to(tl.int64 if WIDE_X else tl.uint32) * STRIDE_X
    if INT8:
        x_scale_rows = x_scale_ptr + x_row.to(tl.int64) * SEGMENTS
    w_ptr += expert * ((N * KP) if W_BITS == 16 else (N * KP // 2))
    # Behind the groups' multipliers, int8 fragments have the rows' scales.
    s_ptr = w_scale_ptr + expert * ((KP // GROUP + INT8_ORDER) * N)
    z_ptr = w_zero_ptr + expert * (KP // GROUP * N)
    # Padded columns are masked by the K block, which four quarters at one mask cannot be.
    QUARTERS: tl.constexpr = FEW and SCALE_AFTER and W_BITS == 4 and not INT8 and K == KP
    if QUARTERS:
        offs_k = k_order(INT8_ORDER, 32)
    elif INT8:
        offs_k = tl.arange(0, 64)
    else:
        offs_k = k_order(INT8_ORDER, 128)

    EARLY: tl.constexpr = GEMM == 2 and FEW
    if EARLY:  # what is needed last is asked for first
        pair_weight = tl.load(pair_weight_ptr + pair, mask=mask_m, other=0.0).to(tl.float32)

    first = split * KB
    last = KP // 128 if SPLIT_K == 1 else tl.minimum(first + KB, KP // 128)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32 if INT8 else tl.float32)
    for segment in tl.static_range(SEGMENTS):
        start = first if SEGMENTS == 1 else segment * (ACT_GROUP // 128)
        end = last if segment == SEGMENTS - 1 else (segment + 1) * (ACT_GROUP // 128)
        if segment > 0:
            acc = rescale_sums(acc, x_scale_rows + segment)
        # Scales of the next block are fetched one iteration ahead: they are too narrow for the asynchronous copies.
        if W_BITS == 4:
            begin = start if SPLIT_K == 1 else tl.minimum(start, KP // 128 - 1)  # the last part may be empty
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
            else:  # the padded weights are zero, but what lies behind the row may be NaN
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
                # Half a block at a time: fewer registers hold operands, so that more programs are resident.
                x_high = tl.load(x_block + 64, mask=inside, other=0)
                low, high = int8_operands(raw, s0, s1, s2, s3, BLOCK_N, PTX)
                acc = tl.dot(low, x.trans(), acc, out_dtype=tl.int32)
                acc = tl.dot(high, x_high.trans(), acc, out_dtype=tl.int32)
            elif SCALE_AFTER and not QUARTERS:
                codes = code_operand(raw, BLOCK_N, PTX)
                acc += dot_f32(codes, x, tl.zeros_like(acc), PTX) * rows_of_pairs(s0, BLOCK_N)[:, None]
            elif not QUARTERS:
                operand = weight_operand(raw, s0, s1, s2, s3, z0, z1, z2, z3, HAS_ZERO, INT8_ORDER, BLOCK_N, PTX)
                acc = done_with_registers(dot_f32(operand, x, acc, PTX), PTX)
            if W_BITS == 4:
                s0, s1, s2, s3 = load_groups(s_ptr, ahead, n_block, N, GROUP, BLOCK_N)
                if HAS_ZERO:
                    z0, z1, z2, z3 = load_groups(z_ptr, ahead, n_block, N, GROUP, BLOCK_N)
                else:
                    z0, z1, z2, z3 = s0, s1, s2, s3
    if INT8:
        acc = acc.to(tl.float32) * tl.load(x_scale_rows + SEGMENTS - 1)[None, :]
    if INT8_ORDER:
        rows = load_pairs(s_ptr, KP // GROUP, n_block, N, BLOCK_N)
        acc *= rows_of_pairs(rows, BLOCK_N)[:, None]

    if HAS_BIAS:
        bias = tl.load(bias_ptr + expert * N + offs_n)
        acc += (bias if SPLIT_K == 1 else tl.where(split == 0, bias, 0.0))[:, None]
    if GEMM == 1:
        # gate and up rows alternate in runs of 8: rows r and r + 8 of an accumulator belong to one thread.
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


@triton.jit
def chosen_experts(
    topk_ids_ptr, num_tokens, TOP_K: tl.constexpr, NUM_EXPERTS: tl.constexpr, TOKENS: tl.constexpr
):  # fmt: skip
    """int32 [TOKENS]: bit i of a token is set if its choice i is an expert that is there."""
    token = tl.arange(0, TOKENS)
    chosen = tl.zeros((TOKENS,), dtype=tl.int32)
    for slot in tl.static_range(TOP_K):
        expert = tl.load(topk_ids_ptr + token * TOP_K + slot, mask=token < num_tokens, other=-1)
        chosen |= ((expert >= 0) & (expert < NUM_EXPERTS)).to(tl.int32) << slot
    return chosen


@triton.jit
def sum_pairs_of_block(
    y_ptr, chosen, out_ptr, num_tokens, num_pairs, n_block,
    H: tl.constexpr, TOP_K: tl.constexpr, SPLIT_K: tl.constexpr, BLOCK_N: tl.constexpr,
    TOKENS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Sum over top_k (and the parts of K) for BLOCK_N columns of all tokens, in fixed order.

    y: fp32 [SPLIT_K, P, H]. chosen: int32 [TOKENS], bit i of a token if its choice i is an expert that is there.
    """
    token = tl.arange(0, TOKENS)
    offs = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((TOKENS, BLOCK_N), dtype=tl.float32)
    for slot in tl.static_range(TOP_K):
        pair = token * TOP_K + slot
        valid = (((chosen >> slot) & 1) != 0)[:, None] & (offs < H)[None, :]
        for split in tl.static_range(SPLIT_K):
            row = split * num_pairs + pair
            # .cg: what other multiprocessors wrote is in L2.
            acc += tl.load(y_ptr + row[:, None] * H + offs[None, :], mask=valid, other=0.0, cache_modifier=".cg")
    wanted = (token < num_tokens)[:, None] & (offs < H)[None, :]
    tl.store(out_ptr + token[:, None] * H + offs[None, :], to_bf16(acc, PTX), mask=wanted)


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
    num_pairs,
    PAIRS_FROM: tl.constexpr, PAIRS_TO: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, OUT_COLS: tl.constexpr, STRIDE_X: tl.constexpr,
    WIDE_X: tl.constexpr,
    TOP_K: tl.constexpr, GROUP: tl.constexpr, W_BITS: tl.constexpr, INT8_ORDER: tl.constexpr, ACT_GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, GEMM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_SIZE_M: tl.constexpr, NUM_STAGES: tl.constexpr,
    UNROLL: tl.constexpr, SCALE_AFTER: tl.constexpr, PERSISTENT: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """GEMM1 (gate+up with the activation) or GEMM2 (down with the routing weight) over the row blocks of routing.py.

    PERSISTENT: any number of programs walk the tile list to the count on the device. Else program i does tile i, and
    the grid must cover every tile. A tile is computed the same way in both, so the results are equal bit for bit.

    WIDE_X: x has more elements than 32-bit offsets reach.
    With less than PAIRS_FROM or more than PAIRS_TO pairs there is nothing to do: another launch, with tiles of another
    height, is the one for that many.
    """
    wanted = (num_pairs >= PAIRS_FROM) & (num_pairs <= PAIRS_TO)
    # All the rest is behind the number of tiles that is read here.
    num_row_blocks = tl.load(num_row_blocks_ptr + launches_before(False, PTX), mask=wanted, other=0)
    num_tiles = num_row_blocks * (N // BLOCK_N)
    start = tl.program_id(0)
    # One CTA per tile is the same loop with a stride that ends it after one tile.
    step = tl.num_programs(0) if PERSISTENT else tl.maximum(num_tiles, 1)
    for tile in tl.range(start, num_tiles, step):
        row_block, n_block = grouped_tile(tile, num_row_blocks, N // BLOCK_N, GROUP_SIZE_M)
        expert = tl.load(block_expert_ptr + row_block).to(tl.int64)
        row = tl.load(block_row_ptr + row_block) + tl.arange(0, BLOCK_M)
        mask_m = row < tl.load(expert_offsets_ptr + expert + 1)
        row = tl.where(mask_m, row, 0)
        pair = tl.load(sorted_pair_ids_ptr + row, mask=mask_m, other=0)
        x_row = pair // TOP_K if GEMM == 1 else row
        out_row = row if GEMM == 1 else pair
        gemm_tile(
            x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, w_zero_ptr, bias_ptr, out_ptr, pair_weight_ptr,
            expert, pair, x_row, out_row, mask_m, n_block, 0,
            N, K, KP, OUT_COLS, STRIDE_X, WIDE_X, GROUP, W_BITS, INT8_ORDER, ACT_GROUP, HAS_ZERO, HAS_BIAS, ACTIVATION,
            GEMM, BLOCK_M, BLOCK_N, 1, NUM_STAGES, UNROLL, SCALE_AFTER, False, PTX,
        )  # fmt: skip


@triton.jit
def moe_few_tokens_gemm(
    x_ptr,  # GEMM1: bf16 [T, STRIDE_X] or int8 [T, KP]; GEMM2: [P, KP], in pair order
    x_scale_ptr,  # fp32 [rows of x, KP/ACT_GROUP], int8 activations only
    w_ptr,  # uint8 [E, KP/128, N, 64] packed, or bf16 [E, N, KP]
    w_scale_ptr,  # bf16 [E, KP/GROUP, N]
    w_zero_ptr,  # bf16 [E, KP/GROUP, N], HAS_ZERO only
    bias_ptr,  # fp32 [E, N], HAS_BIAS only
    y_ptr,  # GEMM1: bf16 [P, OUT_COLS]; GEMM2: fp32 [SPLIT_K, P, OUT_COLS]. In pair order
    pair_weight_ptr,  # float [P] routing weights, GEMM2 only
    topk_ids_ptr,  # int32 or int64 [P]
    arrivals_ptr,  # int32 [N/BLOCK_N of GEMM2]: programs of an n block that are done; GEMM1 sets them to zero
    out_ptr,  # bf16 [T, OUT_COLS], GEMM2 only
    num_tokens,
    NUM_ARRIVALS: tl.constexpr, NUM_EXPERTS: tl.constexpr, PAIRS: tl.constexpr, TOKENS: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, OUT_COLS: tl.constexpr, STRIDE_X: tl.constexpr,
    TOP_K: tl.constexpr, GROUP: tl.constexpr, W_BITS: tl.constexpr, INT8_ORDER: tl.constexpr, ACT_GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, GEMM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT_K: tl.constexpr, NUM_STAGES: tl.constexpr,
    UNROLL: tl.constexpr, SCALE_AFTER: tl.constexpr, SHORT: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """The same GEMMs without routing lists: program (n block, pair, part of K) does the row block that its pair leads.

    PAIRS and TOKENS: powers of two from P and T on. SHORT: so few programs that they leave most of the GPU idle.
    GEMM2 also sums over top_k: the last program of an n block to arrive adds what all of them wrote, in fixed order, so
    the bits do not depend on which one it is.
    """
    n_block, first_pair, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_pairs = num_tokens * TOP_K
    if GEMM == 1:
        zero = launches_before(SHORT, PTX)
        topk_ids_ptr += zero
    expert = tl.load(topk_ids_ptr + first_pair).to(tl.int64)
    all_pairs = tl.arange(0, PAIRS)
    if TOKENS == 1:  # whose experts differ: each pair leads. (One that is named twice is read twice, no more.)
        before = 0
        leads = (expert >= 0) & (expert < NUM_EXPERTS)
    else:
        ids = tl.load(topk_ids_ptr + all_pairs, mask=all_pairs < num_pairs, other=-1)
        before, leads = leads_row_block(ids, expert, first_pair, NUM_EXPERTS, PAIRS, BLOCK_M)
    if GEMM == 2:  # GEMM1 has waited for the experts, so they may be read, and these weights asked for, while it runs
        if SHORT and W_BITS == 4 and leads:
            fetch_weights(w_ptr, expert, n_block, split, N, KP, BLOCK_N, SPLIT_K)
        if SHORT:
            chosen = chosen_experts(topk_ids_ptr, num_tokens, TOP_K, NUM_EXPERTS, TOKENS)
        zero = launches_before(SHORT, PTX)
    x_ptr += zero
    arrivals_ptr += zero
    # A part of K that has no blocks stores zeros, which are known before the wait: their address is not.
    y_ptr += zero
    out_ptr += zero
    if GEMM == 1:
        block = tl.arange(0, NUM_ARRIVALS)
        first_program = (n_block == 0) & (first_pair == 0)
        tl.store(arrivals_ptr + block, tl.zeros_like(block), mask=first_program & (block < NUM_ARRIVALS))
    if leads:
        if TOKENS == 1:
            row = tl.arange(0, BLOCK_M)
            mask_m = row == 0
            pair = tl.where(mask_m, first_pair, 0)
        else:
            again = tl.load(topk_ids_ptr + all_pairs, mask=all_pairs < num_pairs, other=-1)
            pair, mask_m = rows_of_leader(again, expert, before, NUM_EXPERTS, PAIRS, BLOCK_M)
        x_row = pair // TOP_K if GEMM == 1 else pair
        out_row = pair + split * num_pairs
        gemm_tile(
            x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, w_zero_ptr, bias_ptr, y_ptr, pair_weight_ptr,
            expert, pair, x_row, out_row, mask_m, n_block, split,
            N, K, KP, OUT_COLS, STRIDE_X, False, GROUP, W_BITS, INT8_ORDER, ACT_GROUP, HAS_ZERO, HAS_BIAS, ACTIVATION,
            GEMM, BLOCK_M, BLOCK_N, SPLIT_K, NUM_STAGES, UNROLL, SCALE_AFTER, True, PTX,
        )  # fmt: skip
    if GEMM == 2:
        tl.debug_barrier()  # all threads' stores before the one thread's release
        arrived = tl.atomic_add(arrivals_ptr + n_block, 1, sem="acq_rel", scope="gpu")
        if arrived == num_pairs * SPLIT_K - 1:
            if not SHORT:
                chosen = chosen_experts(topk_ids_ptr, num_tokens, TOP_K, NUM_EXPERTS, TOKENS)
            sum_pairs_of_block(
                y_ptr, chosen, out_ptr, num_tokens, num_pairs, n_block,
                OUT_COLS, TOP_K, SPLIT_K, BLOCK_N, TOKENS, PTX,
            )  # fmt: skip
