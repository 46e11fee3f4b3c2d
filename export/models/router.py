"""Qwen3-MoE's router with a softmax over the chosen experts only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class TopKFirstRouter(nn.Module):
    """Takes the place of a `Qwen3MoeTopKRouter` that renormalizes: the same experts and weights.

    exp(a) / sum of all, renormalized over the chosen, is exp(a) / sum of the chosen: the softmax over all experts, a
    kernel of its own, falls away.
    """

    def __init__(self, router: Any) -> None:
        """Takes the weight of a router over."""
        super().__init__()
        self.top_k, self.hidden_dim = router.top_k, router.hidden_dim
        self.weight = router.weight

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[..., H] -> logits [T, E], weights [T, top_k] and experts int64 [T, top_k]."""
        logits = nn.functional.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        chosen, experts = torch.topk(logits.to(torch.float32), self.top_k, dim=-1)
        return logits, chosen.softmax(-1).to(logits.dtype), experts


def replace_routers_(module: nn.Module) -> nn.Module:
    """Replaces every Qwen3-MoE router that renormalizes, in place; others stay as they are."""
    for name, child in list(module.named_modules()):
        if type(child).__name__ == "Qwen3MoeTopKRouter" and child.norm_topk_prob:
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, TopKFirstRouter(child))
    return module
