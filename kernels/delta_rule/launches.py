"""`gated_delta_net` as launches of the Triton kernels."""

from __future__ import annotations

from torch import Tensor

from .arguments import DeltaRuleArguments


def run_gated_delta_net(arguments: DeltaRuleArguments) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError("gated_delta_net runs on the CPU only")
