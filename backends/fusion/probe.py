"""Random weights and inputs for an expert layer, and the layout for which the fp32 oracle reproduces its output."""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from executorch_moe.kernels import ACTIVATIONS
from executorch_moe.kernels.reference import reference_experts

from .regions import NotFusable

if TYPE_CHECKING:
    from .recognize import ExpertLayout

# Allows for fp32 sums in another order. The nearest wrong result (another activation or alpha) differs 100 times more.
PROBE_TOLERANCE = 1e-4
LARGE = 1024.0
"""Scale of the hidden states of every second token. Their gates are around +-4 x LARGE, so limits up to about 10,000
change the result. Gates of trained models reach hundreds; a limit beyond the fp16 range has no effect."""


@dataclass(frozen=True)
class Probe:
    """Random weights and inputs for an expert layer, all fp32.

    Attributes:
        large: bool [T], True for tokens with large hidden states and routing weights.
        parameters: by name, in full size; experts that no token chooses are zeros that take no memory.
        few: parameters of the experts that tokens can choose, by name.
        hidden, weights: [T, H] and [T, top_k].
        ids, slots: int64 [T, top_k], into `parameters` and into `few`.
    """

    large: Tensor
    parameters: dict[str, Tensor]
    few: dict[str, Tensor]
    hidden: Tensor
    ids: Tensor
    slots: Tensor
    weights: Tensor

    @staticmethod
    def make(
        shapes: Mapping[str, tuple[int, ...]],
        tokens: int,
        hidden_size: int,
        top_k: int,
        experts: int,
        first_large: bool = False,
    ) -> Probe:
        """Make a probe whose tokens choose among `experts` of the experts in `shapes`. Every second token is large.

        Args:
            shapes: shape of each parameter by name. tokens: T. hidden_size: H.
            top_k, experts: experts per token, and experts to choose from.
            first_large: True: the first token is large, the second is not; False: the other way round.
        """
        generator = torch.Generator().manual_seed(0)
        e = next(iter(shapes.values()))[0]
        chosen = torch.randperm(e, generator=generator)[:experts].sort().values
        parameters, few = {}, {}
        for name, shape in shapes.items():
            # Gates around +-4 tell activations and their limits apart.
            spread = 4.0 / hidden_size**0.5 if len(shape) == 3 else 1.0
            few[name] = torch.randn(len(chosen), *shape[1:], generator=generator) * spread
            parameters[name] = _untouched_zeros(shape)
            parameters[name][chosen] = few[name]
        hidden = torch.randn(tokens, hidden_size, generator=generator)
        slots = torch.rand(tokens, len(chosen), generator=generator).argsort(-1)[:, :top_k]
        weights = torch.rand(tokens, top_k, generator=generator) + 0.1
        large = torch.arange(tokens) % 2 == (0 if first_large else 1)
        hidden, weights = (
            torch.where(large[:, None], hidden * LARGE, hidden),
            torch.where(large[:, None], weights * 16, weights),
        )
        return Probe(large, parameters, few, hidden, chosen[slots], slots, weights)

    def distances(self, layout: ExpertLayout, actual: Tensor) -> tuple[float, float]:
        """Largest relative distance of a token from the fp32 oracle: of usual and of large tokens (0 for none)."""
        expected = reference_experts(
            self.hidden, self.slots, self.weights, *layout.canonical(self.few), activation=layout.activation
        )
        by_token = (actual.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
        by_token = torch.where(by_token.isnan(), torch.inf, by_token)
        usual, large = (
            float(part.max()) if len(part) else 0.0 for part in (by_token[~self.large], by_token[self.large])
        )
        return usual, large


def match(results: list[tuple[Probe, Tensor]], layouts: list[ExpertLayout]) -> ExpertLayout:
    """The layout for which the fp32 oracle reproduces the outputs of all probes.

    Raises:
        NotFusable: there is none.
    """
    nearest, limited = math.inf, ""
    for layout in layouts:
        usual, large = (
            max(both) for both in zip(*(probe.distances(layout, out) for probe, out in results), strict=True)
        )
        if max(usual, large) <= PROBE_TOLERANCE:
            return layout
        if usual <= PROBE_TOLERANCE:
            limited = layout.activation
        nearest = min(nearest, max(usual, large))
    if limited:
        raise NotFusable(
            f"computes gated experts with activation {limited} for small gates, but not for large ones: it "
            "limits (clamps) values that fused experts do not"
        )
    raise NotFusable(
        f"computes something else than gated experts with activation {' or '.join(ACTIVATIONS)} "
        f"(nearest relative difference {nearest:.2g})"
    )


def _untouched_zeros(shape: Sequence[int]) -> Tensor:
    """fp32 zeros that take memory only where written; torch.zeros writes all of them."""
    return torch.frombuffer(mmap.mmap(-1, 4 * math.prod(shape)), dtype=torch.float32).reshape(*shape)
