"""The attention of one token: the second launch of `one_token_attention`. The first is `moe_one_token_matvec`.

Letters: D head_dim, G query heads of a key/value head, C positions of the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from executorch_moe.kernels._device import bf16_round, dot_bf16, launches_before, to_bf16


@triton.jit
def load_halves(ptr, HALF: tl.constexpr):
    """A vector of one head as two halves, fp32 [1, D/2] each."""
    offs = tl.arange(0, HALF)[None, :]
    return tl.load(ptr + offs).to(tl.float32), tl.load(ptr + HALF + offs).to(tl.float32)


@triton.jit
def norm_and_rotate(
    low, high, norm_low, norm_high, cos_ptr, sin_ptr, EPS: tl.constexpr, HALF: tl.constexpr, PTX: tl.constexpr
):  # fmt: skip
    """RMS norm and rotation of rows in two halves, fp32 [R, D/2] each; rounded to bf16 once and returned as fp32.

    The rotation of (a, b) is (a cos - b sin, b cos + a sin).
    """
    offs = tl.arange(0, HALF)[None, :]
    cos = tl.load(cos_ptr + offs).to(tl.float32)
    sin = tl.load(sin_ptr + offs).to(tl.float32)
    factor = tl.rsqrt((tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)) / (2 * HALF) + EPS)[:, None]
    low = low * factor * norm_low
    high = high * factor * norm_high
    first = low * cos - high * sin
    second = high * cos + low * sin
    return bf16_round(first, PTX), bf16_round(second, PTX)


@triton.jit
def load_keys(key_ptr, first, end, HALF: tl.constexpr, BLOCK_T: tl.constexpr):
    """Keys of BLOCK_T positions from `first` on as two halves, bf16 [BLOCK_T, D/2] each."""
    offs_t = first + tl.arange(0, BLOCK_T)
    offs = offs_t[:, None] * (2 * HALF) + tl.arange(0, HALF)[None, :]
    seen = (offs_t < end)[:, None]
    return tl.load(key_ptr + offs, mask=seen, other=0.0), tl.load(key_ptr + offs + HALF, mask=seen, other=0.0)


@triton.jit
def load_values(value_ptr, first, end, D: tl.constexpr, BLOCK_T: tl.constexpr):
    """Values of BLOCK_T positions from `first` on, bf16 [BLOCK_T, D]."""
    offs_t = first + tl.arange(0, BLOCK_T)
    offs = offs_t[:, None] * D + tl.arange(0, D)[None, :]
    return tl.load(value_ptr + offs, mask=(offs_t < end)[:, None], other=0.0)


@triton.jit
def combine_parts(
    head, parts, gate_row, qkv_ptr, partial_ptr, log_ptr, arrivals_ptr, out_ptr,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, G_POW2: tl.constexpr, D: tl.constexpr, AT_ONCE: tl.constexpr,
    GATED: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """The last program of a key/value head combines its parts 0..parts - 1, AT_ONCE at a time.

    A thread has the same elements of every part, so nothing is summed across threads, and the loads of AT_ONCE parts
    can be in flight at once.

    Args:
        gate_row: row of `qkv_ptr` with the first gate, GATED only.
        partial_ptr: fp32 [parts, HEADS, D], results of the parts. log_ptr: fp32 [parts, HEADS], logarithms of the sums
            of their weights.
    """
    tl.debug_barrier()  # the stores of all threads must precede the release by one thread
    arrived = tl.atomic_add(arrivals_ptr + head, 1, sem="acq_rel", scope="gpu")
    if arrived == parts - 1:
        near = tl.arange(0, G_POW2)
        query = head * GROUPS + near
        cells = query[:, None] * D + tl.arange(0, D)[None, :]
        best = tl.full((G_POW2,), -float("inf"), dtype=tl.float32)
        total = tl.zeros((G_POW2,), dtype=tl.float32)
        result = tl.zeros((G_POW2, D), dtype=tl.float32)
        # .cg: other programs wrote this; L1 may be stale, L2 is not.
        for first in tl.range(0, parts, AT_ONCE, num_stages=1):
            higher = best
            for i in tl.static_range(AT_ONCE):
                mine = (near < GROUPS) & (first + i < parts)
                place = log_ptr + (first + i) * HEADS + query
                higher = tl.maximum(higher, tl.load(place, mask=mine, other=-float("inf"), cache_modifier=".cg"))
            known = tl.where(near < GROUPS, higher, 0.0)
            shrink = tl.exp(best - known)
            total *= shrink
            result *= shrink[:, None]
            best = higher
            for i in tl.static_range(AT_ONCE):
                mine = (near < GROUPS) & (first + i < parts)
                part = (first + i) * HEADS
                log = tl.load(log_ptr + part + query, mask=mine, other=-float("inf"), cache_modifier=".cg")
                values = tl.load(partial_ptr + part * D + cells, mask=mine[:, None], other=0.0, cache_modifier=".cg")
                factor = tl.exp(log - known)
                total += factor
                result += values * factor[:, None]
        result /= tl.where(near < GROUPS, total, 1.0)[:, None]
        if GATED:
            gates = tl.load(qkv_ptr + gate_row * D + cells, mask=(near < GROUPS)[:, None], other=0.0)
            result /= 1.0 + tl.exp(-gates.to(tl.float32))
        tl.store(out_ptr + cells, to_bf16(result, PTX), mask=(near < GROUPS)[:, None])


@triton.jit
def moe_one_token_attention(
    qkv_ptr,  # bf16 [(KV_HEADS * G + 2 * KV_HEADS) * D]: query heads, key heads, value heads; GATED: and gates of out
    q_norm_ptr, k_norm_ptr,  # bf16 [D]
    cos_ptr, sin_ptr,  # float [D/2]: the angles of both halves are equal
    position_ptr,  # int64 [1]
    key_ptr, value_ptr,  # bf16 [KV_HEADS, C, D]: positions before this one
    new_ptr,  # bf16 [2, KV_HEADS, D]: this position's key and value, for the cache
    partial_ptr,  # fp32 [SPLITS + 1, KV_HEADS * G, D]: results of the parts
    log_ptr,  # fp32 [SPLITS + 1, KV_HEADS * G]: logarithms of the sums of their weights
    arrivals_ptr,  # int32 [KV_HEADS], zero
    out_ptr,  # bf16 [KV_HEADS * G * D]
    SCALING: tl.constexpr, EPS: tl.constexpr,
    C: tl.constexpr, KV_HEADS: tl.constexpr, GROUPS: tl.constexpr, G_POW2: tl.constexpr, G_PAD: tl.constexpr,
    HALF: tl.constexpr, SPLITS: tl.constexpr, BLOCK_T: tl.constexpr, AT_ONCE: tl.constexpr, EARLY: tl.constexpr,
    GATED: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Attention of one token: program (key/value head, part) does every SPLITS-th block of the positions.

    EARLY: a block is requested before the one before it is used; this pays off for programs that have several blocks.

    The last part is the token itself, whose key and value are not in the cache yet. `position`, keys and values are
    read before the wait. They are complete before this kernel can start, whatever wrote them (the cache update of an
    earlier step or of prefill, a kernel that computes the position):
    1. The operator's first launch, `moe_one_token_matvec`, also takes the three tensors and reads them after its wait
       (HAS_AHEAD). Inductor orders launches by their arguments, so each write to them comes before that launch, or, if
       it belongs to this token, after this kernel, which reads them too.
    2. So launches that Inductor may put between `moe_one_token_matvec` and this kernel write none of them.
    3. This kernel starts when all programs of the previous launch have ended or called `launch_dependents`, which our
       kernels do after their own wait, and others never. By then all launches before the previous one have ended, and
       their writes are visible. `moe_one_token_matvec` is the previous launch or has ended: all before it has ended.
    """
    head, part = tl.program_id(0), tl.program_id(1)
    D: tl.constexpr = 2 * HALF
    HEADS: tl.constexpr = KV_HEADS * GROUPS
    group = tl.arange(0, G_PAD)
    real = group < GROUPS
    offs_h, offs_d = tl.arange(0, HALF), tl.arange(0, D)

    # The first keys and values are loaded before the wait for the query.
    length = tl.minimum(tl.load(position_ptr), C).to(tl.int32)  # positions in the cache
    key_ptr += head.to(tl.int64) * (C * D)
    value_ptr += head.to(tl.int64) * (C * D)
    start = part * BLOCK_T
    k_low, k_high = load_keys(key_ptr, start, length, HALF, BLOCK_T)
    v = load_values(value_ptr, start, length, D, BLOCK_T)
    norm_low, norm_high = load_halves(q_norm_ptr, HALF)
    zero = launches_before(True, PTX)
    qkv_ptr += zero
    cos_ptr += zero
    sin_ptr += zero
    arrivals_ptr += zero
    # Only the address keeps stores of constants after the wait.
    new_ptr += zero
    partial_ptr += zero
    log_ptr += zero
    out_ptr += zero

    q_rows = (head * GROUPS + group)[:, None] * D + offs_h[None, :]
    q_low = tl.load(qkv_ptr + q_rows, mask=real[:, None], other=0.0).to(tl.float32)
    q_high = tl.load(qkv_ptr + q_rows + HALF, mask=real[:, None], other=0.0).to(tl.float32)
    q_low, q_high = norm_and_rotate(q_low, q_high, norm_low, norm_high, cos_ptr, sin_ptr, EPS, HALF, PTX)

    # The token itself comes first, so that the parts that have positions are the first ones.
    place = tl.where(part == SPLITS, 0, part + 1)
    parts = 1 + tl.minimum(SPLITS, (length + BLOCK_T - 1) // BLOCK_T)
    rows = place * HEADS + head * GROUPS + group
    if part == SPLITS:
        k_rows = (HEADS + head) * D + offs_h[None, :]
        new_low = tl.load(qkv_ptr + k_rows).to(tl.float32)
        new_high = tl.load(qkv_ptr + k_rows + HALF).to(tl.float32)
        norm_low, norm_high = load_halves(k_norm_ptr, HALF)
        new_low, new_high = norm_and_rotate(new_low, new_high, norm_low, norm_high, cos_ptr, sin_ptr, EPS, HALF, PTX)
        new_v = tl.load(qkv_ptr + (HEADS + KV_HEADS + head) * D + offs_d)
        new_rows = head * D + offs_h[None, :]
        tl.store(new_ptr + new_rows, to_bf16(new_low, PTX))
        tl.store(new_ptr + new_rows + HALF, to_bf16(new_high, PTX))
        tl.store(new_ptr + (KV_HEADS + head) * D + offs_d, new_v)
        score = (tl.sum(q_low * new_low, axis=1) + tl.sum(q_high * new_high, axis=1)) * SCALING
        acc = tl.zeros((G_PAD, D), dtype=tl.float32) + new_v.to(tl.float32)[None, :]
        tl.store(partial_ptr + rows[:, None] * D + offs_d[None, :], acc, mask=real[:, None])
        tl.store(log_ptr + rows, score, mask=real)
    else:
        best = tl.full((G_PAD,), -float("inf"), dtype=tl.float32)
        total = tl.zeros((G_PAD,), dtype=tl.float32)
        acc = tl.zeros((G_PAD, D), dtype=tl.float32)
        q_low_bf16, q_high_bf16 = to_bf16(q_low, PTX), to_bf16(q_high, PTX)
        for first in tl.range(start, length, SPLITS * BLOCK_T, num_stages=1):
            if EARLY:
                next_low, next_high = load_keys(key_ptr, first + SPLITS * BLOCK_T, length, HALF, BLOCK_T)
                next_v = load_values(value_ptr, first + SPLITS * BLOCK_T, length, D, BLOCK_T)
            seen = first + tl.arange(0, BLOCK_T) < length
            scores = dot_bf16(q_low_bf16, k_low.trans(), tl.zeros((G_PAD, BLOCK_T), dtype=tl.float32), PTX)
            scores = dot_bf16(q_high_bf16, k_high.trans(), scores, PTX) * SCALING
            scores = tl.where(seen[None, :], scores, -float("inf"))
            higher = tl.maximum(best, tl.max(scores, axis=1))  # finite: each block has a valid position
            weights = tl.exp(scores - higher[:, None])
            shrink = tl.exp(best - higher)
            total = total * shrink + tl.sum(weights, axis=1)
            acc = dot_bf16(to_bf16(weights, PTX), v, acc * shrink[:, None], PTX)
            best = higher
            if EARLY:
                k_low, k_high, v = next_low, next_high, next_v
            else:
                k_low, k_high = load_keys(key_ptr, first + SPLITS * BLOCK_T, length, HALF, BLOCK_T)
                v = load_values(value_ptr, first + SPLITS * BLOCK_T, length, D, BLOCK_T)
        wanted = real & (start < length)
        total = tl.where(wanted, total, 1.0)
        acc /= total[:, None]
        tl.store(partial_ptr + rows[:, None] * D + offs_d[None, :], acc, mask=wanted[:, None])
        tl.store(log_ptr + rows, best + tl.log(total), mask=wanted)
    if place < parts:
        combine_parts(
            head, parts, HEADS + 2 * KV_HEADS, qkv_ptr, partial_ptr, log_ptr, arrivals_ptr, out_ptr,
            HEADS, GROUPS, G_POW2, D, AT_ONCE, GATED, PTX,
        )  # fmt: skip
