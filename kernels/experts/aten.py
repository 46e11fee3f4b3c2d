"""`fused_experts` in ATen: the eager CPU kernel, and a traceable form for exports to the CPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, silu

from executorch_moe.kernels.arguments import ExpertArguments, ExpertMatrix
from executorch_moe.kernels.packing.fragments import dequantize_in_place, fragment_order
from executorch_moe.kernels.schemes import (
    GATE_UP_GRANULE,
    K_BLOCK,
    SWIGLU_OAI_ALPHA,
    SWIGLU_OAI_LIMIT,
    get_scheme,
    max_scale_ratio,
    round_up,
)


def quantize_activations(x: Tensor, act_group: int) -> Tensor:
    """Round activations to int8 codes times one scale per group, as the kernels of w4a8 do.

    Args:
        x: float [..., K].
        act_group: number of consecutive values that share a scale; the last group of a row may be shorter. A group's
            scale is at least the largest of its row divided by `max_scale_ratio`. 0: no rounding.

    Returns:
        fp32 [..., K].
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
    """Gate and up rows in alternating runs of 8, [B, 2*Ip, M] -> the gated activation, [B, Ip, M]."""
    b, n, m = projected.shape
    runs = projected.reshape(b, n // (2 * GATE_UP_GRANULE), 2, GATE_UP_GRANULE, m)
    gate, up = runs.select(2, 0), runs.select(2, 1)
    if activation == "swiglu_oai":
        gate = gate.clamp(max=SWIGLU_OAI_LIMIT)
        up = up.clamp(-SWIGLU_OAI_LIMIT, SWIGLU_OAI_LIMIT) + 1.0
        return (gate * torch.sigmoid(SWIGLU_OAI_ALPHA * gate) * up).reshape(b, n // 2, m)
    return (silu(gate) * up).reshape(b, n // 2, m)


def _multiply(weight: Tensor, x: Tensor) -> Tensor:
    """weight [B, N, K] times x [B, K, M], or [1, K, M] for all -> [B, N, M]."""
    if x.shape[0] == weight.shape[0]:
        return torch.bmm(weight, x)
    b, n, k = weight.shape
    return torch.mm(weight.reshape(b * n, k), x[0]).reshape(b, n, -1)


def _project(x: Tensor, matrix: ExpertMatrix, scheme: str, gemm: int) -> Tensor:
    """x fp32 [B, K, M], or [1, K, M] for all experts, packed matrices of B experts -> fp32 [B, N, M]."""
    kind = get_scheme(scheme)
    if act_group := kind.act_group(gemm):
        x = quantize_activations(x.transpose(1, 2), act_group).transpose(1, 2)
    if matrix.scale is None:
        y = _multiply(matrix.weight.to(torch.float32), x)
    else:
        order = fragment_order(kind, gemm)
        low, high = dequantize_in_place(matrix.weight, matrix.scale, matrix.zero, order)
        blocks = x.reshape(x.shape[0], -1, K_BLOCK, x.shape[2])

        def part(weight: Tensor, positions: Tensor) -> Tensor:
            return _multiply(weight, blocks.index_select(2, positions).reshape(x.shape[0], weight.shape[2], -1))

        y = part(*low) + part(*high)
    return y if matrix.bias is None else y + matrix.bias.unsqueeze(-1)


def _expert_ffn(x: Tensor, w13: ExpertMatrix, w2: ExpertMatrix, arguments: ExpertArguments) -> Tensor:
    """B experts at a time, tokens in columns: x fp32 [B, Hp, M], or [1, Hp, M] for all experts -> fp32 [B, Hp, M].

    With tokens in columns, the products need no transposed weights.
    """
    activated = _activate(_project(x, w13, arguments.scheme, 1), arguments.activation)
    return _project(activated, w2, arguments.scheme, 2)


def fused_experts_aten(arguments: ExpertArguments) -> Tensor:
    """`fused_experts` as a static graph of ATen operators that ExecuTorch's CPU runtime has.

    If the number of pairs is known at trace time and below E (decode), the graph gathers the experts of each pair.
    Otherwise every expert runs on every token, and the results are summed with the routing weights, which are zero for
    experts that a token did not choose. Peak memory is the dequantized fp32 weights of one layer, or of the gathered
    experts.

    Returns:
        bf16 [T, H].
    """
    hidden_states, topk_ids, topk_weights = arguments[:3]
    num_tokens, h = hidden_states.shape
    top_k, e = topk_ids.shape[1], arguments.w13.shape[0]
    x = hidden_states.to(torch.float32)
    if h % K_BLOCK:
        x = pad(x, (0, round_up(h, K_BLOCK) - h))
    ids = topk_ids.to(torch.int64)
    valid = torch.logical_and(ids >= 0, ids < e)
    weights = torch.where(valid, topk_weights.to(torch.float32), torch.zeros_like(topk_weights, dtype=torch.float32))
    w13, w2 = arguments.matrix(1), arguments.matrix(2)

    if isinstance(num_tokens, int) and num_tokens * top_k < e:
        chosen = torch.where(valid, ids, torch.zeros_like(ids)).reshape(-1)
        pairs = x.unsqueeze(1).expand(num_tokens, top_k, x.shape[1]).reshape(num_tokens * top_k, x.shape[1], 1)

        def pick(matrix: ExpertMatrix) -> ExpertMatrix:
            return matrix.map(lambda t: t.index_select(0, chosen))

        y = _expert_ffn(pairs, pick(w13), pick(w2), arguments)
        out = (y.reshape(num_tokens, top_k, -1) * weights.unsqueeze(-1)).sum(1)
    else:
        y = _expert_ffn(x.transpose(0, 1).unsqueeze(0), w13, w2, arguments)
        expert = torch.arange(e, dtype=torch.int64, device=ids.device)
        hit = (ids.unsqueeze(-1) == expert).to(torch.float32)  # [T, top_k, E]
        share = (hit * weights.unsqueeze(-1)).sum(1)  # [T, E]
        out = (y * share.transpose(0, 1).unsqueeze(1)).sum(0).transpose(0, 1)
    return _finished(out, arguments)


def fused_experts_cpu(arguments: ExpertArguments) -> Tensor:
    """Eager CPU kernel: dequantizes one expert at a time, and only experts that have tokens. Returns bf16 [T, H]."""
    hidden_states, topk_ids, topk_weights = arguments[:3]
    h = hidden_states.shape[1]
    x = pad(hidden_states.float(), (0, round_up(h, K_BLOCK) - h))
    out = torch.zeros_like(x)
    for expert in topk_ids.unique().tolist():
        if not 0 <= expert < arguments.w13.shape[0]:
            continue
        token, slot = (topk_ids == expert).nonzero(as_tuple=True)
        one = slice(expert, expert + 1)
        w13, w2 = (arguments.matrix(gemm).map(lambda t: t[one]) for gemm in (1, 2))  # noqa: B023 used at once
        y = _expert_ffn(x[token].T.unsqueeze(0), w13, w2, arguments)
        # index_add_ is also right if a token names an expert twice.
        out.index_add_(0, token, topk_weights[token, slot].float()[:, None] * y[0].T)
    return _finished(out, arguments)


def _finished(out: Tensor, arguments: ExpertArguments) -> Tensor:
    """The experts' sum, fp32 [T, Hp], and the shared expert's result -> bf16 [T, H]."""
    out = out[:, : arguments.hidden_states.shape[1]]
    if arguments.shared is not None and arguments.shared_down is not None:
        dense = arguments.shared.float() @ arguments.shared_down.float().T
        scale = arguments.shared_down_scale
        out = out + (dense if scale is None else dense * scale) * arguments.share
    return out.to(arguments.hidden_states.dtype).contiguous()
