"""The arguments of `fused_experts`, spelled out once: for its signature, its checks, its ATen forms and its kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class ExpertMatrix(NamedTuple):
    """The packed weights of one GEMM; shapes as for the fields of `packing.PackedExperts`."""

    weight: Tensor
    scale: Tensor | None
    zero: Tensor | None
    bias: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> ExpertMatrix:
        """Applies the same function to all tensors that are not None."""
        return ExpertMatrix(
            function(self.weight), *(None if tensor is None else function(tensor) for tensor in self[1:])
        )


class ExpertArguments(NamedTuple):
    """Arguments of `op.fused_experts`, in its order; its docstring gives shapes and dtypes."""

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
    shared: Tensor | None = None
    share: Tensor | None = None
    shared_down: Tensor | None = None
    shared_down_scale: Tensor | None = None

    def matrix(self, gemm: int) -> ExpertMatrix:
        """The weights of GEMM `gemm`, 1 or 2."""
        if gemm == 1:
            return ExpertMatrix(self.w13, self.w13_scale, self.w13_zero, self.w13_bias)
        return ExpertMatrix(self.w2, self.w2_scale, self.w2_zero, self.w2_bias)


TENSORS = ExpertArguments._fields[3:11]
"""Names of the tensors of a packed layer, w13 to w2_bias, in the operator's argument order."""
