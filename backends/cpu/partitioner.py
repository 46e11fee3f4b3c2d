"""`MoECpuPartitioner`: fused experts as ATen for ExecuTorch's CPU runtime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from executorch.exir.backend.partitioner import Partitioner, PartitionResult
from torch import Tensor
from torch.export.exported_program import ExportedProgram

from executorch_moe.backends.fusion import ExpertFuser, FusingPartitioner, FusionOptions
from executorch_moe.kernels import fused_experts as _fused_experts  # noqa: F401  registers torch.ops.executorch_moe
from executorch_moe.kernels.aten import fused_experts_aten


def _right_shift(x: Tensor, bits: int) -> Tensor:
    """x >> bits for integers; shifts are not Core ATen, so ExecuTorch's verifier refuses them in a program."""
    return torch.div(x, 2**bits, rounding_mode="floor")


def _zeros(size: Sequence[int], **kwargs: Any) -> Tensor:
    """empty(size) with values: ExecuTorch 1.5's `_empty_dim_order` silently fixes symbolic sizes."""
    kept = {name: kwargs[name] for name in ("dtype", "device") if kwargs.get(name) is not None}
    return torch.full(size, 0, **{"dtype": torch.get_default_dtype(), **kept})


def _zeros_for(x: Tensor, size: Sequence[int], **kwargs: Any) -> Tensor:
    return _zeros(size, **{"dtype": x.dtype, "device": x.device, **kwargs})


def _zeros_like(x: Tensor, **kwargs: Any) -> Tensor:
    return _zeros_for(x, x.shape, **kwargs)


class MoECpuPartitioner(FusingPartitioner, Partitioner):
    """Replaces `fused_experts` by plain ATen and delegates nothing: the program runs on ExecuTorch's CPU kernels.

    Experts that are not fused yet are fused first, as by `MoECudaPartitioner`.

    Args:
        fusion: scheme and group size, or the fuser that all methods of a program share.
    """

    def __init__(self, fusion: FusionOptions | ExpertFuser | None = None) -> None:
        super().__init__()
        self.set_fusion(fusion)

    def transform_for_pre_decomposition(self, exported_program: ExportedProgram) -> ExportedProgram:
        """Fuse, then decompose the fused operator; other operators are left to ExecuTorch's own decompositions.

        Raises:
            NotImplementedError: experts that cannot be fused, unless `require_fused` is off.
        """
        exported_program = self.fuse_experts(exported_program)
        op = torch.ops.executorch_moe.fused_experts.default
        if not any(node.target is op for node in exported_program.graph.nodes):
            return exported_program
        table = {
            op: fused_experts_aten,
            torch.ops.aten.empty.memory_format: _zeros,
            torch.ops.aten.new_empty.default: _zeros_for,
            torch.ops.aten.empty_like.default: _zeros_like,
            torch.ops.aten.__rshift__.Scalar: _right_shift,
            torch.ops.aten.bitwise_right_shift.Tensor_Scalar: _right_shift,
        }
        return exported_program.run_decompositions(table)

    def partition(self, exported_program: ExportedProgram) -> PartitionResult:
        """Tag nothing."""
        return PartitionResult(tagged_exported_program=exported_program, partition_tags={})
