"""`ExpertFuser`: replaces expert regions of exported programs with `fused_experts` on packed weights."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

from torch import Tensor
from torch.export.exported_program import ExportedProgram

from executorch_moe.kernels import PackedExperts
from executorch_moe.kernels.packing.rounding import check_algorithm
from executorch_moe.kernels.schemes import check_any_group_size, get_scheme

from .complex_numbers import without_complex_numbers
from .modules import pack_layer
from .recognize import ExpertLayout, Roles, find_roles, fingerprint, recognize
from .regions import NotFusable, NotPackable, Region, find_regions, parameter_targets, tensor_of
from .report import FusedLayer, FusionReport, UnfusedRegion
from .rewrite import ProgramEditor


@dataclass(frozen=True)
class FusionOptions:
    """How to fuse.

    Attributes:
        scheme: "w4a16", "w4a8", "mxfp4" or "bf16".
        group_size: number of weights that share one scale; must divide hidden size and expert width. Not used by bf16.
        algorithm: rounding to 4 bits, "minmax" or "hqq"; see `kernels.packing.rounding`.
        require_fused: True: an expert region that cannot be fused is an error. False: it stays unfused and is reported.

    Raises:
        ValueError: the scheme or algorithm is unknown, or another value is never valid.
    """

    scheme: str = "w4a16"
    group_size: int = 32
    require_fused: bool = True
    algorithm: str = "minmax"

    def __post_init__(self) -> None:
        kind = get_scheme(self.scheme)
        check_algorithm(self.algorithm)
        if kind.packed:
            if not isinstance(self.group_size, int):
                raise ValueError(f"group_size={self.group_size!r} is not an integer: write group_size=32")
            check_any_group_size(self.group_size, self.scheme)
        if not isinstance(self.require_fused, bool):
            raise ValueError(f"require_fused={self.require_fused!r} is neither True nor False: write one of them")


@dataclass
class _Packed:
    sources: list[weakref.ref[Tensor]]
    weights: PackedExperts


class ExpertFuser:
    """Fuses the programs of one model. Layers that several methods share are packed once and keep one name.

    Attributes:
        options: how to fuse.
        report: all expert regions so far, of all programs.

    Raises:
        TypeError: `options` is not a `FusionOptions`.
    """

    def __init__(self, options: FusionOptions | None = None) -> None:
        if not isinstance(options, FusionOptions | None):
            raise TypeError(
                f"fusion is given as a {type(options).__name__}, expected FusionOptions or an ExpertFuser: write "
                "FusionOptions('w4a16', group_size=32)"
            )
        self.options = FusionOptions() if options is None else options
        self.report = FusionReport()
        self._packed: dict[tuple[object, ...], _Packed] = {}
        self._layouts: dict[str, ExpertLayout | str] = {}

    def fuse(self, program: ExportedProgram) -> ExportedProgram:
        """Return the program with its expert regions fused and without complex numbers, or `program` itself if it has
        neither. Does not edit it.

        Packed weights are new buffers, named after the experts module: `model.layers.0.mlp.experts.packed_w13`. The
        unpacked parameters are removed unless other nodes read them.

        Raises:
            NotImplementedError: with `require_fused`, a region cannot be fused; the message names module and reason.
        """
        program = without_complex_numbers(program)
        if not find_regions(program):
            return program
        editor = ProgramEditor(program)
        for region in find_regions(editor.program):
            try:
                layer = self._fuse_region(editor, region)
            except NotFusable as error:
                if self.options.require_fused:
                    message = f"experts {region.module} ({region.family}) not fused: {error}"
                    if not isinstance(error, NotPackable):  # for those, other options are the better remedy
                        message += ". FusionOptions(require_fused=False) leaves such experts unfused"
                    raise NotImplementedError(message) from error
                self.report.add(UnfusedRegion(region.module, region.family, str(error)))
            else:
                self.report.add(layer)
        return editor.finish()

    def _fuse_region(self, editor: ProgramEditor, region: Region) -> FusedLayer:
        region.output()
        roles = find_roles(region)
        layout = self._layout(region, roles)
        targets = parameter_targets(editor.program)
        sources = {name: editor.tensor(targets[node.name]) for name, node in region.parameters.items()}
        packed = self._pack(region, layout, sources)
        ids = tensor_of(roles.ids)
        assert ids is not None
        editor.replace(region, roles, packed, layout.activation)
        return FusedLayer.of(
            region.module,
            region.family,
            packed,
            top_k=int(ids.shape[1]),
            activation=layout.activation,
            algorithm=self.options.algorithm,
            bytes_before=sum(tensor.nbytes for tensor in sources.values()),
            bytes_after=packed.nbytes(),
        )

    def _layout(self, region: Region, roles: Roles) -> ExpertLayout:
        """`recognize`, called once for all regions with the same fingerprint."""
        key = fingerprint(region, roles)
        if key not in self._layouts:
            try:
                self._layouts[key] = recognize(region, roles)
            except NotFusable as error:
                self._layouts[key] = str(error)
        layout = self._layouts[key]
        if isinstance(layout, str):
            raise NotFusable(layout)
        return layout

    def _pack(self, region: Region, layout: ExpertLayout, sources: dict[str, Tensor]) -> PackedExperts:
        key = (region.module, layout, *((name, t.data_ptr(), t.dtype, tuple(t.shape)) for name, t in sources.items()))
        known = self._packed.get(key)
        # Addresses identify tensors only while the tensors are alive.
        if known is not None and all(source() is not None for source in known.sources):
            return known.weights
        options = self.options
        try:
            weights = pack_layer(layout, sources, options.scheme, options.group_size, options.algorithm)
        except ValueError as error:
            raise NotPackable(str(error)) from error
        self._packed[key] = _Packed([weakref.ref(source) for source in sources.values()], weights)
        return weights
