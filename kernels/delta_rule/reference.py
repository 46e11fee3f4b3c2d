"""`gated_delta_net` in plain fp32, token by token: what the kernels are compared with. No kernel code imports it.

Source: "Gated Delta Networks: Improving Mamba2 with Delta Rule" (Yang, Kautz, Hatamizadeh, 2024), equation 10, and the
layer around it in transformers' `models/qwen3_next`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gated_delta_net_reference(
    projected: Tensor,
    conv_weight: Tensor,
    dt_bias: Tensor,
    a_log: Tensor,
    norm_weight: Tensor,
    conv_state: Tensor,
    recurrent_state: Tensor,
    position: Tensor,
    num_key_heads: int,
    key_dim: int,
    eps: float,
    compute: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Takes the arguments of `op.gated_delta_net` and returns its results; writes to none of them.

    Args:
        compute: dtype of all steps; results are rounded to the operator's dtypes at the end.
    """
    value_heads, _, value_dim = recurrent_state.shape
    keys, values = num_key_heads * key_dim, value_heads * value_dim
    qkv, z, b, a = projected.split([2 * keys + values, values, value_heads, value_heads], dim=1)
    width, group = conv_weight.shape[1], value_heads // num_key_heads
    first, end = int(position), int(position) + projected.shape[0]
    if first == 0:
        recurrent_state = torch.zeros_like(recurrent_state)
    rows_by_position = {p: conv_state[p % width] for p in range(max(0, first - width), first)}
    rows_by_position.update({first + t: row for t, row in enumerate(qkv)})
    nothing = torch.zeros_like(qkv[0])
    inputs = torch.stack([rows_by_position.get(p, nothing) for p in range(first - width + 1, end)])
    state = recurrent_state.to(compute)
    decay = -a_log.to(compute).exp() * torch.nn.functional.softplus(a.to(compute) + dt_bias.to(compute))
    rows = []
    for t in range(projected.shape[0]):
        x = torch.nn.functional.silu((inputs[t : t + width].T.to(compute) * conv_weight.to(compute)).sum(1))
        query, key, value = x.split([keys, keys, values])
        query, key = (
            (part / torch.sqrt((part * part).sum(1, keepdim=True) + 1e-6)).repeat_interleave(group, 0)
            for part in (query.view(-1, key_dim), key.view(-1, key_dim))
        )
        state = state * decay[t].exp()[:, None, None]
        expected = (state * key[:, :, None]).sum(1)
        update = (value.view(-1, value_dim) - expected) * b[t].to(compute).sigmoid()[:, None]
        state = state + key[:, :, None] * update[:, None, :]
        out = (state * (query * key_dim**-0.5)[:, :, None]).sum(1)
        out = out * torch.rsqrt(out.pow(2).mean(1, keepdim=True) + eps) * norm_weight.to(compute)
        rows.append(out.flatten() * torch.nn.functional.silu(z[t].to(compute)))
    new_conv_state = torch.empty_like(conv_state)
    for p in range(end - width, end):
        new_conv_state[p % width] = rows_by_position.get(p, nothing)
    return torch.stack(rows).to(projected.dtype), new_conv_state, state.to(recurrent_state.dtype)
