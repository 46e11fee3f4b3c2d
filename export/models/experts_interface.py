"""transformers' own registry: `experts_implementation="executorch_moe"`.

A model loaded with it computes its experts in PyTorch, one expert at a time, and exports them as one node a layer, at
any length and without the temporary copies of `batched_mm`. Our partitioners fuse such a node like any expert region.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .pretrained import require_transformers

NAME = "executorch_moe"
_TRANSFORMERS_MOE = "transformers.integrations.moe"
"""Module that defines the default gate of transformers' experts classes."""


@torch.library.custom_op("executorch_moe::experts", mutates_args=())
def experts(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    transposed: bool,
    interleaved: bool,
    clamped: bool,
    alpha: float,
    limit: float,
) -> Tensor:
    """Experts on unpacked weights, as transformers stores them; stands in an exported program until it is fused.

    Args:
        hidden_states: float [T, H].
        topk_ids: int [T, top_k]; ids outside [0, E) contribute nothing.
        topk_weights: float [T, top_k].
        gate_up: float [E, 2I, H], or [E, H, 2I] if transposed. down: float [E, H, I], or [E, I, H].
        gate_up_bias: float [E, 2I] or None. down_bias: float [E, H] or None.
        transposed: weights are [E, in, out].
        interleaved: gate and up alternate, else gate comes first.
        clamped: (up + 1) * gate * sigmoid(alpha * gate) with both clamped at limit, else silu(gate) * up.
        alpha, limit: see `clamped`.

    Returns:
        [T, H] in the dtype of `hidden_states`.
    """
    out = torch.zeros_like(hidden_states, dtype=torch.float32)
    for expert in topk_ids.unique().tolist():
        if not 0 <= expert < gate_up.shape[0]:
            continue
        token, slot = (topk_ids == expert).nonzero(as_tuple=True)
        w13, w2 = gate_up[expert], down[expert]
        projected = hidden_states[token] @ (w13 if transposed else w13.T)
        if gate_up_bias is not None:
            projected = projected + gate_up_bias[expert]
        gate, up = (projected[:, 0::2], projected[:, 1::2]) if interleaved else projected.chunk(2, -1)
        if clamped:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            gated = gate * torch.sigmoid(alpha * gate) * (up + 1)
        else:
            gated = nn.functional.silu(gate) * up
        y = gated @ (w2 if transposed else w2.T)
        if down_bias is not None:
            y = y + down_bias[expert]
        out.index_add_(0, token, topk_weights[token, slot].float()[:, None] * y.float())
    return out.to(hidden_states.dtype)


@experts.register_fake
def _(hidden_states: Tensor, *args: object) -> Tensor:
    return torch.empty_like(hidden_states)


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Forward of an experts module of transformers.

    Raises:
        NotImplementedError: experts without gate, with a norm or a gating of their own, or with another activation.
    """
    kind = type(module).__name__
    clamped = hasattr(module, "alpha") and hasattr(module, "limit")
    gate: Any = getattr(type(module), "_apply_gate", None)
    if not clamped and gate is not None and gate.__module__ != _TRANSFORMERS_MOE:
        raise NotImplementedError(
            f"{kind} gates in a way of its own ({gate.__qualname__}), but experts_implementation={NAME!r} computes "
            "silu(gate) * up: use experts_implementation='grouped_mm'"
        )
    activation = type(getattr(module, "act_fn", None)).__name__
    # transformers has its own SiLUActivation beside torch's SiLU.
    if not clamped and activation not in ("SiLU", "SiLUActivation"):
        raise NotImplementedError(
            f"{kind} uses activation {activation}, but experts_implementation={NAME!r} computes silu(gate) * up: "
            "use experts_implementation='grouped_mm'"
        )
    # Experts of transformers 5.17 have no attribute for the norm.
    if not module.has_gate or getattr(module, "has_post_expert_norm", False):
        raise NotImplementedError(
            f"{kind} has no gate, or a norm after each expert: use experts_implementation='grouped_mm'"
        )
    out: Tensor = experts(
        hidden_states,
        top_k_index,
        top_k_weights,
        module.gate_up_proj,
        module.down_proj,
        module.gate_up_proj_bias if module.has_bias else None,
        module.down_proj_bias if module.has_bias else None,
        module.is_transposed,
        not module.is_concatenated,
        clamped,
        float(module.alpha) if clamped else 0.0,
        float(module.limit) if clamped else 0.0,
    )
    return out


def register() -> None:
    """Make `experts_implementation="executorch_moe"` known to transformers.

    Raises:
        RuntimeError: see `require_transformers`.
    """
    require_transformers()
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
