"""`MoECpuPartitioner`: fused experts as ATen for ExecuTorch's CPU runtime."""

from __future__ import annotations

from collections.abc import Callable

import torch
from executorch.exir.backend.partitioner import Partitioner, PartitionResult
from torch.export.exported_program import ExportedProgram
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from executorch_moe.backends.fusion import ExpertFuser, FusingPartitioner, FusionOptions, FusionReport
from executorch_moe.backends.fusion.regions import find_regions

from .decompositions import lacking, replaced

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
        """Fuse the experts, then decompose the fused operator and the dequantization of 8-bit and 4-bit weights.

        ExecuTorch's own decompositions handle all other operators.

        Raises:
            NotImplementedError: experts cannot be fused (with `require_fused`), or unfused experts use operators for
                which ExecuTorch has no CPU kernel.
        """
        exported_program = self.fuse_experts(exported_program)
        if self.report.unfused:
            _check_unfused(exported_program, self.report)
        table = replaced()
        quantized = any(is_traceable_wrapper_subclass(tensor) for tensor in exported_program.state_dict.values())
        if not quantized and not any(node.target in table for node in exported_program.graph.nodes):
            return exported_program
        return exported_program.run_decompositions({**table, **lacking()})

    def ops_to_not_decompose(
        self, ep: ExportedProgram
    ) -> tuple[list[torch._ops.OpOverload], Callable[[torch.fx.Node], bool] | None]:
        """Linear layers of a program in ATen: decomposed, each call would transpose their weights.

        Returns:
            Nothing for a program in the Edge dialect, which ExecuTorch asks about to check that others took over what
            was kept.
        """
        kept = [torch.ops.aten.linear.default]
        return [op for op in kept if any(node.target is op for node in ep.graph.nodes)], None

    def partition(self, exported_program: ExportedProgram) -> PartitionResult:
        """Tag nothing."""
        return PartitionResult(tagged_exported_program=exported_program, partition_tags={})
