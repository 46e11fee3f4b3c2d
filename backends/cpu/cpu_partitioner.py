"""`MoECpuPartitioner`: fused experts as ATen for ExecuTorch's CPU runtime."""

from __future__ import annotations

from collections.abc import Callable

import torch
from executorch.exir.backend.partitioner import Partitioner, PartitionResult
from torch.export.exported_program import ExportedProgram

from executorch_moe.backends.fusion import ExpertFuser, FusingPartitioner, FusionOptions, FusionReport
from executorch_moe.backends.fusion.regions import find_regions

from .decompositions import KEPT_WHOLE, decompose

_WITHOUT_KERNEL = {"aten.histc", "aten._grouped_mm", "transformers.grouped_mm_fallback"}
"""Operators of transformers' experts (experts_implementation="grouped_mm") for which ExecuTorch has no CPU kernel."""


def _check_unfused(program: ExportedProgram, report: FusionReport) -> None:
    """Check that unfused experts can run. Those of transformers' default implementation cannot.

    Raises:
        NotImplementedError: experts use operators for which ExecuTorch has no CPU kernel; names the first module.
    """
    reasons = {region.module: region.reason for region in report.unfused}
    for region in find_regions(program):
        if lacking := sorted({str(node.target).removesuffix(".default") for node in region.nodes} & _WITHOUT_KERNEL):
            raise NotImplementedError(
                f"experts {region.module} ({region.family}) are not fused ({reasons[region.module]}), "
                f"and ExecuTorch's CPU runtime has no {', '.join(lacking)}: change what keeps them from being "
                "fused, or load the model with experts_implementation='batched_mm'"
            )


class MoECpuPartitioner(FusingPartitioner, Partitioner):
    """Replaces `fused_experts` with plain ATen and delegates nothing: the program runs on ExecuTorch's CPU kernels.

    It first fuses the experts of unmodified models, like `MoECudaPartitioner`.

    Args:
        fusion: scheme and group size (None: w4a16, 32), or the `ExpertFuser` that all methods of a program share.
    """

    def __init__(self, fusion: FusionOptions | ExpertFuser | None = None) -> None:
        super().__init__()
        self.set_fusion(fusion)

    def transform_for_pre_decomposition(self, exported_program: ExportedProgram) -> ExportedProgram:
        """Fuse the experts, then decompose the fused operator, attention, and dequantization; see `decompose`.

        Raises:
            NotImplementedError: experts cannot be fused (with `require_fused`), or unfused experts use operators for
                which ExecuTorch has no CPU kernel.
        """
        exported_program = self.fuse_experts(exported_program)
        if self.report.unfused:
            _check_unfused(exported_program, self.report)
        return decompose(exported_program)

    def ops_to_not_decompose(
        self, ep: ExportedProgram
    ) -> tuple[list[torch._ops.OpOverload], Callable[[torch.fx.Node], bool] | None]:
        """The operators of `KEPT_WHOLE` that a program in ATen has.

        For a program in the Edge dialect there are none: ExecuTorch asks again after lowering, and refuses operators
        that no backend has taken.
        """
        return [op for op in KEPT_WHOLE if any(node.target is op for node in ep.graph.nodes)], None

    def partition(self, exported_program: ExportedProgram) -> PartitionResult:
        """Tag nothing."""
        return PartitionResult(tagged_exported_program=exported_program, partition_tags={})
