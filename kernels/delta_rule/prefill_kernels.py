"""The delta rule for several tokens, in chunks of 64: four launches.

    moe_delta_rule_inputs  convolution, SiLU, norms of query and key, gates             each (chunk, head)
    moe_delta_rule_chunk   how the tokens of a chunk act on each other; V becomes U     each (chunk, value head)
    moe_delta_rule_state   the state from chunk to chunk; U becomes the new values N    each (value head, columns)
    moe_delta_rule_output  query @ state, attention inside the chunk, gated norm        each (chunk, value head)

For one chunk let G_i be the sum of the logarithms of the decays up to token i, and S the state before it. The values
N_i that token i adds to the state as k_i N_i solve a triangular system (the WY form of a product of Householder-like
matrices):
    A_ij = beta_i exp(G_i - G_j) k_i.k_j for j < i        X = (I + A)^-1
    U = X diag(beta) V                                    W = X diag(beta exp(G)) K
    N = U - W S                                           S' = exp(G_last) S + sum_i exp(G_last - G_i) k_i N_i
    o_i = exp(G_i) q_i S + sum_{j <= i} exp(G_i - G_j) (q_i.k_j) N_j
All exponents are at most 0. Sums and states are fp32; operands of tensor cores have the number format of the layer.

Source: "Gated Delta Networks: Improving Mamba2 with Delta Rule" (Yang, Kautz, Hatamizadeh, 2024), section 3.3, and
"Parallelizing Linear Transformers with the Delta Rule over Sequence Length" (Yang et al., 2024), sections 3.2 and 3.3.

Letters: as in op.py; chunks are padded with zeros, R is the number of tokens with the padding.
"""

from __future__ import annotations

import triton
import triton.language as tl

from executorch_moe.kernels._device import launches_before

from .device import dot, eliminated, log_decay, merged, rounded, silu


@triton.jit
def convolved(
    projected_ptr, conv_ptr, weight_ptr, channels, chunk, first, position, T,
    P: tl.constexpr, C: tl.constexpr, K: tl.constexpr, K_POW2: tl.constexpr, CHUNK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """SiLU of the convolution at the TOKENS tokens from `first` on of a chunk, fp32 [TOKENS, channels]; 0 beyond T."""
    taps = tl.arange(0, K_POW2)[None, :]
    weights = tl.load(weight_ptr + channels[:, None] * K + taps, mask=taps < K, other=0.0).to(tl.float32)
    chunk_ptr = projected_ptr + (chunk * CHUNK).to(tl.int64) * P
    times = first + tl.arange(0, TOKENS)
    total = tl.zeros((TOKENS, channels.shape[0]), dtype=tl.float32)
    for tap in tl.static_range(K):
        # From one load for all taps: loads with a stride of K would take longer than those of the tokens.
        weight = tl.sum(tl.where(taps == tap, weights, 0.0), axis=1)
        time = times - (K - 1 - tap)
        here = (chunk * CHUNK + time >= 0) & (chunk * CHUNK + time < T)
        x = tl.load(chunk_ptr + (time[:, None] * P + channels[None, :]), mask=here[:, None], other=0.0).to(tl.float32)
        total += x * weight[None, :]
    if (chunk == 0) & (first == 0):
        for tap in tl.static_range(K - 1):
            weight = tl.sum(tl.where(taps == tap, weights, 0.0), axis=1)
            time = times - (K - 1 - tap)
            past = (time < 0) & (position + time >= 0)
            slot = tl.where(past, (position + time) % K, 0).to(tl.int32)
            kept = tl.load(conv_ptr + (slot[:, None] * C + channels[None, :]), mask=past[:, None], other=0.0)
            total += kept.to(tl.float32) * weight[None, :]
    return tl.where((chunk * CHUNK + times < T)[:, None], silu(total), 0.0)


@triton.jit
def moe_delta_rule_inputs(
    projected_ptr,  # [T, P]: query, key, value, z, b, a
    weight_ptr,  # [C, K], of the convolution
    dt_bias_ptr, a_log_ptr,  # [HV]
    position_ptr,  # int64 [1]
    conv_ptr,  # [K, C]
    qk_ptr,  # [2 * HK, R, DK]: queries, then keys
    v_ptr,  # [HV, R, DV]
    decay_ptr, beta_ptr,  # fp32 [HV, R]: G and beta
    T,
    SCALE: tl.constexpr,
    HK: tl.constexpr, HV: tl.constexpr, HV_POW2: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    K: tl.constexpr, K_POW2: tl.constexpr, CHUNK: tl.constexpr, TOKENS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Program (i, j): queries, keys or values of head j in chunk i; the last j is that of the gates of all heads."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    C: tl.constexpr = 2 * HK * DK + HV * DV
    P: tl.constexpr = C + HV * DV + 2 * HV
    rows = tl.num_programs(0) * CHUNK
    zero = launches_before(False, PTX)
    projected_ptr += zero
    conv_ptr += zero
    qk_ptr += zero
    v_ptr += zero
    decay_ptr += zero
    beta_ptr += zero
    position = tl.load(position_ptr + zero)
    if head < 2 * HK:
        key_channels = head * DK + tl.arange(0, DK)
        qk_ptr += (head.to(tl.int64) * rows + chunk * CHUNK) * DK
        for first in range(0, CHUNK, TOKENS):
            x = convolved(
                projected_ptr, conv_ptr, weight_ptr, key_channels, chunk, first, position, T,
                P, C, K, K_POW2, CHUNK, TOKENS,
            )  # fmt: skip
            x *= (tl.rsqrt(tl.sum(x * x, axis=1) + 1e-6) * tl.where(head < HK, SCALE, 1.0))[:, None]
            cells = (first + tl.arange(0, TOKENS))[:, None] * DK + tl.arange(0, DK)[None, :]
            tl.store(qk_ptr + cells, rounded(x, qk_ptr, PTX))
    elif head < 2 * HK + HV:
        value_head = head - 2 * HK
        value_channels = 2 * HK * DK + value_head * DV + tl.arange(0, DV)
        v_ptr += (value_head.to(tl.int64) * rows + chunk * CHUNK) * DV
        for first in range(0, CHUNK, TOKENS):
            v = convolved(
                projected_ptr, conv_ptr, weight_ptr, value_channels, chunk, first, position, T,
                P, C, K, K_POW2, CHUNK, TOKENS,
            )  # fmt: skip
            value_cells = (first + tl.arange(0, TOKENS))[:, None] * DV + tl.arange(0, DV)[None, :]
            tl.store(v_ptr + value_cells, rounded(v, v_ptr, PTX))
    else:
        times = chunk * CHUNK + tl.arange(0, CHUNK)
        heads = tl.arange(0, HV_POW2)
        real = (times < T)[:, None] & (heads < HV)[None, :]
        gates_ptr = projected_ptr + (times.to(tl.int64)[:, None] * P + (C + HV * DV + heads)[None, :])
        b = tl.load(gates_ptr, mask=real, other=0.0).to(tl.float32)
        a = tl.load(gates_ptr + HV, mask=real, other=0.0).to(tl.float32)
        dt_bias = tl.load(dt_bias_ptr + heads, mask=heads < HV, other=0.0).to(tl.float32)
        a_log = tl.load(a_log_ptr + heads, mask=heads < HV, other=0.0).to(tl.float32)
        log_decays = tl.where(real, log_decay(a, dt_bias[None, :], a_log[None, :]), 0.0)
        beta = tl.where(real, 1.0 / (1.0 + tl.exp(-b)), 0.0)
        gate_cells = heads.to(tl.int64)[None, :] * rows + times[:, None]
        known = (times >= 0)[:, None] & (heads < HV)[None, :]
        tl.store(decay_ptr + gate_cells, tl.cumsum(log_decays, axis=0), mask=known)
        tl.store(beta_ptr + gate_cells, beta, mask=known)


@triton.jit
def influence(products, decay_i, decay_j, beta_i):
    """A of the head of this module for tokens i after tokens j, from k_i.k_j."""
    return products * tl.exp(decay_i - decay_j) * beta_i


@triton.jit
def moe_delta_rule_chunk(
    qk_ptr,  # [2 * HK, R, DK]
    v_ptr,  # [HV, R, DV]: V, then U
    decay_ptr, beta_ptr,  # fp32 [HV, R]
    w_ptr,  # [HV, R, DK]
    HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    CHUNK: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """W and U of one chunk of 64 tokens and one value head.

    X is never in one tensor. Its blocks of 16 on the diagonal come from elimination, pairs of them become blocks of 32,
    and the remaining block of 32 comes from these two. Powers of A, as in the series I - A + A^2 - ..., would lose all
    precision for keys that are alike. A is computed block by block, because taking blocks out of a tensor is slow.
    """
    tl.static_assert(CHUNK == 64)
    chunk, head = tl.program_id(0), tl.program_id(1)
    rows = tl.num_programs(0) * CHUNK
    offs_k, offs_v, offs_16, offs_32 = tl.arange(0, DK), tl.arange(0, DV), tl.arange(0, 16), tl.arange(0, 32)
    zero = launches_before(False, PTX)
    start = head.to(tl.int64) * rows + chunk * CHUNK
    k_ptr = qk_ptr + zero + ((HK + head // (HV // HK)).to(tl.int64) * rows + chunk * CHUNK) * DK
    decay_ptr += zero + start
    beta_ptr += zero + start
    v_ptr += zero + start * DV
    w_ptr += zero + start * DK

    quarters = tl.arange(0, 4)[:, None] * 16 + offs_16[None, :]
    k = tl.load(k_ptr + quarters[:, :, None] * DK + offs_k[None, None, :])
    decay, beta = tl.load(decay_ptr + quarters), tl.load(beta_ptr + quarters)
    before = offs_16[None, :, None] > offs_16[None, None, :]
    a = dot(k, tl.permute(k, (0, 2, 1)), tl.zeros((4, 16, 16), dtype=tl.float32), PTX)
    apart = tl.where(before, decay[:, :, None] - decay[:, None, :], 0.0)
    a = tl.where(before, influence(a, apart, 0.0, beta[:, :, None]), 0.0)
    early = tl.arange(0, 2)[:, None] * 32 + offs_16[None, :]
    late = early + 16
    k_early = tl.load(k_ptr + early[:, :, None] * DK + offs_k[None, None, :])
    k_late = tl.load(k_ptr + late[:, :, None] * DK + offs_k[None, None, :])
    corner = dot(k_late, tl.permute(k_early, (0, 2, 1)), tl.zeros((2, 16, 16), dtype=tl.float32), PTX)
    decay_early, decay_late = tl.load(decay_ptr + early), tl.load(decay_ptr + late)
    corner = influence(corner, decay_late[:, :, None], decay_early[:, None, :], tl.load(beta_ptr + late)[:, :, None])
    x = merged(eliminated(a), corner, PTX)
    is_first = tl.arange(0, 2)[:, None, None] == 0
    x_first = tl.sum(tl.where(is_first, x, 0.0), axis=0)
    x_second = tl.sum(tl.where(is_first, 0.0, x), axis=0)

    key_cells = offs_32[:, None] * DK + offs_k[None, :]
    k_first, k_second = tl.load(k_ptr + key_cells), tl.load(k_ptr + 32 * DK + key_cells)
    decay_first, decay_second = tl.load(decay_ptr + offs_32), tl.load(decay_ptr + 32 + offs_32)
    beta_first, beta_second = tl.load(beta_ptr + offs_32), tl.load(beta_ptr + 32 + offs_32)
    none = tl.zeros((32, 32), dtype=tl.float32)
    below = influence(
        dot(k_second, tl.trans(k_first), none, PTX), decay_second[:, None], decay_first[None, :], beta_second[:, None]
    )
    x_below = -dot(dot(x_second, below, none, PTX), x_first, none, PTX)

    factor_first, factor_second = beta_first * tl.exp(decay_first), beta_second * tl.exp(decay_second)
    no_keys = tl.zeros((32, DK), dtype=tl.float32)
    w = dot(rounded(x_first * factor_first[None, :], w_ptr, PTX), k_first, no_keys, PTX)
    tl.store(w_ptr + key_cells, rounded(w, w_ptr, PTX))
    w = dot(rounded(x_below * factor_first[None, :], w_ptr, PTX), k_first, no_keys, PTX)
    w = dot(rounded(x_second * factor_second[None, :], w_ptr, PTX), k_second, w, PTX)
    tl.store(w_ptr + 32 * DK + key_cells, rounded(w, w_ptr, PTX))

    value_cells = offs_32[:, None] * DV + offs_v[None, :]
    v_first, v_second = tl.load(v_ptr + value_cells), tl.load(v_ptr + 32 * DV + value_cells)
    no_values = tl.zeros((32, DV), dtype=tl.float32)
    u = dot(rounded(x_first * beta_first[None, :], v_ptr, PTX), v_first, no_values, PTX)
    tl.store(v_ptr + value_cells, rounded(u, v_ptr, PTX))
    u = dot(rounded(x_below * beta_first[None, :], v_ptr, PTX), v_first, no_values, PTX)
    u = dot(rounded(x_second * beta_second[None, :], v_ptr, PTX), v_second, u, PTX)
    tl.store(v_ptr + 32 * DV + value_cells, rounded(u, v_ptr, PTX))


@triton.jit
def moe_delta_rule_state(
    projected_ptr,  # [T, P]
    qk_ptr,  # [2 * HK, R, DK]
    decay_ptr,  # fp32 [HV, R]
    w_ptr,  # [HV, R, DK]
    u_ptr,  # [HV, R, DV]: U, then N
    position_ptr,  # int64 [1]
    new_conv_ptr,  # [K, C]
    state_ptr, new_state_ptr,  # fp32 [HV, DK, DV]; may be the same
    states_ptr,  # [HV, R / CHUNK, DK, DV]: the state before each chunk
    T,
    HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, K: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """BLOCK_V columns of the state of one value head through all chunks, and BLOCK_C columns of the new conv_state."""
    head, block = tl.program_id(0), tl.program_id(1)
    C: tl.constexpr = 2 * HK * DK + HV * DV
    P: tl.constexpr = C + HV * DV + 2 * HV
    chunks = (T + CHUNK - 1) // CHUNK
    offs_t, offs_k = tl.arange(0, CHUNK), tl.arange(0, DK)
    offs_v = block * BLOCK_V + tl.arange(0, BLOCK_V)
    key_cells = offs_t[:, None] * DK + offs_k[None, :]
    value_cells = offs_t[:, None] * DV + offs_v[None, :]
    state_cells = offs_k[:, None] * DV + offs_v[None, :]
    zero = launches_before(False, PTX)
    projected_ptr += zero
    u_ptr += zero
    new_conv_ptr += zero
    new_state_ptr += zero
    states_ptr += zero
    position = tl.load(position_ptr + zero)
    state = tl.load(state_ptr + zero + head * (DK * DV) + state_cells)
    state = tl.where(position == 0, 0.0, state)
    start = head.to(tl.int64) * (chunks * CHUNK)
    decay_ptr += zero + start
    w_ptr += zero + start * DK
    u_ptr += start * DV
    qk_ptr += zero + (HK + head // (HV // HK)).to(tl.int64) * (chunks * CHUNK) * DK
    states_ptr += head.to(tl.int64) * chunks * (DK * DV)
    for _ in tl.range(0, chunks, num_stages=STAGES):
        operand = rounded(state, states_ptr, PTX)
        tl.store(states_ptr + state_cells, operand)
        w = tl.load(w_ptr + key_cells)
        k = tl.load(qk_ptr + key_cells)
        u = tl.load(u_ptr + value_cells).to(tl.float32)
        decay = tl.load(decay_ptr + offs_t)
        last = tl.load(decay_ptr + (CHUNK - 1))
        new = u - dot(w, operand, tl.zeros((CHUNK, BLOCK_V), dtype=tl.float32), PTX)
        tl.store(u_ptr + value_cells, rounded(new, u_ptr, PTX))
        new *= tl.exp(last - decay)[:, None]
        state = dot(tl.trans(k), rounded(new, u_ptr, PTX), state * tl.exp(last), PTX)
        w_ptr += CHUNK * DK
        qk_ptr += CHUNK * DK
        u_ptr += CHUNK * DV
        decay_ptr += CHUNK
        states_ptr += DK * DV
    tl.store(new_state_ptr + head * (DK * DV) + state_cells, state)

    # The last K tokens, into the rows of their positions; zeros into rows of positions below 0.
    channels = (head * (DV // BLOCK_V) + block) * BLOCK_C + tl.arange(0, BLOCK_C)
    for ago in tl.static_range(K):
        time = T - 1 - ago
        row = ((position + time + K) % K).to(tl.int32)
        x = tl.load(projected_ptr + time.to(tl.int64) * P + channels, mask=(channels < C) & (time >= 0), other=0.0)
        changed = (channels < C) & ((time >= 0) | (position + time < 0))
        tl.store(new_conv_ptr + row * C + channels, x, mask=changed)


@triton.jit
def moe_delta_rule_output(
    projected_ptr,  # [T, P]
    norm_ptr,  # [DV]
    qk_ptr,  # [2 * HK, R, DK]
    decay_ptr,  # fp32 [HV, R]
    new_ptr,  # [HV, R, DV]: N
    states_ptr,  # [HV, R / CHUNK, DK, DV]
    out_ptr,  # [T, HV * DV]
    T,
    EPS: tl.constexpr,
    HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """The result of one chunk and value head."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    C: tl.constexpr = 2 * HK * DK + HV * DV
    P: tl.constexpr = C + HV * DV + 2 * HV
    rows = tl.num_programs(0) * CHUNK
    offs_t, offs_k, offs_v = tl.arange(0, CHUNK), tl.arange(0, BLOCK_K), tl.arange(0, DV)
    times = chunk * CHUNK + offs_t
    real = (times < T)[:, None]
    norm = tl.load(norm_ptr + offs_v).to(tl.float32)
    zero = launches_before(False, PTX)
    out_ptr += zero
    query_start = (head // (HV // HK)).to(tl.int64) * rows + chunk * CHUNK
    q_ptr = qk_ptr + zero + query_start * DK + offs_t[:, None] * DK + offs_k[None, :]
    k_ptr = q_ptr + HK * rows.to(tl.int64) * DK
    start = head.to(tl.int64) * rows + chunk * CHUNK
    states_ptr += zero + (head.to(tl.int64) * tl.num_programs(0) + chunk) * (DK * DV)
    # Requested before the products, which wait for their own operands only.
    decay = tl.load(decay_ptr + zero + start + offs_t)
    new = tl.load(new_ptr + zero + start * DV + offs_t[:, None] * DV + offs_v[None, :])
    z_cells = times.to(tl.int64)[:, None] * P + (C + head * DV + offs_v)[None, :]
    z = tl.load(projected_ptr + zero + z_cells, mask=real, other=0.0)
    scores = tl.zeros((CHUNK, CHUNK), dtype=tl.float32)
    out = tl.zeros((CHUNK, DV), dtype=tl.float32)
    for first in tl.range(0, DK, BLOCK_K, num_stages=STAGES):
        q = tl.load(q_ptr + first)
        k = tl.load(k_ptr + first)
        state = tl.load(states_ptr + (first + offs_k)[:, None] * DV + offs_v[None, :])
        scores = dot(q, tl.trans(k), scores, PTX)
        out = dot(q, state, out, PTX)
    before = offs_t[:, None] >= offs_t[None, :]
    scores *= tl.exp(tl.where(before, decay[:, None] - decay[None, :], 0.0))
    scores = rounded(tl.where(before, scores, 0.0), new_ptr, PTX)
    out = dot(scores, new, out * tl.exp(decay)[:, None], PTX)
    out *= tl.rsqrt(tl.sum(out * out, axis=1) / DV + EPS)[:, None] * norm[None, :]
    out *= silu(z.to(tl.float32))
    out_cells = times.to(tl.int64)[:, None] * (HV * DV) + (head * DV + offs_v)[None, :]
    tl.store(out_ptr + out_cells, rounded(out, out_ptr, PTX), mask=real)
