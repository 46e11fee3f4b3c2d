"""Random weights and inputs for an expert layer, and the layout with which the fp32 oracle gives the layer's output."""

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

# fp32 sums in two orders; the nearest wrong answer (another activation, another alpha) is 100 times further away.
PROBE_TOLERANCE = 1e-4
LARGE = 1024.0
"""Gates of every second token of a probe are around +-4 x LARGE: limits up to about 10,000 change the result. Trained
models' gates reach hundreds; a limit beyond what fp16 holds is none."""


@dataclass(frozen=True)
class Probe:
    """Random weights and inputs for an expert layer, all fp32.

    Attributes:
        large: bool [T], tokens whose hidden states and routing weights are large.
        parameters: by name, in full size; experts that no token chooses are zeros that take no memory.
        few: the experts that may be chosen, by name.
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
        """A probe whose tokens choose among `experts` experts, of those in `shapes`; every second token is large.

        Args:
            first_large: the first token is, and the second is not.
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
        """Largest relative distance of a token from the fp32 oracle, of tokens that are not large and of those that
        are; 0 if there are none."""
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
    """The layout with which the fp32 oracle gives the outputs of all probes.

    Raises:
        NotFusable: none.
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
            f"computes gated experts with activation {limited} where gates are small, but not where they are large: it "
            "limits (clamps) what fused experts would not"
        )
    raise NotFusable(
        f"computes something else than gated experts with activation {' or '.join(ACTIVATIONS)} "
        f"(nearest relative difference {nearest:.2g})"
    )


def _untouched_zeros(shape: Sequence[int]) -> Tensor:
    """fp32 zeros that take memory only where written; torch.zeros writes them all."""
    return torch.frombuffer(mmap.mmap(-1, 4 * math.prod(shape)), dtype=torch.float32).reshape(*shape)
