"""Base of both partitioners: fuses the experts in `transform_for_pre_decomposition`."""

from __future__ import annotations

from torch.export.exported_program import ExportedProgram

from .fuser import ExpertFuser, FusionOptions
from .report import FusionReport


class FusingPartitioner:
    """Mixin of a partitioner with an `ExpertFuser`.

    For a program of one method, pass `FusionOptions`. For several methods, pass the same `ExpertFuser` to the
    partitioners of all methods: it packs each layer once, and its report covers all methods.
    """

    fuser: ExpertFuser

    def set_fusion(self, fusion: FusionOptions | ExpertFuser | None) -> None:
        """Set the options, or the shared fuser; None means w4a16 with group size 32."""
        self.fuser = fusion if isinstance(fusion, ExpertFuser) else ExpertFuser(fusion)

    @property
    def report(self) -> FusionReport:
        """All expert regions so far."""
        return self.fuser.report

    def fuse_experts(self, exported_program: ExportedProgram) -> ExportedProgram:
        """Fuse every expert region; see `ExpertFuser.fuse`."""
        return self.fuser.fuse(exported_program)
