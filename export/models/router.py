"""The MLP around the experts: a router, and a shared expert with a gate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from executorch_moe.export.same_results import TOKENS, Run, example, gives_same_results
from executorch_moe.kernels.prefill.op import fits_top_experts

from .attention import merged
from .linears import is_one_token, stored_int4

ROWS = 16
"""The outputs of a merged projection are padded to a multiple of this, so that matrix products need no masks."""


class TopKFirstRouter(nn.Module):
    """Replaces a router whose weights are a softmax over the chosen logits; gives the same experts and weights.

    A softmax over all experts, renormalized over the chosen ones, equals a softmax over the chosen ones. This saves the
    kernel of the softmax over all experts.
    """

    def __init__(self, router: Any) -> None:
        """Takes over the weight of a router."""
        super().__init__()
        self.top_k, self.hidden_dim = router.top_k, router.weight.shape[1]
        self.weight = router.weight

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """hidden_states [..., H] -> logits [T, E], weights [T, top_k] and expert ids int64 [T, top_k].

        Weights are fp32 for several tokens, which `top_experts` computes in one launch.
        """
        logits = nn.functional.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        if not is_one_token(logits) and fits_top_experts(logits.shape[1], self.top_k):
            weights, experts = torch.ops.executorch_moe.top_experts(logits, self.top_k)
            return logits, weights, experts
        chosen, experts = torch.topk(logits.to(torch.float32), self.top_k, dim=-1)
        return logits, chosen.softmax(-1).to(logits.dtype), experts


class SharedExpert(nn.Module):
    """A shared expert with its gate: one projection for gate and up, and for the expert's own gate."""

    def __init__(self, expert: Any, own_gate: nn.Linear) -> None:
        """Takes over the weights of the shared expert of a MoE block, and of the linear layer of its gate."""
        super().__init__()
        self.down_proj, self.width = expert.down_proj, expert.down_proj.in_features
        parts = [expert.gate_proj, expert.up_proj]
        self.own_gate: nn.Module | None = own_gate
        if not any(map(stored_int4, parts)):  # else their codes would be lost in a merged layer
            padding = nn.Linear(own_gate.in_features, -(2 * self.width + 1) % ROWS, bias=False, device="meta")
            padding.weight = nn.Parameter(
                torch.zeros(padding.weight.shape, dtype=own_gate.weight.dtype, device=own_gate.weight.device), False
            )
            parts += [own_gate, padding]
            self.own_gate = None
        self.gate_up = merged(parts)

    def forward(self, x: Tensor) -> Tensor:
        """float [T, H] -> [T, H]."""
        y = self.gate_up(x)
        gate, up = y[..., : self.width], y[..., self.width : 2 * self.width]
        own = y[..., 2 * self.width : 2 * self.width + 1] if self.own_gate is None else self.own_gate(x)
        return torch.sigmoid(own) * self.down_proj(nn.functional.silu(gate) * up)  # type: ignore[no-any-return]


class SharedExpertBlock(nn.Module):
    """Replaces a MoE block that has a `TopKFirstRouter` and a shared expert with a gate; keeps the names."""

    def __init__(self, block: Any) -> None:
        """Takes over the submodules of a block."""
        super().__init__()
        self.gate, self.experts = block.gate, block.experts
        self.shared_expert = SharedExpert(block.shared_expert, block.shared_expert_gate)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """float [1, T, H] -> [1, T, H]."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, experts = self.gate(flat)
        return (self.experts(flat, experts, weights) + self.shared_expert(flat)).view(hidden_states.shape)  # type: ignore[no-any-return]


def replace_routers_(module: nn.Module) -> nn.Module:
    """Replaces each router that `TopKFirstRouter` can replace, and the block around it if it has a shared expert, in
    place.

    Returns `module`.
    """
    for name, child in list(module.named_modules()):
        if _is_top_k_first(child):
            _replace(module, name, TopKFirstRouter(child))
    for name, child in list(module.named_modules()):
        if _has_shared_expert(child):
            _replace(module, name, SharedExpertBlock(child))
    return module


def routes_alone(block: Any) -> bool:
    """True for a block that computes nothing but `experts` for what its `TopKFirstRouter` chooses."""
    return _is_routed(block) and gives_same_results(block, _Alone, _run(block), {"experts": _Stub()})


class _Alone(nn.Module):
    """What `routes_alone` compares a block with."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.gate, self.experts = block.gate, block.experts

    def forward(self, hidden_states: Tensor) -> Tensor:
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, experts = self.gate(flat)
        return self.experts(flat, experts, weights).view(hidden_states.shape)  # type: ignore[no-any-return]


class _Stub(nn.Module):
    """Experts without weights."""

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        return torch.tanh(x * (weights * (1 + experts)).sum(-1, keepdim=True))


def _run(block: Any) -> Run:
    return lambda module: (module(example(1, TOKENS, block.gate.hidden_dim)),)


def _is_routed(block: Any) -> bool:
    return isinstance(getattr(block, "gate", None), TopKFirstRouter) and hasattr(block, "experts")


def _is_top_k_first(router: Any) -> bool:
    """True for a router without biases or groups that renormalizes the chosen weights of a softmax."""
    tensors = dict((*router.named_parameters(), *router.named_buffers()))
    if (
        set(tensors) != {"weight"}
        or tensors["weight"].dim() != 2
        or not isinstance(getattr(router, "top_k", None), int)
    ):
        return False

    def run(module: Any) -> tuple[Tensor, Tensor]:
        _, weights, experts = module(example(4 * TOKENS, router.weight.shape[1]))
        return weights, experts

    return not isinstance(router, TopKFirstRouter) and gives_same_results(router, TopKFirstRouter, run)


def _has_shared_expert(block: Any) -> bool:
    return (
        _is_routed(block)
        and isinstance(getattr(block, "shared_expert_gate", None), nn.Linear)
        and not isinstance(block, SharedExpertBlock)
        and gives_same_results(block, SharedExpertBlock, _run(block), {"experts": _Stub()})
    )


def _replace(module: nn.Module, name: str, replacement: nn.Module) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(owner), attribute, replacement)
