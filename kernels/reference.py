"""The reference for tests: an expert layer in plain fp32 on dequantized weights. Shares no code with the kernels."""

from __future__ import annotations

import torch
from torch import Tensor


def reference_experts(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    """Expert layer in fp32: sum over a token's experts of weight * act(x @ gate.T, x @ up.T) @ down.T.

    Args:
        hidden_states: float [T, H].
        topk_ids: int [T, top_k]; ids outside [0, E) contribute nothing.
        topk_weights: float [T, top_k].
        gate_up: float [E, 2I, H], gate rows first. down: float [E, H, I]. Dequantized.
        gate_up_bias: float [E, 2I] or None. down_bias: float [E, H] or None.
        activation: "silu", or "swiglu_oai": min(gate, 7) * sigmoid(1.702 * min(gate, 7)) * (clamp(up, -7, 7) + 1).

    Returns:
        fp32 [T, H].

    Raises:
        NotImplementedError: an activation that the reference does not have.
    """
    if activation not in ("silu", "swiglu_oai"):
        raise NotImplementedError(f"activation={activation!r} has no reference")
    x = hidden_states.float()
    out = torch.zeros_like(x)
    for e in range(gate_up.shape[0]):
        token, slot = (topk_ids == e).nonzero(as_tuple=True)
        if token.numel() == 0:
            continue
        projected = x[token] @ gate_up[e].float().T
        if gate_up_bias is not None:
            projected = projected + gate_up_bias[e].float()
        gate, up = projected.chunk(2, dim=-1)
        if activation == "silu":
            gated = torch.nn.functional.silu(gate) * up
        else:
            gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
            gated = gate * torch.sigmoid(1.702 * gate) * (up + 1.0)
        y = gated @ down[e].float().T
        if down_bias is not None:
            y = y + down_bias[e].float()
        out.index_add_(0, token, topk_weights[token, slot].float()[:, None] * y)
    return out
