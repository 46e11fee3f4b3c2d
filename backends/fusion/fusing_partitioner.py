"""What both targets' partitioners share: fusing in `transform_for_pre_decomposition`."""

from __future__ import annotations

from torch.export.exported_program import ExportedProgram

from .fuser import ExpertFuser, FusionOptions
from .report import FusionReport


class FusingPartitioner:
    """Mixin of a partitioner: `fusion` says how experts are fused.

    Pass `FusionOptions` for a program of one method. For several methods pass the partitioners of all of them one
    `ExpertFuser`: it packs each layer once, and its report covers them all.
    """

    fuser: ExpertFuser

    def set_fusion(self, fusion: FusionOptions | ExpertFuser | None) -> None:
        """Take the options, or the fuser to share; None: w4a16 with group size 32."""
        self.fuser = fusion if isinstance(fusion, ExpertFuser) else ExpertFuser(fusion)

    @property
    def report(self) -> FusionReport:
        """What was fused so far."""
        return self.fuser.report

    def fuse_experts(self, exported_program: ExportedProgram) -> ExportedProgram:
        """Fuse every expert region; see `ExpertFuser.fuse`."""
        return self.fuser.fuse(exported_program)
