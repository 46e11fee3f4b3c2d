"""What stands around the experts of a decoder layer, for one token: two operators of two launches each, and one of one.

A decode step at batch 1 is a chain of short kernels, each of which costs its launch. `attention_of_one` is norm, the
projection of query, key and value, their norm and rotation, and attention over the cache; `route_one` is the output
projection with the residual, norm, the router's product, top-k and the softmax; `linear_of_one` is a matrix-vector
product alone. In the first two, the last program of the second launch to arrive puts together what all of them wrote,
in fixed order: the same input gives the same bits. What counts the arrivals is set to zero by the first launch.

Letters: H hidden size, D head_dim, G query heads to a key/value head, C positions in the cache, E experts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._device import to_bf16


@triton.jit
def bf16_round(x, PTX: tl.constexpr):
    """fp32 -> the nearest bf16, as fp32."""
    return to_bf16(x, PTX).to(tl.float32)


@triton.jit
def moe_row_matvec(
    x_ptr,  # bf16 [K]
    add_ptr,  # bf16 [K], HAS_ADD only: x + add is what is multiplied
    norm_ptr,  # bf16 [K], HAS_NORM only: weight of the RMS norm
    w_ptr,  # int8 or bf16 [N, K]
    scale_ptr,  # fp32 [N], HAS_SCALE only
    residual_ptr,  # bf16 [N], HAS_RESIDUAL only
    sum_ptr,  # bf16 [K], HAS_NORM only: x + add
    out_ptr,  # bf16 [N]
    arrivals_ptr,  # int32 [NUM_ARRIVALS], set to zero
    EPS: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NUM_ARRIVALS: tl.constexpr,
    HAS_ADD: tl.constexpr, HAS_NORM: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """out = W @ norm(x + add) * scale + residual; program i does rows [i * BLOCK_N, (i + 1) * BLOCK_N).

    The norm's factor is one number, so it is applied to the sums: the weights need not wait for it.
    """
    program = tl.program_id(0)
    offs_n = program * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = offs_n < N
    acc = tl.zeros((BLOCK_N,), dtype=tl.float32)
    squares = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for step in tl.static_range((K + BLOCK_K - 1) // BLOCK_K):
        offs_k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = offs_k < K
        w = tl.load(w_ptr + offs_n[:, None] * K + offs_k[None, :], mask=rows[:, None] & inside[None, :], other=0)
        x = tl.load(x_ptr + offs_k, mask=inside, other=0.0).to(tl.float32)
        if HAS_ADD:
            x = bf16_round(x + tl.load(add_ptr + offs_k, mask=inside, other=0.0).to(tl.float32), PTX)
        if HAS_NORM:
            tl.store(sum_ptr + offs_k, to_bf16(x, PTX), mask=inside & (program == 0))
            squares += x * x
            x *= tl.load(norm_ptr + offs_k, mask=inside, other=0.0).to(tl.float32)
        acc += tl.sum(w.to(tl.float32) * x[None, :], axis=1)
    if HAS_NORM:
        acc *= tl.rsqrt(tl.sum(squares, axis=0) / K + EPS)
    if HAS_SCALE:
        acc *= tl.load(scale_ptr + offs_n, mask=rows, other=0.0)
    if HAS_RESIDUAL:
        acc = bf16_round(acc, PTX) + tl.load(residual_ptr + offs_n, mask=rows, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs_n, to_bf16(acc, PTX), mask=rows)
    if NUM_ARRIVALS > 0:
        arrivals = tl.arange(0, NUM_ARRIVALS)
        tl.store(arrivals_ptr + arrivals, tl.zeros_like(arrivals), mask=(arrivals >= 0) & (program == 0))


@triton.jit
def normed_and_turned(
    low, high, norm_ptr, cos_ptr, sin_ptr, EPS: tl.constexpr, HALF: tl.constexpr, PTX: tl.constexpr
):  # fmt: skip
    """RMS norm and rotation of rows given as two halves, fp32 [R, D/2] each; rounded to bf16 once, held as fp32.

    The rotation of (a, b) is (a cos - b sin, b cos + a sin).
    """
    offs = tl.arange(0, HALF)
    factor = tl.rsqrt((tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)) / (2 * HALF) + EPS)[:, None]
    low = low * factor * tl.load(norm_ptr + offs).to(tl.float32)[None, :]
    high = high * factor * tl.load(norm_ptr + HALF + offs).to(tl.float32)[None, :]
    cos_low, cos_high = tl.load(cos_ptr + offs).to(tl.float32), tl.load(cos_ptr + HALF + offs).to(tl.float32)
    sin_low, sin_high = tl.load(sin_ptr + offs).to(tl.float32), tl.load(sin_ptr + HALF + offs).to(tl.float32)
    first = low * cos_low[None, :] - high * sin_low[None, :]
    second = high * cos_high[None, :] + low * sin_high[None, :]
    return bf16_round(first, PTX), bf16_round(second, PTX)


@triton.jit
def dot_bf16(a, b, acc, PTX: tl.constexpr):
    """acc + a @ b of bf16 operands, fp32 accumulator."""
    if PTX:
        return tl.dot(a, b, acc)
    else:  # the interpreter multiplies raw bf16 bits; fp32 holds the same values
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")


@triton.jit
def load_positions(key_ptr, value_ptr, first, end, HALF: tl.constexpr, BLOCK_T: tl.constexpr):
    """Keys of BLOCK_T positions from `first` on as two halves, bf16 [BLOCK_T, D/2], and values, [BLOCK_T, D]."""
    D: tl.constexpr = 2 * HALF
    offs_t = first + tl.arange(0, BLOCK_T)
    seen = (offs_t < end)[:, None]
    offs_h, offs_d = tl.arange(0, HALF), tl.arange(0, D)
    k_low = tl.load(key_ptr + offs_t[:, None] * D + offs_h[None, :], mask=seen, other=0.0)
    k_high = tl.load(key_ptr + offs_t[:, None] * D + offs_h[None, :] + HALF, mask=seen, other=0.0)
    v = tl.load(value_ptr + offs_t[:, None] * D + offs_d[None, :], mask=seen, other=0.0)
    return k_low, k_high, v


@triton.jit
def moe_row_attention(
    qkv_ptr,  # bf16 [(KV_HEADS * G + 2 * KV_HEADS) * D]: query heads, key heads, value heads
    q_norm_ptr, k_norm_ptr,  # bf16 [D]
    cos_ptr, sin_ptr,  # float [D]
    position_ptr,  # int64 [1]
    key_ptr, value_ptr,  # bf16 [KV_HEADS, C, D]: positions before this one
    new_ptr,  # bf16 [2, KV_HEADS, D]: this position's key and value, for the cache
    partial_ptr,  # fp32 [SPLITS, KV_HEADS * G, D]: of each split, not yet divided
    max_ptr, sum_ptr,  # fp32 [SPLITS, KV_HEADS * G]
    arrivals_ptr,  # int32 [KV_HEADS], zero
    out_ptr,  # bf16 [KV_HEADS * G * D]
    SCALING: tl.constexpr, EPS: tl.constexpr,
    C: tl.constexpr, KV_HEADS: tl.constexpr, GROUPS: tl.constexpr, G_POW2: tl.constexpr, G_PAD: tl.constexpr,
    HALF: tl.constexpr, SPLITS: tl.constexpr, BLOCK_T: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Attention of one token: program (key/value head, split) does one part of the positions that were written.

    The first split also has the token itself, whose key and value are not in the cache yet.
    """
    head, split = tl.program_id(0), tl.program_id(1)
    D: tl.constexpr = 2 * HALF
    HEADS: tl.constexpr = KV_HEADS * GROUPS
    length = tl.minimum(tl.load(position_ptr), C).to(tl.int32)  # positions in the cache
    group = tl.arange(0, G_PAD)
    real = group < GROUPS
    offs_h, offs_d = tl.arange(0, HALF), tl.arange(0, D)

    part = ((length + SPLITS - 1) // SPLITS + 15) // 16 * 16
    start = split * part
    end = tl.minimum(start + part, length)
    key_ptr += head * C * D
    value_ptr += head * C * D
    # The first keys and values are on their way while the query is made ready.
    k_low, k_high, v = load_positions(key_ptr, value_ptr, start, end, HALF, BLOCK_T)

    q_rows = (head * GROUPS + group)[:, None] * D + offs_h[None, :]
    q_low = tl.load(qkv_ptr + q_rows, mask=real[:, None], other=0.0).to(tl.float32)
    q_high = tl.load(qkv_ptr + q_rows + HALF, mask=real[:, None], other=0.0).to(tl.float32)
    q_low, q_high = normed_and_turned(q_low, q_high, q_norm_ptr, cos_ptr, sin_ptr, EPS, HALF, PTX)

    best = tl.full((G_PAD,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((G_PAD,), dtype=tl.float32)
    acc = tl.zeros((G_PAD, D), dtype=tl.float32)
    if split == 0:
        one = tl.arange(0, 1)
        k_rows = (HEADS + head + one)[:, None] * D + offs_h[None, :]
        new_low = tl.load(qkv_ptr + k_rows).to(tl.float32)
        new_high = tl.load(qkv_ptr + k_rows + HALF).to(tl.float32)
        new_low, new_high = normed_and_turned(new_low, new_high, k_norm_ptr, cos_ptr, sin_ptr, EPS, HALF, PTX)
        new_v = tl.load(qkv_ptr + (HEADS + KV_HEADS + head) * D + offs_d)
        new_rows = (head + one)[:, None] * D + offs_h[None, :]
        tl.store(new_ptr + new_rows, to_bf16(new_low, PTX))
        tl.store(new_ptr + new_rows + HALF, to_bf16(new_high, PTX))
        tl.store(new_ptr + (KV_HEADS + head) * D + offs_d, new_v)
        best = (tl.sum(q_low * new_low, axis=1) + tl.sum(q_high * new_high, axis=1)) * SCALING
        total += 1.0
        acc += new_v.to(tl.float32)[None, :]

    q_low, q_high = to_bf16(q_low, PTX), to_bf16(q_high, PTX)
    for first in tl.range(start, end, BLOCK_T, num_stages=1):
        seen = first + tl.arange(0, BLOCK_T) < end
        scores = dot_bf16(q_low, k_low.trans(), tl.zeros((G_PAD, BLOCK_T), dtype=tl.float32), PTX)
        scores = dot_bf16(q_high, k_high.trans(), scores, PTX) * SCALING
        scores = tl.where(seen[None, :], scores, -float("inf"))
        higher = tl.maximum(best, tl.max(scores, axis=1))  # finite: a tile has a position that is seen
        weights = tl.exp(scores - higher[:, None])
        shrink = tl.exp(best - higher)
        total = total * shrink + tl.sum(weights, axis=1)
        acc = dot_bf16(to_bf16(weights, PTX), v, acc * shrink[:, None], PTX)
        best = higher
        k_low, k_high, v = load_positions(key_ptr, value_ptr, first + BLOCK_T, end, HALF, BLOCK_T)

    rows = split * HEADS + head * GROUPS + group
    tl.store(partial_ptr + rows[:, None] * D + offs_d[None, :], acc, mask=real[:, None])
    tl.store(max_ptr + rows, best, mask=real)
    tl.store(sum_ptr + rows, total, mask=real)
    tl.debug_barrier()  # all threads' stores before the one thread's release
    arrived = tl.atomic_add(arrivals_ptr + head, 1, sem="acq_rel", scope="gpu")
    if arrived == SPLITS - 1:
        # All of it at once: one after the other, each split would cost a trip to L2. .cg: it was written by others.
        query = tl.arange(0, G_POW2)
        mine = query < GROUPS
        every = tl.arange(0, SPLITS)[:, None] * HEADS + (head * GROUPS + query)[None, :]
        maxima = tl.load(max_ptr + every, mask=mine[None, :], other=0.0, cache_modifier=".cg")
        sums = tl.load(sum_ptr + every, mask=mine[None, :], other=1.0, cache_modifier=".cg")
        cells = every[:, :, None] * D + offs_d[None, None, :]
        parts = tl.load(partial_ptr + cells, mask=mine[None, :, None], other=0.0, cache_modifier=".cg")
        factors = tl.exp(maxima - tl.max(maxima, axis=0)[None, :])
        result = tl.sum(parts * factors[:, :, None], axis=0) / tl.sum(sums * factors, axis=0)[:, None]
        out_rows = (head * GROUPS + query)[:, None] * D + offs_d[None, :]
        tl.store(out_ptr + out_rows, to_bf16(result, PTX), mask=mine[:, None])


@triton.jit
def moe_row_router(
    x_ptr,  # bf16 [H]
    norm_ptr,  # bf16 [H]
    w_ptr,  # bf16 [E, H]
    normed_ptr,  # bf16 [H]: the experts' input
    logits_ptr,  # fp32 [E]
    arrivals_ptr,  # int32 [1], zero
    weights_ptr,  # fp32 [TOP_K]
    ids_ptr,  # int64 [TOP_K]
    EPS: tl.constexpr,
    H: tl.constexpr, E: tl.constexpr, E_POW2: tl.constexpr, TOP_K: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr, RANK_BLOCK: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """RMS norm, logits of BLOCK_E experts a program, then top-k and the softmax over the chosen by the last program.

    Logits are rounded to bf16, as a linear layer gives them; of equal ones the lower expert comes first.
    """
    program = tl.program_id(0)
    PROGRAMS: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    offs_h = tl.arange(0, BLOCK_H)
    inside = offs_h < H
    offs_e = program * BLOCK_E + tl.arange(0, BLOCK_E)
    rows = offs_e < E
    w = tl.load(w_ptr + offs_e[:, None] * H + offs_h[None, :], mask=rows[:, None] & inside[None, :], other=0.0)
    x = tl.load(x_ptr + offs_h, mask=inside, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(x * x, axis=0) / H + EPS)
    x = bf16_round(x * factor * tl.load(norm_ptr + offs_h, mask=inside, other=0.0).to(tl.float32), PTX)
    tl.store(normed_ptr + offs_h, to_bf16(x, PTX), mask=inside & (program == 0))
    logits = tl.sum(w.to(tl.float32) * x[None, :], axis=1)
    tl.store(logits_ptr + offs_e, bf16_round(logits, PTX), mask=rows)
    tl.debug_barrier()
    arrived = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel", scope="gpu")
    if arrived == PROGRAMS - 1:
        expert = tl.arange(0, E_POW2)
        mine = tl.load(logits_ptr + expert, mask=expert < E, other=-float("inf"), cache_modifier=".cg")
        # The place of an expert is how many come before it: one comparison with all, no chain of top_k maxima.
        place = tl.zeros((E_POW2,), dtype=tl.int32)
        for first in tl.static_range(0, E_POW2, RANK_BLOCK):
            other = first + tl.arange(0, RANK_BLOCK)
            theirs = tl.load(logits_ptr + other, mask=other < E, other=-float("inf"), cache_modifier=".cg")
            before = theirs[:, None] > mine[None, :]
            before = before | ((theirs[:, None] == mine[None, :]) & (other[:, None] < expert[None, :]))
            place += tl.sum(before.to(tl.int32), axis=0)
        chosen = (place < TOP_K) & (expert < E)
        share = tl.where(chosen, tl.exp(mine - tl.max(mine, axis=0)), 0.0)
        tl.store(weights_ptr + place, share / tl.sum(share, axis=0), mask=chosen)
        tl.store(ids_ptr + place, expert.to(tl.int64), mask=chosen)
