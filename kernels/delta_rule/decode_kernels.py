"""The delta rule for one token of one text, or of several: one launch, one program for each value head of a token.

The state is most of what the launch reads and writes (2 MB of 2.2 for Qwen3.5-35B-A3B). A program holds the state of
its head in registers, so that it is read once and written once, and all of it is requested before the wait for the
launch that makes `projected`. More programs would share a head, and the last one of them would have to wait for the
sums of the others before the norm.

The convolution reads K - 1 rows of its state and writes another one, so programs that share channels do not race.

Letters: as in op.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from executorch_moe.kernels._device import launches_before

from .device import log_decay, rounded, silu


@triton.jit
def convolved_past(conv_ptr, weight_ptr, channels, position, C: tl.constexpr, K: tl.constexpr):
    """The convolution without the newest token, and the newest token's weight: fp32, shaped like `channels`."""
    total = tl.zeros(channels.shape, dtype=tl.float32)
    for ago in tl.static_range(1, K):
        slot = ((position + (K - ago)) % K).to(tl.int32)
        seen = (channels >= 0) & (position >= ago)
        x = tl.load(conv_ptr + slot * C + channels, mask=seen, other=0.0).to(tl.float32)
        total += x * tl.load(weight_ptr + channels * K + (K - 1 - ago)).to(tl.float32)
    return total, tl.load(weight_ptr + channels * K + (K - 1)).to(tl.float32)


@triton.jit
def keep_input(new_conv_ptr, channels, x, position, mine, C: tl.constexpr, K: tl.constexpr, PTX: tl.constexpr):
    """Writes the newest row of the convolution's state, and zeros to the rows of positions below 0."""
    tl.store(new_conv_ptr + (position % K) * C + channels, rounded(x, new_conv_ptr, PTX), mask=(channels >= 0) & mine)
    for ago in tl.static_range(1, K):
        empty = tl.zeros_like(x)
        slot = (position - ago + K) % K
        tl.store(
            new_conv_ptr + slot * C + channels,
            rounded(empty, new_conv_ptr, PTX),
            mask=(channels >= 0) & mine & (position < ago),
        )


@triton.jit
def value_head(
    head, position, live,
    projected_ptr, weight_ptr, dt_bias_ptr, a_log_ptr, norm_ptr, conv_ptr, new_conv_ptr, state_ptr, new_state_ptr,
    out_ptr,
    SCALE: tl.constexpr, EPS: tl.constexpr,
    HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    K: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Convolution, gates, delta rule and gated norm of one value head, for one token; pointers are its text's.

    Without `live`, states are neither read nor written, and the result is zeros; the position is below 0 then.

    Before its wait it reads the states. That is safe because another launch, which makes `projected`, is between the
    launch that wrote them and this one.
    """
    GROUP: tl.constexpr = HV // HK
    C: tl.constexpr = 2 * HK * DK + HV * DV
    offs_k, offs_v = tl.arange(0, DK), tl.arange(0, DV)
    # Query and key are two rows, which sums turn into two vectors. From loads of vectors, Triton would repeat all work
    # on them in each of the threads that have a part of a row of the state.
    is_key = tl.arange(0, 2)[:, None]
    qk_channels = is_key * (HK * DK) + (head // GROUP) * DK + offs_k[None, :]
    v_channels = 2 * HK * DK + head * DV + offs_v
    cells = head * (DK * DV) + offs_k[:, None] * DV + offs_v[None, :]
    state = tl.load(state_ptr + cells, mask=live, other=0.0)
    qk, qk_weight = convolved_past(conv_ptr, weight_ptr, qk_channels, position, C, K)
    v, v_weight = convolved_past(conv_ptr, weight_ptr, v_channels, position, C, K)
    norm = tl.load(norm_ptr + offs_v).to(tl.float32)
    dt_bias = tl.load(dt_bias_ptr + head).to(tl.float32)
    a_log = tl.load(a_log_ptr + head).to(tl.float32)
    zero = launches_before(True, PTX)
    projected_ptr += zero
    new_conv_ptr += zero
    new_state_ptr += zero
    out_ptr += zero

    qk_new = tl.load(projected_ptr + qk_channels).to(tl.float32)
    v_new = tl.load(projected_ptr + v_channels).to(tl.float32)
    z = tl.load(projected_ptr + C + head * DV + offs_v).to(tl.float32)
    b = tl.load(projected_ptr + C + HV * DV + head).to(tl.float32)
    a = tl.load(projected_ptr + C + HV * DV + HV + head).to(tl.float32)
    decay = tl.exp(log_decay(a, dt_bias, a_log))
    beta = 1.0 / (1.0 + tl.exp(-b))
    v = silu(v + v_new * v_weight)
    qk = silu(qk + qk_new * qk_weight)
    qk *= tl.rsqrt(tl.sum(qk * qk, axis=1) + 1e-6)[:, None]
    q = tl.sum(tl.where(is_key == 0, qk * SCALE, 0.0), axis=0)
    k = tl.sum(tl.where(is_key == 1, qk, 0.0), axis=0)

    state = tl.where(position == 0, 0.0, state)
    update = (v - tl.sum(state * k[:, None], axis=0) * decay) * beta
    # q @ (decay * state + k update) in two parts, so that both sums over the state are independent of each other.
    out = tl.sum(state * q[:, None], axis=0) * decay + tl.sum(q * k, axis=0) * update
    tl.store(new_state_ptr + cells, state * decay + k[:, None] * update[None, :], mask=live)
    out *= tl.rsqrt(tl.sum(out * out, axis=0) / DV + EPS) * norm * silu(z)
    tl.store(out_ptr + head * DV + offs_v, rounded(tl.where(live, out, 0.0), out_ptr, PTX))
    keep_input(new_conv_ptr, qk_channels, qk_new, position, (head % GROUP == 0) & live, C, K, PTX)
    keep_input(new_conv_ptr, v_channels, v_new, position, live, C, K, PTX)


@triton.jit
def moe_delta_rule_one_token(
    projected_ptr,  # [P]: query, key, value, z, b, a
    weight_ptr,  # [C, K], of the convolution
    dt_bias_ptr, a_log_ptr,  # [HV]
    norm_ptr,  # [DV]
    position_ptr,  # int64 [1]
    conv_ptr, new_conv_ptr,  # [K, C]; may be the same
    state_ptr, new_state_ptr,  # fp32 [HV, DK, DV]; may be the same
    out_ptr,  # [HV * DV]
    SCALE: tl.constexpr, EPS: tl.constexpr,
    HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    K: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """`value_head` for one token of one text. The position is read before the wait, like the states."""
    value_head(
        tl.program_id(0), tl.load(position_ptr), True,
        projected_ptr, weight_ptr, dt_bias_ptr, a_log_ptr, norm_ptr, conv_ptr, new_conv_ptr, state_ptr, new_state_ptr,
        out_ptr, SCALE, EPS, HK, HV, DK, DV, K, PTX,
    )  # fmt: skip


@triton.jit
def moe_delta_rule_rows(
    projected_ptr,  # [T, P]: query, key, value, z, b, a of each row
    weight_ptr,  # [C, K], of the convolution
    dt_bias_ptr, a_log_ptr,  # [HV]
    norm_ptr,  # [DV]
    positions_ptr,  # int64 [T]; below 0: an empty row
    slots_ptr,  # int64 [T], a different one for each row that is not empty
    conv_ptr, new_conv_ptr,  # [S, K, C]; may be the same
    state_ptr, new_state_ptr,  # fp32 [S, HV, DK, DV]; may be the same
    out_ptr,  # [T, HV * DV]
    SCALE: tl.constexpr, EPS: tl.constexpr,
    HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    K: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """`value_head` for one token of each of several texts, whose states are in slots; zeros for empty rows."""
    head, row = tl.program_id(0), tl.program_id(1)
    C: tl.constexpr = 2 * HK * DK + HV * DV
    position, slot = tl.load(positions_ptr + row), tl.load(slots_ptr + row)  # int64, and so are all offsets of slots
    value_head(
        head, position, position >= 0,
        projected_ptr + row * (C + HV * DV + 2 * HV), weight_ptr, dt_bias_ptr, a_log_ptr, norm_ptr,
        conv_ptr + slot * (K * C), new_conv_ptr + slot * (K * C),
        state_ptr + slot * (HV * DK * DV), new_state_ptr + slot * (HV * DK * DV),
        out_ptr + row * (HV * DV), SCALE, EPS, HK, HV, DK, DV, K, PTX,
    )  # fmt: skip
