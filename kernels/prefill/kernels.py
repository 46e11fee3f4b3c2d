"""Kernels for several tokens.

Letters: T tokens, E experts, D head_dim, G query heads of a key/value head, C positions of the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from executorch_moe.kernels._device import bf16_round, dot_bf16, launches_before, to_bf16


@triton.jit
def moe_rotated_heads(
    qkv_ptr,  # bf16 [T, HEADS + 2 * KV_HEADS, D]
    q_norm_ptr, k_norm_ptr,  # float [D]
    cos_ptr, sin_ptr,  # float [T, D/2]
    query_ptr,  # bf16 [T, HEADS, D]
    new_ptr,  # bf16 [2 * KV_HEADS, T, D]
    T,
    EPS: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr,
    BLOCK_T: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """RMS norm and rotation of (a, b), the halves of a head: (a cos - b sin, b cos + a sin), rounded to bf16 once.

    A program does BLOCK_T tokens of one head of query or key, or copies those of one head of value.
    """
    block, head = tl.program_id(0), tl.program_id(1)
    D: tl.constexpr = 2 * HALF
    token = block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = (token < T)[:, None]
    offs = tl.arange(0, HALF)[None, :]
    q_low, q_high = tl.load(q_norm_ptr + offs).to(tl.float32), tl.load(q_norm_ptr + HALF + offs).to(tl.float32)
    k_low, k_high = tl.load(k_norm_ptr + offs).to(tl.float32), tl.load(k_norm_ptr + HALF + offs).to(tl.float32)
    zero = launches_before(False, PTX)
    qkv_ptr += zero
    cos_ptr += zero
    sin_ptr += zero
    query_ptr += zero
    new_ptr += zero
    rows = (token * (HEADS + 2 * KV_HEADS) + head)[:, None] * D + offs
    low = tl.load(qkv_ptr + rows, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(qkv_ptr + rows + HALF, mask=inside, other=0.0).to(tl.float32)
    if head < HEADS + KV_HEADS:
        angles = token[:, None] * HALF + offs
        cos = tl.load(cos_ptr + angles, mask=inside, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + angles, mask=inside, other=0.0).to(tl.float32)
        factor = tl.rsqrt((tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)) / D + EPS)[:, None]
        low = low * factor * tl.where(head < HEADS, q_low, k_low)
        high = high * factor * tl.where(head < HEADS, q_high, k_high)
        first = low * cos - high * sin
        high = bf16_round(high * cos + low * sin, PTX)
        low = bf16_round(first, PTX)
    if head < HEADS:
        to = (token * HEADS + head)[:, None] * D + offs
        tl.store(query_ptr + to, to_bf16(low, PTX), mask=inside)
        tl.store(query_ptr + to + HALF, to_bf16(high, PTX), mask=inside)
    else:
        to = ((head - HEADS).to(tl.int64) * T + token)[:, None] * D + offs
        tl.store(new_ptr + to, to_bf16(low, PTX), mask=inside)
        tl.store(new_ptr + to + HALF, to_bf16(high, PTX), mask=inside)


@triton.jit
def attend(
    q, key_ptr, value_ptr, at, start, end, first, last, best, total, acc,
    UNIT: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, HAS_FIRST: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """One block of positions, from `at` on: the online softmax (Milakov and Gimelshein, arXiv:1805.02867).

    Args:
        q: bf16 [BLOCK_M, D], the query.
        start, end: positions that may be read, if MASKED. first, last: int32 [BLOCK_M], what a row sees, if MASKED.
        best, total: fp32 [BLOCK_M], the largest score so far, and the sum of the weights relative to it.
        acc: fp32 [BLOCK_M, D], the weighted sum of values.
        UNIT: factor of the products, positive: it makes them scores to the base of 2, because the hardware has exp2.

    Returns:
        best, total and acc with this block.
    """
    offs_n, offs_d = at + tl.arange(0, BLOCK_N), tl.arange(0, D)
    cells = offs_n[:, None] * D + offs_d[None, :]
    if MASKED:
        written = ((offs_n >= start) & (offs_n < end))[:, None]
        k = tl.load(key_ptr + cells, mask=written, other=0.0)
        v = tl.load(value_ptr + cells, mask=written, other=0.0)
    else:
        k = tl.load(key_ptr + cells)
        v = tl.load(value_ptr + cells)
    scores = dot_bf16(q, k.trans(), tl.zeros((q.shape[0], BLOCK_N), dtype=tl.float32), PTX)
    if MASKED:
        seen = offs_n[None, :] <= last[:, None]
        if HAS_FIRST:
            seen = seen & (offs_n[None, :] >= first[:, None])
        # Finite: a row may see nothing in this block. Whatever it adds then is later multiplied by 0. A power of two,
        # so that its product with UNIT is exact: below, the compiler may fuse product and difference, and a product
        # that was rounded up for `higher` but not there would leave 1e22, whose power is infinite.
        scores = tl.where(seen, scores, -1267650600228229401496703205376.0)  # -2^100
    higher = tl.maximum(best, tl.max(scores, axis=1) * UNIT)
    weights = tl.exp2(scores * UNIT - higher[:, None])
    shrink = tl.exp2(best - higher)
    total = total * shrink + tl.sum(weights, axis=1)
    acc = dot_bf16(to_bf16(weights, PTX), v, acc * shrink[:, None], PTX)
    return higher, total, acc


@triton.jit
def moe_cached_attention(
    query_ptr,  # bf16 [T, KV_HEADS, GROUPS, D]
    key_ptr, value_ptr,  # bf16 [KV_HEADS, C, D]
    visible_ptr,  # int64 [T, 1 + HAS_FIRST]
    out_ptr,  # bf16 [T, KV_HEADS, GROUPS, D]
    T,
    SCALING: tl.constexpr, C: tl.constexpr, KV_HEADS: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr,
    HAS_FIRST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Attention of BLOCK_M rows to one head of the cache. A row is a query head of a token, the token's heads in order.

    All query heads of a head of the cache are in one program, so few tokens fill a block, and the block ends where its
    last token does. Programs of the last tokens, which see the most, start first.
    """
    head, block = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    WIDTH: tl.constexpr = 2 if HAS_FIRST else 1
    zero = launches_before(False, PTX)
    query_ptr += zero
    key_ptr += zero + head.to(tl.int64) * (C * D)
    value_ptr += zero + head.to(tl.int64) * (C * D)
    visible_ptr += zero
    out_ptr += zero
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    token = tl.minimum(row // GROUPS, T - 1).to(tl.int64)  # rows past the end repeat the last token
    offs_d = tl.arange(0, D)
    cells = ((token * KV_HEADS + head) * GROUPS + row % GROUPS)[:, None] * D + offs_d[None, :]
    q = tl.load(query_ptr + cells)
    last = tl.minimum(tl.load(visible_ptr + token * WIDTH + WIDTH - 1), C - 1).to(tl.int32)
    end = tl.max(last, axis=0) + 1
    if HAS_FIRST:
        first = tl.maximum(tl.load(visible_ptr + token * WIDTH), 0).to(tl.int32)
        start = tl.min(first, axis=0)
        begin = start // BLOCK_N * BLOCK_N
        middle = begin
    else:
        first = last
        start = 0
        begin = 0
        middle = (tl.min(last, axis=0) + 1) // BLOCK_N * BLOCK_N
    UNIT: tl.constexpr = SCALING * 1.4426950408889634  # log2(e)
    best = tl.full((BLOCK_M,), -1e30, dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, D), dtype=tl.float32)
    for at in tl.range(begin, middle, BLOCK_N, num_stages=STAGES):
        best, total, acc = attend(
            q, key_ptr, value_ptr, at, start, end, first, last, best, total, acc, UNIT, D, BLOCK_N, False, False, PTX
        )
    for at in tl.range(middle, end, BLOCK_N, num_stages=STAGES):
        best, total, acc = attend(
            q, key_ptr, value_ptr, at, start, end, first, last, best, total, acc, UNIT, D, BLOCK_N, True, HAS_FIRST, PTX
        )
    out = acc / total[:, None]
    tl.store(out_ptr + cells, to_bf16(out, PTX), mask=(row < T * GROUPS)[:, None])


@triton.jit
def choose_experts(
    logits, E: tl.constexpr, E_POW2: tl.constexpr, TOP_K: tl.constexpr, K_POW2: tl.constexpr, BLOCK_T: tl.constexpr
):  # fmt: skip
    """The TOP_K largest logits of each token, largest first: weights fp32 and ids int64, [BLOCK_T, K_POW2] each.

    Of equal logits, that of the lower expert comes first. NaN ranks as infinity: TOP_K different experts are chosen for
    any logits, and the weights are NaN. A key of 64 bits holds a logit, mapped to an integer in the same order, above
    the expert's number, counted from the end: keys differ from each other, so the largest one is one expert.

    Args:
        logits: fp32 [BLOCK_T, E_POW2].
    """
    expert, place = tl.arange(0, E_POW2), tl.arange(0, K_POW2)
    bits = (tl.where(logits == logits, logits, float("inf")) + 0.0).to(tl.int32, bitcast=True)  # -0 + 0 = 0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = (ordered.to(tl.int64) << 32) | (E_POW2 - 1 - expert)[None, :]
    keys = tl.where((expert < E)[None, :], keys, -(2**63))
    chosen = tl.full((BLOCK_T, K_POW2), -(2**63), dtype=tl.int64)
    for k in tl.static_range(TOP_K):
        largest = tl.max(keys, axis=1)[:, None]
        chosen = tl.where((place == k)[None, :], largest, chosen)
        keys = tl.where(keys == largest, -(2**63), keys)
    ordered = (chosen >> 32).to(tl.int32)
    values = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    values = tl.where((place < TOP_K)[None, :], values, -float("inf"))
    shares = tl.exp(values - tl.max(values, axis=1)[:, None])
    weights = shares / tl.sum(shares, axis=1)[:, None]
    return weights, E_POW2 - 1 - (chosen & 0x7FFFFFFF)


@triton.jit
def moe_top_experts(
    logits_ptr,  # float [T, E]
    weights_ptr,  # fp32 [T, TOP_K]
    ids_ptr,  # int64 [T, TOP_K]
    T,
    E: tl.constexpr, E_POW2: tl.constexpr, TOP_K: tl.constexpr, K_POW2: tl.constexpr, BLOCK_T: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """`choose_experts` for BLOCK_T tokens a program."""
    zero = launches_before(False, PTX)
    logits_ptr += zero
    weights_ptr += zero
    ids_ptr += zero
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert, place = tl.arange(0, E_POW2), tl.arange(0, K_POW2)
    real = (token < T)[:, None] & (expert < E)[None, :]
    logits = tl.load(logits_ptr + token[:, None] * E + expert[None, :], mask=real, other=0.0).to(tl.float32)
    weights, ids = choose_experts(logits, E, E_POW2, TOP_K, K_POW2, BLOCK_T)
    cells = token[:, None] * TOP_K + place[None, :]
    wanted = (token < T)[:, None] & (place < TOP_K)[None, :]
    tl.store(weights_ptr + cells, weights, mask=wanted)
    tl.store(ids_ptr + cells, ids, mask=wanted)


@triton.jit
def moe_residual_norm(
    hidden_ptr, update_ptr,  # bf16 [T, H]
    norm_ptr,  # float [H]
    sum_ptr, normed_ptr,  # bf16 [T, H]
    EPS: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """hidden + update, rounded to bf16, and its RMS norm; program i does token i."""
    offs = tl.arange(0, BLOCK_H)
    inside = offs < H
    norm = tl.load(norm_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    zero = launches_before(False, PTX)
    cells = tl.program_id(0).to(tl.int64) * H + offs + zero
    hidden = tl.load(hidden_ptr + cells, mask=inside, other=0.0).to(tl.float32)
    update = tl.load(update_ptr + cells, mask=inside, other=0.0).to(tl.float32)
    x = bf16_round(hidden + update, PTX)
    tl.store(sum_ptr + cells, to_bf16(x, PTX), mask=inside)
    x = x * tl.rsqrt(tl.sum(x * x, axis=0) / H + EPS) * norm
    tl.store(normed_ptr + cells, to_bf16(x, PTX), mask=inside)
