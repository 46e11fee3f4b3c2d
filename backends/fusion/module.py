"""The layout of an experts module on its own, before there is a program."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from .recognise import ExpertLayout, find_roles, recognise
from .regions import NotFusable, find_regions

_PROBE_TOKENS = 7


class _Around(nn.Module):
    """Gives the experts module a name, by which its region is found."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        out: Tensor = self.experts(hidden_states, topk_ids, topk_weights)
        return out


def layout_of(experts: nn.Module, hidden_size: int, top_k: int) -> ExpertLayout:
    """How an experts module stores its weights and what it computes, measured as for a region of a program.

    Args:
        experts: called with hidden [T, H], ids [T, top_k], weights [T, top_k]. Its parameters may be on the meta
            device: their values are not looked at.
        hidden_size: H.
        top_k: experts a token.

    Raises:
        NotFusable: no supported expert layer, or a module that cannot be exported.
    """
    # Memory that nothing writes to is never taken, so a layer of gigabytes costs nothing here.
    stand_in = copy.deepcopy(experts).to_empty(device="cpu")
    dtype = next((p.dtype for p in stand_in.parameters() if p.is_floating_point()), torch.float32)
    hidden = torch.zeros(_PROBE_TOKENS, hidden_size, dtype=dtype)
    ids = torch.arange(top_k).expand(_PROBE_TOKENS, top_k).contiguous()
    weights = torch.ones(_PROBE_TOKENS, top_k, dtype=dtype)
    try:
        with torch.no_grad():
            program = torch.export.export(_Around(stand_in), (hidden, ids, weights), strict=False)
    except Exception as error:  # whatever the module's own code raises
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise NotFusable(
            f"cannot be exported ({type(error).__name__}: {reason}): "
            "use experts_implementation='grouped_mm' or 'batched_mm'"
        ) from error
    regions = find_regions(program)
    if len(regions) != 1:
        raise NotFusable(f"gives {len(regions)} expert regions, expected 1: one module for the experts of a layer")
    return recognise(regions[0], find_roles(regions[0]))
