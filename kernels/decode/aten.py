"""The operators for one token in ATen, for running and tracing on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import AttentionArguments, RouteArguments, SharedRouteArguments


def one_token_attention_aten(arguments: AttentionArguments) -> tuple[Tensor, Tensor, Tensor]:
    """`op.one_token_attention` in ATen: fp32, rounded to bf16 where the kernels round."""
    hidden, update, norm, weight, scale, q_norm, k_norm, cos, sin, position, key, value, scaling, eps, gated = arguments
    summed, qkv = one_token_norm_linear_aten(hidden, update, norm, weight, scale, eps)
    _, kv_heads, context, head_dim = key.shape
    rows, heads = qkv.reshape(-1, head_dim).float(), arguments.heads
    rows, gates = rows[: heads + 2 * kv_heads], rows[heads + 2 * kv_heads :]
    angles = cos.flatten().float(), sin.flatten().float()
    query = _norm_and_rotate(rows[:heads], q_norm.flatten().float(), *angles, eps).to(hidden.dtype)
    new_key = _norm_and_rotate(rows[heads : heads + kv_heads], k_norm.flatten().float(), *angles, eps).to(hidden.dtype)
    new_value = rows[heads + kv_heads :].to(hidden.dtype)
    keys = torch.cat([key[0].float(), new_key[:, None].float()], 1)  # [kv_heads, C + 1, D]
    values = torch.cat([value[0].float(), new_value[:, None].float()], 1)
    scores = query.float().unflatten(0, (kv_heads, -1)) @ keys.transpose(1, 2) * scaling
    at = torch.arange(context + 1, device=key.device)
    visible = (at < position) | (at == context)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    # Cache positions that were not written may hold NaN.
    out = weights @ values.masked_fill(~visible[:, None], 0.0)
    if gated:
        out = out.reshape(heads, head_dim) * torch.sigmoid(gates)
    new = torch.stack([new_key, new_value])[:, None, :, None]
    return summed, out.to(hidden.dtype).reshape(1, 1, -1), new


def _norm_and_rotate(x: Tensor, norm: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * norm
    low, high = x.chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


def one_token_router_aten(arguments: RouteArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`op.one_token_router` in ATen: fp32, rounded to bf16 where the kernels round."""
    x, weight, scale, residual, norm, router, top_k, eps = arguments
    y = x.float() @ weight.float().T
    out = (y if scale is None else y * scale).to(x.dtype) + residual
    row = out[0].float()
    normed = (row * torch.rsqrt(row.pow(2).mean(-1, keepdim=True) + eps) * norm.float()).to(x.dtype)
    logits = (normed.float() @ router.float().T).to(x.dtype).float()
    # A stable sort puts the lower of experts with equal logits first. NaN ranks as infinity.
    ranked = logits.masked_fill(logits != logits, torch.inf)
    order = torch.sort(ranked, dim=-1, descending=True, stable=True).indices[:, :top_k]
    return out, normed, logits.gather(-1, order).softmax(-1), order


def one_token_linear_aten(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """`op.one_token_linear` in ATen: fp32, rounded to bf16 at the end."""
    y = x.float() @ weight.float().T
    return (y if scale is None else y * scale).to(x.dtype)


def one_token_shared_router_aten(arguments: SharedRouteArguments) -> tuple[Tensor, ...]:
    """`op.one_token_shared_router` in ATen: fp32, rounded to bf16 where the kernels round."""
    out, normed, weights, ids = one_token_router_aten(arguments.route)
    gate_up, scale, width = arguments[-3:]
    _, y = one_token_norm_linear_aten(out, None, arguments.norm, gate_up, scale, arguments.eps)
    gate, up, own = y[0].float().split([width, width, gate_up.shape[0] - 2 * width], -1)
    shared = (torch.nn.functional.silu(gate) * up).to(out.dtype)
    share = torch.sigmoid(own[:, :1]) if arguments.has_own_gate else torch.ones_like(weights[:, :1])
    return out, normed, weights, ids, shared, share


def one_token_norm_linear_aten(
    hidden: Tensor, update: Tensor | None, norm: Tensor, weight: Tensor, scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """`op.one_token_norm_linear` in ATen: fp32, rounded to bf16 at the end."""
    summed = hidden.clone() if update is None else hidden + update
    x = summed.float()
    factor = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    y = (x * norm.float().flatten()) @ weight.float().T * factor
    return summed, (y if scale is None else y * scale).to(hidden.dtype)
