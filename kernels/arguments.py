"""The operator's arguments under their names, once for all that take them: checks, ATen forms and Triton kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class ExpertMatrix(NamedTuple):
    """The packed weights of one GEMM with what belongs to them; fields of `packing.PackedExperts`."""

    weight: Tensor
    scale: Tensor | None
    zero: Tensor | None
    bias: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> ExpertMatrix:
        """The same function applied to all tensors that are there."""
        return ExpertMatrix(
            function(self.weight), *(None if tensor is None else function(tensor) for tensor in self[1:])
        )


class ExpertArguments(NamedTuple):
    """Arguments of `op.fused_experts`, in its order; shapes and dtypes stand there."""

    hidden_states: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    w13: Tensor
    w2: Tensor
    w13_scale: Tensor | None
    w2_scale: Tensor | None
    w13_zero: Tensor | None
    w2_zero: Tensor | None
    w13_bias: Tensor | None
    w2_bias: Tensor | None
    scheme: str
    activation: str
    group_size: int

    def matrix(self, gemm: int) -> ExpertMatrix:
        """The weights of GEMM `gemm`, 1 or 2."""
        if gemm == 1:
            return ExpertMatrix(self.w13, self.w13_scale, self.w13_zero, self.w13_bias)
        return ExpertMatrix(self.w2, self.w2_scale, self.w2_zero, self.w2_bias)
