"""An experts implementation in transformers' registry: `experts_implementation="executorch_moe"`.

A model loaded with it computes its experts in PyTorch, one expert at a time. It exports each expert layer as one node,
for any number of tokens and without the temporary copies of `batched_mm`. Our partitioners fuse this node like any
other experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .pretrained import require_transformers

NAME = "executorch_moe"
_TRANSFORMERS_MOE = "transformers.integrations.moe"
"""The module of transformers that defines the default gate of its experts classes."""


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
    """Experts on unpacked weights, in the layout of transformers. A partitioner replaces the node by a fused one.

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
    """`forward` of a transformers experts module through `experts`: [T, H] -> [T, H].

    Raises:
        NotImplementedError: experts without a gate, with a norm after each expert, their own gate function, or an
            activation other than SiLU.
    """
    kind = type(module).__name__
    clamped = hasattr(module, "alpha") and hasattr(module, "limit")
    gate: Any = getattr(type(module), "_apply_gate", None)
    if not clamped and gate is not None and gate.__module__ != _TRANSFORMERS_MOE:
        raise NotImplementedError(
            f"{kind} has its own gate function ({gate.__qualname__}), but experts_implementation={NAME!r} computes "
            "silu(gate) * up: use experts_implementation='grouped_mm'"
        )
    activation = type(getattr(module, "act_fn", None)).__name__
    # transformers has its own SiLUActivation beside torch's SiLU.
    if not clamped and activation not in ("SiLU", "SiLUActivation"):
        raise NotImplementedError(
            f"{kind} uses activation {activation}, but experts_implementation={NAME!r} computes silu(gate) * up: "
            "use experts_implementation='grouped_mm'"
        )
    # In transformers 5.17, experts lack has_post_expert_norm.
    if not module.has_gate or getattr(module, "has_post_expert_norm", False):
        raise NotImplementedError(
            f"{kind} lacks a gate or has a norm after each expert: use experts_implementation='grouped_mm'"
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
    """Registers `experts_implementation="executorch_moe"` in transformers.

    Raises:
        RuntimeError: see `require_transformers`.
    """
    require_transformers()
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
