"""Qwen3-MoE's router with a softmax over the chosen experts only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from executorch_moe.kernels.prefill.op import fits_top_experts

from .linears import is_one_token


class TopKFirstRouter(nn.Module):
    """Replaces a `Qwen3MoeTopKRouter` that renormalizes; gives the same experts and weights.

    A softmax over all experts, renormalized over the chosen ones, equals a softmax over the chosen ones. This saves the
    kernel of the softmax over all experts.
    """

    def __init__(self, router: Any) -> None:
        """Takes over the weight of a router."""
        super().__init__()
        self.top_k, self.hidden_dim = router.top_k, router.hidden_dim
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


def replace_routers_(module: nn.Module) -> nn.Module:
    """Replaces each Qwen3-MoE router that renormalizes, in place; returns `module`."""
    for name, child in list(module.named_modules()):
        if type(child).__name__ == "Qwen3MoeTopKRouter" and child.norm_topk_prob:
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, TopKFirstRouter(child))
    return module
