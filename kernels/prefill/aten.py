"""The operators for several tokens in ATen, for running and tracing on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import CachedAttentionArguments, HeadsArguments


def rotated_heads_aten(arguments: HeadsArguments) -> tuple[Tensor, Tensor]:
    """`op.rotated_heads` in ATen: fp32, rounded to bf16 once."""
    qkv, q_norm, k_norm, cos, sin, kv_heads, eps = arguments
    head_dim = q_norm.numel()
    rows = qkv.unflatten(-1, (-1, head_dim))
    heads = rows.shape[2] - 2 * kv_heads
    query, key, value = rows.split([heads, kv_heads, kv_heads], dim=2)
    angles = cos.float()[:, :, None], sin.float()[:, :, None]
    query = _norm_and_rotate(query.float(), q_norm.flatten().float(), *angles, eps).to(qkv.dtype)
    key = _norm_and_rotate(key.float(), k_norm.flatten().float(), *angles, eps).to(qkv.dtype)
    return query, torch.stack([key, value]).transpose(2, 3).contiguous()


def _norm_and_rotate(x: Tensor, norm: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * norm
    low, high = x.chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


def cached_attention_aten(arguments: CachedAttentionArguments) -> Tensor:
    """`op.cached_attention` in ATen: fp32, rounded to bf16 at the end."""
    query, key, value, visible, scaling = arguments
    positions = torch.arange(key.shape[2], device=key.device)
    mask = positions <= visible[:, -1:]
    if visible.shape[1] == 2:
        mask = mask & (positions >= visible[:, :1])
    # Positions that nobody wrote may hold NaN.
    seen = mask.any(0)[:, None]
    out = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(1, 2).float(),
        key.float().where(seen, 0.0),
        value.float().where(seen, 0.0),
        attn_mask=mask[None, None],
        scale=scaling,
        enable_gqa=True,
    )
    return out.to(query.dtype).transpose(1, 2).contiguous()


def top_experts_aten(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """`op.top_experts` in ATen. A stable sort puts the lower of experts with equal logits first."""
    logits = logits.float()
    ranked = logits.masked_fill(logits != logits, torch.inf)
    order = torch.sort(ranked, dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()
    return logits.gather(-1, order).softmax(-1), order


def residual_norm_aten(hidden: Tensor, update: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`op.residual_norm` in ATen: fp32, rounded to bf16 where the kernel rounds."""
    summed = (hidden + update).contiguous()
    row = summed.float()
    normed = row * torch.rsqrt(row.pow(2).mean(-1, keepdim=True) + eps) * norm.flatten().float()
    return summed, normed.to(hidden.dtype)
