"""Kernels for one token of each of several texts.

A row is the token of one text. The weights are read once for all rows. Each row attends to its own slot of the cache,
up to its own position.

Letters: T rows, D head_dim, G query heads of a key/value head, S slots of the cache, C positions of a slot, E experts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from executorch_moe.kernels._device import bf16_round, dot_bf16, launches_before, to_bf16
from executorch_moe.kernels.decode.attention_kernels import load_halves, norm_and_rotate
from executorch_moe.kernels.experts.tile import done_with_registers
from executorch_moe.kernels.prefill.kernels import attend, choose_experts


@triton.jit
def moe_rows_linear(
    x_ptr,  # bf16 [T, K]
    w_ptr,  # int8 or bf16 [N, K]
    scale_ptr,  # fp32 [N], HAS_SCALE only
    out_ptr,  # bf16 [T, N], or fp32 [SPLITS, T, N] if there are several parts of K
    arrivals_ptr,  # int32 [NUM_ARRIVALS], set to zero
    T,
    N: tl.constexpr, K: tl.constexpr, NUM_ARRIVALS: tl.constexpr, HAS_SCALE: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    SHORT: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """x @ W.T * scale; program (n block, part of K) does BLOCK_N columns of all rows.

    The weights are the first operand of the product, whose tiles may be 16 high, so that many programs share them.
    SHORT: the launch has so few programs that the next one may start early.
    """
    n_block, part = tl.program_id(0), tl.program_id(1)
    offs_t, offs_k = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_K)
    offs_n = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, columns = (offs_t < T)[:, None], offs_n < N
    STEPS: tl.constexpr = (K + BLOCK_K * SPLITS - 1) // (BLOCK_K * SPLITS)
    if HAS_SCALE:
        scale = tl.load(scale_ptr + offs_n, mask=columns, other=0.0)
    zero = launches_before(SHORT, PTX)
    x_ptr += zero
    out_ptr += zero
    arrivals_ptr += zero
    # 64 bits: the matrix of a vocabulary may have more elements than 32 bits can address.
    w_rows = w_ptr + offs_n.to(tl.int64)[:, None] * K
    acc = tl.zeros((BLOCK_N, BLOCK_T), dtype=tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        k = (part * STEPS + step) * BLOCK_K + offs_k
        inside = (k < K)[None, :]
        w = tl.load(w_rows + k[None, :], mask=columns[:, None] & inside, other=0)
        x = tl.load(x_ptr + offs_t[:, None] * K + k[None, :], mask=rows & inside, other=0.0)
        if w_ptr.dtype.element_ty == tl.int8:
            w = to_bf16(w.to(tl.float32), PTX)
        acc = done_with_registers(dot_bf16(w, x.trans(), acc, PTX), PTX)
    if HAS_SCALE:
        acc *= scale[:, None]
    cells = (part * T + offs_t).to(tl.int64)[:, None] * N + offs_n[None, :]
    wanted = rows & columns[None, :]
    if SPLITS > 1:
        tl.store(out_ptr + cells, acc.trans(), mask=wanted)
    else:
        tl.store(out_ptr + cells, to_bf16(acc, PTX).trans(), mask=wanted)
    if NUM_ARRIVALS > 0:
        arrivals = tl.arange(0, NUM_ARRIVALS)
        first = (n_block == 0) & (part == 0)
        tl.store(arrivals_ptr + arrivals, tl.zeros_like(arrivals), mask=(arrivals >= 0) & first)


@triton.jit
def whole_heads(low, high, HALF: tl.constexpr, PTX: tl.constexpr):
    """Rows in two halves, fp32 [R, D/2] each -> bf16 [R, D]."""
    return to_bf16(tl.join(low, high).permute(0, 2, 1).reshape(low.shape[0], 2 * HALF), PTX)


@triton.jit
def moe_rows_attention(
    qkv_ptr,  # bf16 [T, (KV_HEADS * G + 2 * KV_HEADS) * D]: query heads, key heads, value heads
    q_norm_ptr, k_norm_ptr,  # float [D]
    cos_ptr, sin_ptr,  # float [T, D/2]: the angles of both halves are equal
    position_ptr,  # int64 [T]; below 0: an empty row
    slot_ptr,  # int64 [T]
    key_ptr, value_ptr,  # bf16 [S, KV_HEADS, C, D]: positions before those of the rows
    new_ptr,  # bf16 [2, T, KV_HEADS, D]: keys and values of the rows, for the cache
    partial_ptr,  # fp32 [SPLITS, T, KV_HEADS * G, D]: of each part, not yet divided
    max_ptr, sum_ptr,  # fp32 [SPLITS, T, KV_HEADS * G]
    arrivals_ptr,  # int32 [T * KV_HEADS], zero
    out_ptr,  # bf16 [T, KV_HEADS * G * D]
    T, S,
    SCALING: tl.constexpr, EPS: tl.constexpr,
    C: tl.constexpr, KV_HEADS: tl.constexpr, GROUPS: tl.constexpr, G_POW2: tl.constexpr, G_PAD: tl.constexpr,
    HALF: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Attention of each row: program (key/value head, part, row) does every SPLITS-th block of the row's positions.

    The first part starts with the token itself, whose key and value are not in the cache yet.
    """
    head, part, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    D: tl.constexpr = 2 * HALF
    HEADS: tl.constexpr = KV_HEADS * GROUPS
    UNIT: tl.constexpr = SCALING * 1.4426950408889634  # log2(e): the hardware has exp2
    group = tl.arange(0, G_PAD)
    real = group < GROUPS
    offs_h, offs_d = tl.arange(0, HALF), tl.arange(0, D)
    q_norm_low, q_norm_high = load_halves(q_norm_ptr, HALF)
    k_norm_low, k_norm_high = load_halves(k_norm_ptr, HALF)
    zero = launches_before(False, PTX)
    position_ptr += zero
    slot_ptr += zero
    qkv_ptr += zero + row * ((HEADS + 2 * KV_HEADS) * D)
    cos_ptr += zero + row * HALF
    sin_ptr += zero + row * HALF
    arrivals_ptr += zero + row * KV_HEADS
    new_ptr += zero + row * (KV_HEADS * D)
    partial_ptr += zero
    max_ptr += zero
    sum_ptr += zero
    out_ptr += zero + row * (HEADS * D)
    length = tl.minimum(tl.maximum(tl.load(position_ptr + row), 0), C).to(tl.int32)  # positions in the cache
    slot = tl.minimum(tl.maximum(tl.load(slot_ptr + row), 0), S - 1)
    key_ptr += zero + (slot * KV_HEADS + head) * (C * D)
    value_ptr += zero + (slot * KV_HEADS + head) * (C * D)

    q_rows = (head * GROUPS + group)[:, None] * D + offs_h[None, :]
    q_low = tl.load(qkv_ptr + q_rows, mask=real[:, None], other=0.0).to(tl.float32)
    q_high = tl.load(qkv_ptr + q_rows + HALF, mask=real[:, None], other=0.0).to(tl.float32)
    q_low, q_high = norm_and_rotate(q_low, q_high, q_norm_low, q_norm_high, cos_ptr, sin_ptr, EPS, HALF, PTX)
    best = tl.full((G_PAD,), -1e30, dtype=tl.float32)
    total = tl.zeros((G_PAD,), dtype=tl.float32)
    acc = tl.zeros((G_PAD, D), dtype=tl.float32)
    if part == 0:
        k_rows = (HEADS + head) * D + offs_h[None, :]
        new_low = tl.load(qkv_ptr + k_rows).to(tl.float32)
        new_high = tl.load(qkv_ptr + k_rows + HALF).to(tl.float32)
        new_low, new_high = norm_and_rotate(
            new_low, new_high, k_norm_low, k_norm_high, cos_ptr, sin_ptr, EPS, HALF, PTX
        )
        new_v = tl.load(qkv_ptr + (HEADS + KV_HEADS + head) * D + offs_d)
        new_rows = head * D + offs_h[None, :]
        tl.store(new_ptr + new_rows, to_bf16(new_low, PTX))
        tl.store(new_ptr + new_rows + HALF, to_bf16(new_high, PTX))
        tl.store(new_ptr + (T * KV_HEADS + head) * D + offs_d, new_v)
        best = (tl.sum(q_low * new_low, axis=1) + tl.sum(q_high * new_high, axis=1)) * UNIT
        total = tl.full((G_PAD,), 1.0, dtype=tl.float32)
        acc = tl.zeros((G_PAD, D), dtype=tl.float32) + new_v.to(tl.float32)[None, :]
    q = whole_heads(q_low, q_high, HALF, PTX)
    start = part * BLOCK_N
    last = tl.zeros((G_PAD,), dtype=tl.int32) + (length - 1)
    for at in tl.range(start, length, SPLITS * BLOCK_N, num_stages=STAGES):
        best, total, acc = attend(
            q, key_ptr, value_ptr, at, 0, length, last, last, best, total, acc, UNIT, D, BLOCK_N, True, False, PTX
        )
    cell = (part * T + row) * HEADS + head * GROUPS + group
    wanted = real & ((part == 0) | (start < length))
    tl.store(partial_ptr + cell[:, None] * D + offs_d[None, :], acc, mask=wanted[:, None])
    tl.store(max_ptr + cell, best, mask=wanted)
    tl.store(sum_ptr + cell, total, mask=wanted)
    tl.debug_barrier()  # the stores of all threads must precede the release by one thread
    arrived = tl.atomic_add(arrivals_ptr + head, 1, sem="acq_rel", scope="gpu")
    if arrived == SPLITS - 1:
        # As in `moe_one_token_attention`: a fixed order, and nothing is summed across threads. .cg: others wrote this.
        query = head * GROUPS + tl.arange(0, G_POW2)
        real_query = tl.arange(0, G_POW2) < GROUPS
        highest = tl.full((G_POW2,), -1e30, dtype=tl.float32)
        for i in tl.static_range(SPLITS):
            mine = real_query & ((i * BLOCK_N < length) | (i == 0))
            maxima = tl.load(max_ptr + (i * T + row) * HEADS + query, mask=mine, other=-1e30, cache_modifier=".cg")
            highest = tl.maximum(highest, maxima)
        sums_of_all = tl.zeros((G_POW2,), dtype=tl.float32)
        result = tl.zeros((G_POW2, D), dtype=tl.float32)
        for i in tl.static_range(SPLITS):
            mine = real_query & ((i * BLOCK_N < length) | (i == 0))
            there = (i * T + row) * HEADS + query
            maxima = tl.load(max_ptr + there, mask=mine, other=-1e30, cache_modifier=".cg")
            sums = tl.load(sum_ptr + there, mask=mine, other=0.0, cache_modifier=".cg")
            values = tl.load(
                partial_ptr + there[:, None] * D + offs_d[None, :], mask=mine[:, None], other=0.0, cache_modifier=".cg"
            )
            factor = tl.exp2(maxima - highest)
            sums_of_all += sums * factor
            result += values * factor[:, None]
        result /= tl.where(real_query, sums_of_all, 1.0)[:, None]
        tl.store(out_ptr + query[:, None] * D + offs_d[None, :], to_bf16(result, PTX), mask=real_query[:, None])


@triton.jit
def moe_rows_router(
    partial_ptr,  # fp32 [SPLITS, T, E]: parts of the logits
    position_ptr,  # int64 [T]; below 0: an empty row
    weights_ptr,  # fp32 [T, TOP_K]
    ids_ptr,  # int64 [T, TOP_K]; -1 in empty rows
    T,
    SPLITS: tl.constexpr, E: tl.constexpr, E_POW2: tl.constexpr, TOP_K: tl.constexpr, K_POW2: tl.constexpr,
    BLOCK_T: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Sum of the parts, rounded to bf16 as a linear layer does, and `choose_experts`; BLOCK_T rows a program."""
    zero = launches_before(False, PTX)
    partial_ptr += zero
    position_ptr += zero
    weights_ptr += zero
    ids_ptr += zero
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert, place = tl.arange(0, E_POW2), tl.arange(0, K_POW2)
    inside = row < T
    real = inside[:, None] & (expert < E)[None, :]
    logits = tl.zeros((BLOCK_T, E_POW2), dtype=tl.float32)
    for part in tl.static_range(SPLITS):
        cells = (part * T + row)[:, None] * E + expert[None, :]
        logits += tl.load(partial_ptr + cells, mask=real, other=0.0)
    weights, ids = choose_experts(bf16_round(logits, PTX), E, E_POW2, TOP_K, K_POW2, BLOCK_T)
    used = tl.load(position_ptr + row, mask=inside, other=-1) >= 0
    ids = tl.where(used[:, None], ids, -1)
    cells = row[:, None] * TOP_K + place[None, :]
    wanted = inside[:, None] & (place < TOP_K)[None, :]
    tl.store(weights_ptr + cells, weights, mask=wanted)
    tl.store(ids_ptr + cells, ids, mask=wanted)
