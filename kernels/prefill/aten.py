"""The operators for several tokens in ATen, for running and tracing on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan_op

from .arguments import CachedAttentionArguments, HeadsArguments

ROWS = 16
"""Tokens of a block of `cached_attention_by_rows`. Few, because a short prompt costs as much as a whole block."""


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


def cached_attention_by_rows(arguments: CachedAttentionArguments) -> Tensor:
    """`op.cached_attention` in ATen for any number of tokens, with a `scan` over blocks of `ROWS` of them.

    Scores and masks exist for one block at a time: memory grows with C, not with the product of T and C. ExecuTorch
    plans memory for the largest T, which is C.
    """
    query, key, value, visible, scaling = arguments
    _, tokens, heads, head_dim = query.shape
    kv_heads, context = key.shape[1:3]
    blocks = (tokens + (ROWS - 1)) // ROWS
    missing = blocks * ROWS - tokens  # rows that are computed in vain; they see the first position
    rows = torch.nn.functional.pad(query[0].float() * scaling, (0, 0, 0, 0, 0, missing))
    ends = torch.nn.functional.pad(visible, (0, 0, 0, missing))
    positions = torch.arange(context, device=key.device)
    # Positions that nobody wrote may hold NaN. Scores are selected, but values are multiplied with zeros.
    seen = positions <= visible[:, -1].amax()
    values = torch.where(seen[:, None], value[0].float(), 0.0)
    # ExecuTorch copies what is transposed, so it is transposed once.
    fixed = (key[0].float().transpose(1, 2).contiguous(), values, positions)

    def block(done: Tensor, q: Tensor, ends: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> list[Tensor]:
        """done: a number, because `scan` needs a state. q: [ROWS, heads, D]. ends: `visible` of these rows."""
        mask = positions <= ends[:, -1:]
        if ends.shape[1] == 2:
            mask = mask & (positions >= ends[:, :1])
        q = q.reshape(ROWS, kv_heads, -1, head_dim).permute(1, 2, 0, 3).reshape(kv_heads, -1, head_dim)
        scores = torch.bmm(q, keys).reshape(heads, ROWS, context)
        weights = torch.where(mask, scores, -torch.inf).softmax(-1).reshape(kv_heads, -1, context)
        out = torch.bmm(weights, values).reshape(heads, ROWS, -1)
        return [done + 1, out.permute(1, 0, 2).contiguous()]

    xs = [rows.reshape(blocks, ROWS, heads, head_dim), ends.reshape(blocks, ROWS, visible.shape[1])]
    _, out = scan_op(block, [torch.zeros(1, dtype=torch.int64, device=key.device)], xs, fixed)
    return out.reshape(blocks * ROWS, heads, -1)[None, :tokens].to(query.dtype)


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


def linear_aten(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """`op.prompt_linear` and `batch.op.rows_linear` in ATen: fp32, rounded to bf16 at the end."""
    y = x.float() @ weight.float().T
    return (y if scale is None else y * scale).to(x.dtype)
