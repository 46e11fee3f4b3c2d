"""`fused_experts` in ATen: the eager CPU kernel, and a traceable form for runtimes without the Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, silu

from .packing import dequantize, fragment_order
from .schemes import GATE_UP_GRANULE, K_BLOCK, SWIGLU_OAI_ALPHA, SWIGLU_OAI_LIMIT, get_scheme, max_scale_ratio, round_up


def quantize_activations(x: Tensor, act_group: int) -> Tensor:
    """Round activations to int8 codes times one scale a group, as the W4A8 kernels do; returns fp32 [..., K].

    Args:
        x: float [..., K].
        act_group: consecutive values that share a scale, the last of a row may be fewer; 0 returns `x` unchanged in
            fp32. A group's scale is at least 1 / `max_scale_ratio` of the largest of its row.
    """
    x = x.to(torch.float32)
    if act_group == 0:
        return x
    k = x.shape[-1]
    k_pad = round_up(k, act_group)
    padded = pad(x, (0, k_pad - k)) if k_pad > k else x
    grouped = padded.reshape(*x.shape[:-1], k_pad // act_group, act_group)
    largest = grouped.abs().amax(-1, keepdim=True)
    least = largest.amax(-2, keepdim=True) / max_scale_ratio(round_up(k, K_BLOCK))
    scale = (torch.maximum(largest, least) / 127.0).clamp(min=1e-12)
    rounded = ((grouped / scale).round() * scale).reshape(padded.shape)
    return rounded[..., :k] if k_pad > k else rounded


def _activate(projected: Tensor, activation: str) -> Tensor:
    """[..., 2*Ip] with gate and up rows in runs of 8 -> the gated activation, [..., Ip]."""
    *lead, n = projected.shape
    runs = projected.reshape(*lead, n // (2 * GATE_UP_GRANULE), 2, GATE_UP_GRANULE)
    gate, up = runs.select(-2, 0), runs.select(-2, 1)
    if activation == "swiglu_oai":
        gate = gate.clamp(max=SWIGLU_OAI_LIMIT)
        up = up.clamp(-SWIGLU_OAI_LIMIT, SWIGLU_OAI_LIMIT) + 1.0
        return (gate * torch.sigmoid(SWIGLU_OAI_ALPHA * gate) * up).reshape(*lead, n // 2)
    return (silu(gate) * up).reshape(*lead, n // 2)


def _expert_ffn(
    x: Tensor, w13: Tensor, w2: Tensor, b13: Tensor | None, b2: Tensor | None, scheme: str, activation: str
) -> Tensor:
    """Batched expert: x fp32 [B, M, Hp], dequantised w13 [B, 2*Ip, Hp] and w2 [B, Hp, Ip] -> fp32 [B, M, Hp]."""
    kind = get_scheme(scheme)
    projected = torch.bmm(quantize_activations(x, kind.gemm1_act_group), w13.transpose(1, 2))
    if b13 is not None:
        projected = projected + b13.unsqueeze(1)
    hidden = quantize_activations(_activate(projected, activation), kind.gemm2_act_group)
    y = torch.bmm(hidden, w2.transpose(1, 2))
    return y if b2 is None else y + b2.unsqueeze(1)


def fused_experts_aten(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w13: Tensor,
    w2: Tensor,
    w13_scale: Tensor | None,
    w2_scale: Tensor | None,
    w13_zero: Tensor | None,
    w2_zero: Tensor | None,
    w13_bias: Tensor | None,
    w2_bias: Tensor | None,
    scheme: str,
    activation: str,
    group_size: int,
) -> Tensor:
    """`fused_experts` as a static graph of ATen operators that ExecuTorch's CPU runtime has.

    Two forms, by what is cheaper and known at trace time: a fixed number of pairs below E gathers the experts it needs
    (decode); else every expert runs on every token and the routing weights, zero for experts not chosen, select. Peak
    memory is one dequantised layer in fp32 (or top_k of its experts). Arguments as `op.fused_experts`.
    """
    num_tokens, h = hidden_states.shape
    top_k, e = topk_ids.shape[1], w13.shape[0]
    order1, order2 = fragment_order(scheme, 1), fragment_order(scheme, 2)
    x = pad(hidden_states.to(torch.float32), (0, round_up(h, K_BLOCK) - h))
    ids = topk_ids.to(torch.int64)
    valid = torch.logical_and(ids >= 0, ids < e)
    weights = torch.where(valid, topk_weights.to(torch.float32), torch.zeros_like(topk_weights, dtype=torch.float32))

    if isinstance(num_tokens, int) and num_tokens * top_k < e:
        chosen = torch.where(valid, ids, torch.zeros_like(ids)).reshape(-1)

        def pick(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.index_select(0, chosen)

        pairs = x.unsqueeze(1).expand(num_tokens, top_k, x.shape[1]).reshape(num_tokens * top_k, 1, x.shape[1])
        y = _expert_ffn(
            pairs,
            dequantize(w13.index_select(0, chosen), pick(w13_scale), pick(w13_zero), order1),
            dequantize(w2.index_select(0, chosen), pick(w2_scale), pick(w2_zero), order2),
            pick(w13_bias),
            pick(w2_bias),
            scheme,
            activation,
        )
        out = (y.reshape(num_tokens, top_k, -1) * weights.unsqueeze(-1)).sum(1)
    else:
        y = _expert_ffn(
            x.unsqueeze(0).expand(e, num_tokens, x.shape[1]),
            dequantize(w13, w13_scale, w13_zero, order1),
            dequantize(w2, w2_scale, w2_zero, order2),
            w13_bias,
            w2_bias,
            scheme,
            activation,
        )
        expert = torch.arange(e, dtype=torch.int64, device=ids.device)
        hit = (ids.unsqueeze(-1) == expert).to(torch.float32)  # [T, top_k, E]
        share = (hit * weights.unsqueeze(-1)).sum(1)  # [T, E]
        out = (y * share.transpose(0, 1).unsqueeze(-1)).sum(0)
    return out[:, :h].to(hidden_states.dtype).contiguous()


def fused_experts_cpu(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w13: Tensor,
    w2: Tensor,
    w13_scale: Tensor | None,
    w2_scale: Tensor | None,
    w13_zero: Tensor | None,
    w2_zero: Tensor | None,
    w13_bias: Tensor | None,
    w2_bias: Tensor | None,
    scheme: str,
    activation: str,
    group_size: int,
) -> Tensor:
    """Eager CPU kernel: one dequantised expert at a time, only experts that have tokens. Arguments as the operator."""
    h = hidden_states.shape[1]
    order1, order2 = fragment_order(scheme, 1), fragment_order(scheme, 2)
    x = pad(hidden_states.float(), (0, round_up(h, K_BLOCK) - h))
    out = torch.zeros_like(x)

    def at(t: Tensor | None, expert: int) -> Tensor | None:
        return None if t is None else t[expert : expert + 1]

    for expert in topk_ids.unique().tolist():
        if not 0 <= expert < w13.shape[0]:
            continue
        token, slot = (topk_ids == expert).nonzero(as_tuple=True)
        y = _expert_ffn(
            x[token].unsqueeze(0),
            dequantize(w13[expert : expert + 1], at(w13_scale, expert), at(w13_zero, expert), order1),
            dequantize(w2[expert : expert + 1], at(w2_scale, expert), at(w2_zero, expert), order2),
            at(w13_bias, expert),
            at(w2_bias, expert),
            scheme,
            activation,
        )
        # A token chooses an expert at most once in practice; index_add_ stays right if ids repeat.
        out.index_add_(0, token, topk_weights[token, slot].float()[:, None] * y[0])
    return out[:, :h].to(hidden_states.dtype).contiguous()
