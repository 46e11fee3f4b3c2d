"""4-bit codes of quantized checkpoints: which weights keep them, and how they are read."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from executorch_moe.backends.fusion import ExpertLayout, FusionOptions
from executorch_moe.export.models.linears import StoredInt4
from executorch_moe.kernels import SCHEMES, Int4Codes
from executorch_moe.kernels.packing.mxfp4 import E8M0_BIAS, Mxfp4Codes
from executorch_moe.kernels.packing.rounding import round_weights
from executorch_moe.kernels.schemes import MX_GROUP, check_layer_group_size

from .formats import StoredTensor, WeightFormat
from .formats.int4 import Int4Encoding
from .plan import CheckpointPlan, Source
from .shards import ShardReader, Shards

# Conversions of transformers that move whole rows: they can be applied to codes and to scales.
_MOVES_ROWS = ("MergeModulelist", "Concatenate")


@dataclass(frozen=True)
class KeptCodes:
    """How the codes of one expert layer are packed.

    Attributes:
        group_size: weights along K that share a scale.
        zeros: True if the weights have zero points.
        names: of the layer's matrices whose codes are kept; others are rounded to the same group size.
        microscaled: True for MXFP4; `names` are all matrices.
    """

    group_size: int
    zeros: bool
    names: frozenset[str]
    microscaled: bool = False

    def empty(self, weight: Tensor) -> Int4Codes | Mxfp4Codes:
        """Codes of zeros in the shape of a weight [E, N, K]."""
        *rows, k = weight.shape
        if self.microscaled:
            scale = torch.full((*rows, k // self.group_size), E8M0_BIAS, dtype=torch.uint8)
            return Mxfp4Codes(torch.zeros(weight.shape, dtype=torch.uint8), scale)
        scale = torch.zeros(*rows, k // self.group_size)
        return Int4Codes(
            torch.zeros(weight.shape, dtype=torch.int8), scale, torch.zeros_like(scale) if self.zeros else None
        )


def kept_codes(
    plan: CheckpointPlan, module: str, layout: ExpertLayout, fusion: FusionOptions, sizes: tuple[int, int]
) -> KeptCodes | None:
    """How to keep the codes of an experts module; None if its weights must be rounded.

    Reads no weights, only `g_idx` if the checkpoint has it.

    Args:
        plan: of the checkpoint.
        module: name of the experts module.
        layout: of the module.
        fusion: scheme of the packed weights.
        sizes: H and I.

    Raises:
        ValueError: groups of weights that are not consecutive, or a layer in several formats.
    """
    if plan.shards.format is None:
        return None
    if SCHEMES[fusion.scheme].microscaled:
        return _kept_mxfp4(plan, module, layout)
    if not SCHEMES[fusion.scheme].packed:
        return None
    found: dict[str, list[StoredTensor]] = {}
    for name in (*layout.gate_up, layout.down):
        source = plan.sources[f"{module}.{name}"]
        found[name] = [plan.shards.tensors[stored] for stored in source.all_names()]
    if not plan.shards.format.mixed:
        _check_alike(plan.shards.format, [stored for some in found.values() for stored in some])
    names = frozenset(
        name
        for name, some in found.items()
        if _keeps_rows(plan.sources[f"{module}.{name}"], layout) and all(_group_size(stored) for stored in some)
    )
    coded = [stored for name in names for stored in found[name]]
    if not names or (
        fusion.scheme == "w4a8" and (layout.transposed or not (len(names) == len(found) and _one_scale_a_row(coded)))
    ):
        return None
    group_size = math.gcd(*map(_group_size, coded))
    try:
        check_layer_group_size(group_size, *sizes)
    except ValueError:
        return None
    with plan.shards.reader() as reader:
        for name in filter(names.__contains__, found):
            for stored in plan.sources[f"{module}.{name}"].all_names():
                _check_order(plan, reader, stored)
    zeros = any(stored.encoding is not None and not stored.encoding.symmetric for stored in coded)
    # HQQ fits zero points, so matrices that are rounded with it have them.
    return KeptCodes(group_size, zeros or (len(names) < len(found) and fusion.algorithm == "hqq"), names)


def _kept_mxfp4(plan: CheckpointPlan, module: str, layout: ExpertLayout) -> KeptCodes | None:
    """`kept_codes` for scheme mxfp4: all matrices of the layer are stored in MXFP4, one for each expert or stacked."""
    names = frozenset((*layout.gate_up, layout.down))
    for name in names:
        source = plan.sources[f"{module}.{name}"]
        encodings = [plan.shards.tensors[stored].encoding for stored in source.all_names()]
        if not all(encoding is not None and encoding.microscaled for encoding in encodings):
            return None
        if not _keeps_rows(source, layout):
            return None
    return KeptCodes(MX_GROUP, False, names, microscaled=True)


def usual_scheme(folder: Path) -> str:
    """The scheme for a checkpoint for which none is given: mxfp4 if its experts are stored in MXFP4, else w4a16.

    Reads headers only. Damaged checkpoints get w4a16: whoever loads them reports the damage.
    """
    try:
        tensors = Shards(folder).tensors
    except (ValueError, OSError, NotImplementedError):
        return "w4a16"
    experts = [stored for name, stored in tensors.items() if ".experts." in name and not name.endswith("bias")]
    kept = experts and all(stored.encoding is not None and stored.encoding.microscaled for stored in experts)
    return "mxfp4" if kept else "w4a16"


def read_mxfp4(plan: CheckpointPlan, reader: ShardReader, target: str, run: slice) -> Mxfp4Codes:
    """Reads experts `run` of a stacked weight as MXFP4 codes [E, N, K]."""
    source = plan.sources[target]
    if source.converter is None:
        return reader.read_mxfp4(source.all_names()[0], run)
    codes = {pattern: [reader.read_mxfp4(name) for name in names[run]] for pattern, names in source.names.items()}

    def made(part: str) -> Tensor:
        parts = {pattern: [getattr(code, part) for code in some] for pattern, some in codes.items()}
        return plan.convert(source, parts)[target]

    return Mxfp4Codes(made("q"), made("scale"))


def _check_alike(declared: WeightFormat, stored: list[StoredTensor]) -> None:
    """Checks that all matrices of a layer are stored in one format.

    Raises:
        ValueError: they are not.
    """
    kinds = {type(tensor.encoding): tensor for tensor in stored}
    if len(kinds) > 1:
        first, second = list(kinds.values())[:2]
        raise ValueError(
            f"{first.name} is stored as {first.dtype}, but {second.name} as {second.dtype} ({declared}): a mix of "
            "formats in one layer is not supported; use the model in bf16"
        )


def _group_size(stored: StoredTensor) -> int:
    return 0 if stored.encoding is None else stored.encoding.group_size


def _check_order(plan: CheckpointPlan, reader: ShardReader, name: str) -> None:
    """Checks that the codes of a stored weight can be kept; reads the order of its groups.

    Raises:
        ValueError: groups of weights that are not consecutive.
    """
    stored = plan.shards.tensors[name]
    if "group_of" in stored.parts and isinstance(stored.encoding, Int4Encoding):
        group_of = stored.encoding.order(reader.read_part(name, "group_of"), stored.shape[-1])
        if group_of is not None:
            stored.encoding.order_of_groups(group_of)


def round_anew(weight: Tensor, kept: KeptCodes, fusion: FusionOptions) -> Int4Codes:
    """Rounds a matrix [E, N, K] of a layer whose other matrices keep their codes."""
    scheme = SCHEMES[fusion.scheme]
    codes = round_weights(weight, kept.group_size, fusion.algorithm, kept.zeros and scheme.takes_zeros)
    return codes if codes.zero is not None or not kept.zeros else replace(codes, zero=torch.zeros_like(codes.scale))


def read_codes(plan: CheckpointPlan, reader: ShardReader, target: str, run: slice, kept: KeptCodes) -> Int4Codes:
    """Reads experts `run` of a stacked weight as codes [E, N, K] with the groups of `kept`; scales are in fp32."""

    def fitted(code: Int4Codes) -> Int4Codes:
        code = code.regrouped(kept.group_size)
        # Other matrices of the layer, or other rows of this one, may have zero points.
        return replace(code, zero=torch.zeros_like(code.scale)) if kept.zeros and code.zero is None else code

    source = plan.sources[target]
    if source.converter is None:
        return fitted(reader.read_codes(source.all_names()[0], run))
    codes = {
        pattern: [fitted(reader.read_codes(name)) for name in names[run]] for pattern, names in source.names.items()
    }

    def made(part: str) -> Tensor:
        parts: dict[str, Any] = {pattern: [getattr(code, part) for code in some] for pattern, some in codes.items()}
        return plan.convert(source, parts)[target]

    return Int4Codes(made("q"), made("scale"), made("zero") if kept.zeros else None)


def mark_linears(plan: CheckpointPlan, model: nn.Module, skip: tuple[str, ...] = (), *, empty: bool = False) -> None:
    """Gives linear layers that are stored as 4-bit codes their `StoredInt4`, in place.

    Args:
        plan: of the checkpoint.
        model: its model.
        skip: names of modules to leave alone.
        empty: scales without values, for a model on the meta device.
    """
    for target, source in plan.sources.items():
        name = source.all_names()[0]
        encoding = plan.shards.tensors[name].encoding
        module = model.get_submodule(target.rpartition(".")[0])
        if type(module) is not nn.Linear or encoding is None or not encoding.group_size or source.converter is not None:
            continue
        if any(target.startswith(f"{part}.") for part in skip):
            continue
        with plan.shards.reader() as reader:
            try:
                _check_order(plan, reader, name)
            except ValueError:  # dequantizing needs no order of groups
                continue
        if empty:
            scale = torch.empty(module.out_features, module.in_features // encoding.group_size, dtype=torch.bfloat16)
            scale = scale.to("meta")
            zero = None if encoding.symmetric else scale
        else:
            with plan.shards.reader() as reader:
                codes = reader.read_codes(name).rounded()
            scale, zero = codes.scale, codes.zero
        module.stored_int4 = StoredInt4(scale, zero)  # type: ignore[assignment]


def _one_scale_a_row(stored: list[StoredTensor]) -> bool:
    """True if each row of each weight is one group without zero points: `w4a8` takes any such scale."""
    return all(
        tensor.encoding is not None and tensor.encoding.symmetric and _group_size(tensor) == tensor.shape[-1]
        for tensor in stored
    )


def _keeps_rows(source: Source, layout: ExpertLayout) -> bool:
    """True if the rows of stored codes are those of the packed weight: stored in one piece, or merged by rows."""
    return source.converter is None or (_moves_rows(source) and not layout.transposed)


def _moves_rows(source: Source) -> bool:
    return (
        source.stacks_experts()
        and all(type(operation).__name__ in _MOVES_ROWS for operation in source.converter.operations)
        and all(getattr(operation, "dim", 0) in (0, 1) for operation in source.converter.operations)
    )
