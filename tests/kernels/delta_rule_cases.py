"""Random arguments of `gated_delta_net`."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from executorch_moe.kernels.delta_rule.arguments import DeltaRuleArguments, DeltaRuleSizes, RowsDeltaRuleArguments

EPS = 1e-6
TINY = DeltaRuleSizes(2, 4, 16, 32, 4)
QWEN35 = DeltaRuleSizes(16, 32, 128, 128, 4)
LENGTHS = (1, 2, 63, 64, 65, 130)
"""One token, several, and the lengths around chunks of 64."""


class Gates(NamedTuple):
    """Ranges of the gates: added to b, to a, and to a_log."""

    b: float = 0.0
    a: float = 0.0
    a_log: float = 0.0


GATES = {
    "usual": Gates(),
    "open": Gates(b=12.0, a=-20.0),  # beta near 1, hardly any decay
    "closed": Gates(b=-12.0),  # beta near 0
    "strong decay": Gates(a=30.0, a_log=3.0),  # exp of about -600 for each token
}


def make(
    sizes: DeltaRuleSizes,
    tokens: int,
    *,
    position: int = 5,
    dtype: torch.dtype = torch.float32,
    gates: str = "usual",
    seed: int = 0,
) -> DeltaRuleArguments:
    """Arguments on the CPU. At position 0 the states hold NaN, because no result may depend on them."""
    generator = torch.Generator().manual_seed(seed + tokens)
    add = GATES[gates]

    def random(*shape: int, deviation: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator) * deviation

    projected = random(tokens, sizes.columns)
    projected[:, -sizes.value_heads :] += add.a
    projected[:, -2 * sizes.value_heads : -sizes.value_heads] += add.b
    state = random(sizes.value_heads, sizes.key_dim, sizes.value_dim, deviation=0.3)
    conv_state = random(sizes.conv_size, sizes.channels)
    if position == 0:
        state.fill_(torch.nan)
        conv_state.fill_(torch.nan)
    return DeltaRuleArguments(
        projected.to(dtype),
        random(sizes.channels, sizes.conv_size, deviation=0.5).to(dtype),
        random(sizes.value_heads),
        torch.rand(sizes.value_heads, generator=generator) * 2.0 - 1.0 + add.a_log,
        (1.0 + random(sizes.value_dim, deviation=0.1)).to(dtype),
        conv_state.to(dtype),
        state,
        torch.tensor([position]),
        sizes.key_heads,
        sizes.key_dim,
        EPS,
    )


Arguments = TypeVar("Arguments", DeltaRuleArguments, RowsDeltaRuleArguments)


def on(arguments: Arguments, device: str) -> Arguments:
    """The same arguments on another device."""
    return type(arguments)(*(part.to(device) if isinstance(part, Tensor) else part for part in arguments))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference by the norm of the expected values; infinite if a value is not finite."""
    difference = (found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
    return float(difference) if bool(found.isfinite().all()) else float("inf")


def errors(found: tuple[Any, ...], expected: tuple[Any, ...]) -> list[float]:
    """Relative errors of the operator's three results."""
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
    return [relative_error(one, other) for one, other in zip(found, expected, strict=True)]
