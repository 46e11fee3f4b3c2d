"""The operators for the delta rule in ATen, for running and tracing on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan_op

from .arguments import DeltaRuleArguments, DeltaRuleSizes, RowsDeltaRuleArguments


def gated_delta_net_aten(arguments: DeltaRuleArguments) -> tuple[Tensor, Tensor, Tensor]:
    """`op.gated_delta_net` in ATen, with a `scan` over several tokens; fp32 inside."""
    projected, conv_weight, dt_bias, a_log, norm_weight, conv_state, recurrent_state, position = arguments[:8]
    sizes, eps = arguments.sizes, arguments.eps
    tokens, channels = projected.shape[0], sizes.channels
    # Selected, not multiplied: what is not used may hold NaN.
    state = torch.where(position != 0, recurrent_state, torch.zeros_like(recurrent_state))
    taps = sizes.conv_size
    before = position + torch.arange(1 - taps, 0, device=position.device)
    # Plus K, because `remainder` of ExecuTorch 1.5 on the CPU gives negative results for negative numbers.
    past = conv_state.index_select(0, (before + taps).remainder(taps))
    past = torch.where((before >= 0)[:, None], past, torch.zeros_like(past))
    inputs = torch.cat([past, projected[:, :channels]])
    # Row r of the new state has the last position that is r modulo K; `ago` counts from the last of all positions.
    ago = (position + (tokens - 1 + taps) - torch.arange(taps, device=position.device)).remainder(taps)
    new_conv_state = inputs.index_select(0, (tokens + taps - 2) - ago)

    weight = conv_weight.float()
    inputs = inputs.float()
    x = inputs.narrow(0, 0, tokens) * weight[:, 0]
    for tap in range(1, taps):
        x = x + inputs.narrow(0, tap, tokens) * weight[:, tap]
    xs = heads_of(x, projected, dt_bias, a_log, sizes)
    if isinstance(tokens, int) and tokens == 1:
        state, out = _token(state, *(x.squeeze(0) for x in xs))
    else:
        state, out = scan_op(_token, [state], xs, ())
    return finished(out, projected, norm_weight, sizes, eps), new_conv_state, state


def rows_delta_rule_aten(arguments: RowsDeltaRuleArguments) -> tuple[Tensor, Tensor, Tensor]:
    """`op.rows_delta_rule` in ATen; fp32 inside."""
    projected, conv_weight, dt_bias, a_log, norm_weight, conv_states, recurrent_states, positions, slots = arguments[:9]
    sizes, eps = arguments.sizes, arguments.eps
    rows, taps, channels = projected.shape[0], sizes.conv_size, sizes.channels
    at, live = positions.clamp(min=0), positions >= 0
    state = recurrent_states.index_select(0, slots)
    state = torch.where((at != 0)[:, None, None, None], state, torch.zeros_like(state))
    # Plus K, as in `gated_delta_net_aten`.
    before = at[:, None] + torch.arange(1 - taps, 0, device=at.device)
    ring = (before + taps).remainder(taps)[:, :, None].expand(rows, taps - 1, channels)
    past = conv_states.index_select(0, slots).gather(1, ring)
    past = torch.where((before >= 0)[:, :, None], past, torch.zeros_like(past))
    inputs = torch.cat([past, projected[:, None, :channels]], 1)
    ago = (at[:, None] + taps - torch.arange(taps, device=at.device)).remainder(taps)
    conv = inputs.gather(1, (taps - 1 - ago)[:, :, None].expand(rows, taps, channels))

    weight, parts = conv_weight.float(), inputs.float().unbind(1)
    x = parts[0] * weight[:, 0]
    for tap in range(1, taps):
        x = x + parts[tap] * weight[:, tap]
    xs = (part.flatten(0, 1) for part in heads_of(x, projected, dt_bias, a_log, sizes))
    state, out = _token(state.flatten(0, 1), *xs)
    out = finished(out, projected, norm_weight, sizes, eps)
    # The row of each slot, without writes of empty rows to slots that others have.
    owns = (slots[None, :] == torch.arange(conv_states.shape[0], device=at.device)[:, None]) & live[None, :]
    owner = (owns.to(torch.int64) * torch.arange(rows, device=at.device)).sum(1)
    owned = owns.to(torch.int64).sum(1) > 0
    state = state.reshape(rows, *recurrent_states.shape[1:])
    return (
        torch.where(live[:, None], out, torch.zeros_like(out)),
        torch.where(owned[:, None, None], conv.index_select(0, owner), conv_states),
        torch.where(owned[:, None, None, None], state.index_select(0, owner), recurrent_states),
    )


def heads_of(x: Tensor, projected: Tensor, dt_bias: Tensor, a_log: Tensor, sizes: DeltaRuleSizes) -> list[Tensor]:
    """Query, key, value, beta and decay of `_token`, with T in front, of the convolution's result x, fp32 [T, C]."""
    tokens, group = projected.shape[0], sizes.value_heads // sizes.key_heads
    keys, channels, values = sizes.key_heads * sizes.key_dim, sizes.channels, sizes.values
    x = x * torch.sigmoid(x)
    query = _unit(x[:, :keys].reshape(tokens, sizes.key_heads, sizes.key_dim)) * sizes.key_dim**-0.5
    key = _unit(x[:, keys : 2 * keys].reshape(tokens, sizes.key_heads, sizes.key_dim))
    value = x[:, 2 * keys :].reshape(tokens, sizes.value_heads, sizes.value_dim)
    if group > 1:
        query, key = (
            part.unsqueeze(2).expand(tokens, sizes.key_heads, group, sizes.key_dim).reshape(
                tokens, sizes.value_heads, sizes.key_dim
            )
            for part in (query, key)
        )  # fmt: skip
    gates = projected[:, channels + values :].float()
    beta = torch.sigmoid(gates[:, : sizes.value_heads])
    a = gates[:, sizes.value_heads :] + dt_bias.float()
    softplus = torch.clamp(a, min=0.0) + torch.log1p(torch.exp(-torch.abs(a)))
    decay = torch.exp(-torch.exp(a_log.float()) * softplus)
    return [query.unsqueeze(2), key.unsqueeze(2), value.unsqueeze(2), beta[:, :, None, None], decay[:, :, None, None]]


def finished(out: Tensor, projected: Tensor, norm_weight: Tensor, sizes: DeltaRuleSizes, eps: float) -> Tensor:
    """The gated norm of the heads' results: out fp32, T * Hv * Dv elements -> as `projected`, [T, Hv * Dv]."""
    tokens, channels, values = projected.shape[0], sizes.channels, sizes.values
    out = out.reshape(tokens, sizes.value_heads, sizes.value_dim)
    out = out * torch.rsqrt(out.pow(2).mean(-1, keepdim=True) + eps) * norm_weight.float()
    z = projected[:, channels : channels + values].float()
    out = out.reshape(tokens, values) * (z * torch.sigmoid(z))
    return out.to(projected.dtype)


def _token(state: Tensor, query: Tensor, key: Tensor, value: Tensor, beta: Tensor, decay: Tensor) -> list[Tensor]:
    """The delta rule for one token.

    Args:
        state: [Hv, Dk, Dv]. query, key: [Hv, 1, Dk]. value: [Hv, 1, Dv]. beta, decay: [Hv, 1, 1].

    Returns:
        The new state; query @ state, [Hv, 1, Dv].
    """
    state = state * decay
    update = (value - torch.bmm(key, state)) * beta
    state = state + key.transpose(1, 2) * update
    return [state, torch.bmm(query, state)]


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)
