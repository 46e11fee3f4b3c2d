"""The operators for rows of several texts in ATen, for running and tracing on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from executorch_moe.kernels.prefill.aten import linear_aten

from .arguments import RowsAttentionArguments


def rows_attention_aten(arguments: RowsAttentionArguments) -> tuple[Tensor, Tensor]:
    """`op.rows_attention` in ATen: fp32, rounded to bf16 where the kernels round."""
    x, weight, scale, q_norm, k_norm, cos, sin, positions, slots, key, value, scaling, eps = arguments
    _, kv_heads, context, head_dim = key.shape
    parts = linear_aten(x[0], weight, scale).unflatten(-1, (-1, head_dim))  # [T, heads + 2 * kv_heads, D]
    heads = parts.shape[1] - 2 * kv_heads
    query, new_key, new_value = parts.split([heads, kv_heads, kv_heads], 1)
    angles = cos.float()[0, :, None], sin.float()[0, :, None]
    query = _norm_and_rotate(query.float(), q_norm.flatten().float(), *angles, eps).to(x.dtype)
    new_key = _norm_and_rotate(new_key.float(), k_norm.flatten().float(), *angles, eps).to(x.dtype)
    keys = torch.cat([key[slots].float(), new_key[:, :, None].float()], 2)  # [T, kv_heads, C + 1, D]
    values = torch.cat([value[slots].float(), new_value[:, :, None].float()], 2)
    at = torch.arange(context + 1, device=key.device)
    visible = ((at < positions[:, None]) | (at == context))[:, None]  # [T, 1, C + 1]
    # Cache positions that were not written may hold NaN.
    keys, values = (t.masked_fill(~visible[..., None], 0.0) for t in (keys, values))
    scores = query.float().unflatten(1, (kv_heads, -1)) @ keys.transpose(2, 3) * scaling
    weights = scores.masked_fill(~visible[:, :, None], -torch.inf).softmax(-1)
    out = (weights @ values).to(x.dtype).reshape(1, x.shape[1], -1)
    return out, torch.stack([new_key, new_value])[:, :, :, None]


def _norm_and_rotate(x: Tensor, norm: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * norm
    low, high = x.chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


def rows_router_aten(x: Tensor, router: Tensor, positions: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """`op.rows_router` in ATen. A stable sort puts the lower of experts with equal logits first."""
    logits = (x[0].float() @ router.float().T).to(x.dtype).float()
    ranked = logits.masked_fill(logits != logits, torch.inf)
    order = torch.sort(ranked, dim=-1, descending=True, stable=True).indices[:, :top_k]
    return logits.gather(-1, order).softmax(-1), torch.where((positions >= 0)[:, None], order, -1)
