"""Loads a model folder layer by layer and packs its experts: memory for the packed model and a few experts.

Experts are read and packed a few at a time, so that memory never holds a whole unpacked layer.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from executorch_moe.backends.fusion import ExpertLayout, FusedLayer, FusionOptions, NotFusable
from executorch_moe.backends.fusion.modules import find_experts, kind_of, pack_layer_codes, recognize_module
from executorch_moe.export.models.linears import stored_int4
from executorch_moe.export.models.pretrained import read_config
from executorch_moe.kernels import SCHEMES, FusedExperts, Int4Codes, PackedExperts, pack_experts
from executorch_moe.kernels.packing.experts import unpack_experts
from executorch_moe.kernels.packing.mxfp4 import Mxfp4Codes
from executorch_moe.kernels.schemes import check_layer_group_size

from .deviation import Deviation
from .plan import CheckpointPlan, below, meta_model
from .shards import ShardReader, Shards
from .sizes import check_sizes
from .stored_codes import KeptCodes, kept_codes, mark_linears, read_codes, read_mxfp4, round_anew
from .structure import Structure, check_structure
from .work_folder import WorkFolder, manifest_of

RUN_BYTES = 32 << 20
"""Bytes in bf16 of the experts to pack at a time, but at most a 16th of a layer. Packing takes about ten times as much
temporary memory."""


@dataclass(frozen=True)
class LayerPlan:
    """The plan for packing one expert layer.

    Attributes:
        name: name of the experts module in the model.
        family: class name of the module.
        layout: its storage order and activation.
        num_experts, top_k, hidden_size, intermediate_size: E, top_k, H and I.
        stored_bytes: bytes of its tensors in the checkpoint.
        kept: how the checkpoint's codes are packed; None if weights are rounded.
    """

    name: str
    family: str
    layout: ExpertLayout
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    stored_bytes: int
    kept: KeptCodes | None = None

    @property
    def exported_name(self) -> str:
        """Name of the module in the exported program, where the model is the attribute `model`."""
        return f"model.{self.name}"


class StreamedModel:
    """A model folder, checked and ready to be loaded with packed experts. The constructor reads headers only.

    Args:
        folder: model folder.
        dtype: dtype of everything but the experts.
        attention: transformers' `attn_implementation`, or a function that chooses it for the model's structure.
        fusion: scheme, group size and algorithm of the experts.

    Attributes:
        model: the model; its parameters are on the meta device until `load`.
        structure: what the model asks of its cache and attention.
        layers: plans of the expert layers, in order.

    Raises:
        ValueError, FileNotFoundError: configuration or weights that are damaged or disagree, a model without experts,
            or a group size that does not divide a width.
        NotImplementedError: unsupported layers, see `check_structure`, or experts; names module and reason.
    """

    def __init__(
        self, folder: Path, dtype: torch.dtype, attention: str | Callable[[Structure], str], fusion: FusionOptions
    ) -> None:
        self.fusion = fusion
        self.shards = Shards(folder)
        check_sizes(read_config(folder), self.shards)
        self.model = meta_model(folder, dtype, attention if isinstance(attention, str) else "eager")
        self.structure = check_structure(self.model)
        if not isinstance(attention, str):
            self.model.set_attn_implementation(attention(self.structure))  # type: ignore[operator]
        self.plan = CheckpointPlan(self.model, self.shards)
        self.layers = list(self._expert_layers())
        if not self.layers:
            raise ValueError(
                f"{type(self.model).__name__} has no experts modules: pass the folder of a Mixture-of-Experts model"
            )

    def _expert_layers(self) -> Iterator[LayerPlan]:
        layouts: dict[tuple[object, ...], ExpertLayout] = {}
        for name, experts in find_experts(self.model):
            kind = kind_of(experts)  # layers of one kind are recognized once
            try:
                if kind not in layouts:
                    layouts[kind] = recognize_module(experts)
                yield self._layer(name, experts, layouts[kind])
            except (NotFusable, ValueError) as error:
                message = f"experts model.{name} ({type(experts).__name__}) not fused: {error}"
                if isinstance(error, ValueError):
                    raise ValueError(message) from error
                raise NotImplementedError(
                    f"{message}: only fused experts are exported from a folder; lower the model from Python, "
                    "with FusionOptions(require_fused=False)"
                ) from error

    def _layer(self, name: str, experts: nn.Module, layout: ExpertLayout) -> LayerPlan:
        _, down, *_ = layout.canonical(dict(experts.named_parameters()))
        num_experts, hidden, intermediate = down.shape
        kept = kept_codes(self.plan, name, layout, self.fusion, (hidden, intermediate))
        if kept is None:
            _check_group_size(self.fusion, hidden, intermediate)
        stored = [self.shards.tensors[source] for source in self.plan.names_below(name)]
        return LayerPlan(
            name=name,
            family=type(experts).__name__,
            layout=layout,
            num_experts=num_experts,
            top_k=self.structure.top_k[name],
            hidden_size=hidden,
            intermediate_size=intermediate,
            stored_bytes=sum(tensor.nbytes for tensor in stored),
            kept=kept,
        )

    def load(
        self,
        work: WorkFolder | None = None,
        on_layer: Callable[[FusedLayer], None] | None = None,
        skip: tuple[str, ...] = (),
    ) -> list[FusedLayer]:
        """Packs the experts and loads all other weights into `model`.

        Args:
            work: folder that stores packed layers and supplies those of an interrupted export; None keeps packed
                layers in memory.
            on_layer: called with the record of each layer.
            skip: names of modules to leave on the meta device.

        Returns:
            One record for each layer.

        Raises:
            ValueError: NaN, Inf, or values that a dtype cannot hold.
        """
        records = []
        for layer in self.layers:
            if any(below(layer.name, module) for module in skip):
                continue
            known = None if work is None else work.load(layer.exported_name)
            if known is None:
                known = self._pack(layer)
                if work is not None:
                    work.save(*known)
                    known = work.load(layer.exported_name) or known  # memory-mapped, to free memory
            record, packed = known
            parent, _, attribute = layer.name.rpartition(".")
            setattr(self.model.get_submodule(parent), attribute, FusedExperts(packed, layer.layout.activation))
            records.append(record)
            if on_layer is not None:
                on_layer(record)
        skip = (*skip, *(layer.name for layer in self.layers))
        self.plan.load(except_below=skip)
        mark_linears(self.plan, self.model, skip)
        return records

    def load_placeholders(self, prepare: Callable[[nn.Module], None] | None = None) -> None:
        """Gives `model` placeholders: weights with shapes and dtypes but no values, enough to trace it.

        It reads no weights, and memory that is never written takes no pages, so that it works for a model of any size.

        Args:
            prepare: changes the model while everything but its experts is on the meta device.
        """
        for layer in self.layers:
            one = self._pack_zeros(layer)
            placeholders = _for_all(one, lambda t: torch.empty(layer.num_experts, *t.shape[1:], dtype=t.dtype))  # noqa: B023
            parent, _, attribute = layer.name.rpartition(".")
            experts = FusedExperts(replace(one, **placeholders), layer.layout.activation)
            setattr(self.model.get_submodule(parent), attribute, experts)
        self.plan.share_weights(self.model)
        mark_linears(self.plan, self.model, tuple(layer.name for layer in self.layers), empty=True)
        if prepare is not None:
            prepare(self.model)
        _fill_with_zeros(self.model)

    def _pack_zeros(self, layer: LayerPlan) -> PackedExperts:
        """One expert of a layer with zeros as weights."""
        parameters = {
            name: torch.zeros(1, *parameter.shape[1:], dtype=parameter.dtype)
            for name, parameter in self.model.get_submodule(layer.name).named_parameters()
        }
        if layer.kept is None:
            return _pack_run(self.fusion, *layer.layout.canonical(parameters))
        codes = {}
        for name in _matrices(layer.layout):
            weight = parameters.pop(name)
            codes[name] = layer.kept.empty(weight.transpose(1, 2) if layer.layout.transposed else weight)
        return pack_layer_codes(layer.layout, codes, parameters, self.fusion.scheme)

    def manifest(self) -> dict[str, Any]:
        """Everything on which the packed layers depend, for `WorkFolder`."""
        declared = "" if self.shards.format is None else str(self.shards.format)
        return manifest_of(self.shards, {**asdict(self.fusion), "format": declared})

    def _pack(self, layer: LayerPlan) -> tuple[FusedLayer, PackedExperts]:
        """Packs one layer, a few experts at a time."""
        count = layer.num_experts
        whole: PackedExperts | None = None
        deviation = None if self.shards.format is None else Deviation()
        step = self._run_length(layer)
        for start in range(0, count, step):
            run = slice(start, min(start + step, count))
            # One reader for each run frees the files' pages before the next run is read.
            with self.shards.reader() as reader:
                part = self._pack_part(reader, layer, run, deviation)
            if whole is None:
                whole = replace(part, **_for_all(part, lambda t: t.new_empty(count, *t.shape[1:])))
            for into, of in zip(whole.tensors().values(), part.tensors().values(), strict=True):
                if into is not None and of is not None:
                    into[run] = of
        assert whole is not None
        record = FusedLayer.of(
            layer.exported_name,
            layer.family,
            whole,
            top_k=layer.top_k,
            activation=layer.layout.activation,
            algorithm=self._algorithm(layer),
            bytes_before=layer.stored_bytes,
            bytes_after=whole.nbytes(),
            error=None if deviation is None else deviation.relative(),
        )
        return record, whole

    def _algorithm(self, layer: LayerPlan) -> str:
        """How the weights of a layer were rounded, for its record."""
        if layer.kept is None:
            return self.fusion.algorithm
        whole = len(layer.kept.names) == len(_matrices(layer.layout))
        return "kept" if whole else f"kept, {self.fusion.algorithm}"

    def _pack_part(
        self, reader: ShardReader, layer: LayerPlan, run: slice, deviation: Deviation | None
    ) -> PackedExperts:
        """Reads and packs experts `run` of a layer."""
        if layer.kept is not None:
            return self._pack_codes(reader, layer, layer.kept, run, deviation)
        weights = layer.layout.canonical(self._read(reader, layer.name, run))
        with _named(layer):
            part = _pack_run(self.fusion, *weights, first_expert=run.start)
        if deviation is not None:
            for actual, expected in zip(unpack_experts(part), weights[:2], strict=True):
                deviation.add(actual, expected)
        return part

    def _pack_codes(
        self, reader: ShardReader, layer: LayerPlan, kept: KeptCodes, run: slice, deviation: Deviation | None
    ) -> PackedExperts:
        codes: dict[str, Int4Codes | Mxfp4Codes] = {}
        for name in _matrices(layer.layout):
            target = f"{layer.name}.{name}"
            if kept.microscaled:
                codes[name] = read_mxfp4(self.plan, reader, target, run)
            elif name in kept.names:
                exact = read_codes(self.plan, reader, target, run, kept)
                rounded = codes[name] = exact.rounded()
                if deviation is not None:
                    deviation.add_rounded(rounded, exact)
            else:
                expected = self.plan.read_experts(reader, target, run)
                if layer.layout.transposed:
                    expected = expected.transpose(1, 2)
                codes[name] = round_anew(expected, kept, self.fusion)
                if deviation is not None:
                    deviation.add(codes[name].dequantize(), expected)
        biases = {
            name: self.plan.read_experts(reader, f"{layer.name}.{name}", run)
            for name in (layer.layout.gate_up_bias, layer.layout.down_bias)
            if name is not None
        }
        with _named(layer):
            return pack_layer_codes(layer.layout, codes, biases, self.fusion.scheme)

    def _run_length(self, layer: LayerPlan) -> int:
        """Number of experts to pack at a time: all, if the checkpoint's tensors cannot be read in parts."""
        if not all(self.plan.can_read_runs(target) for target in self.plan.targets_below(layer.name)):
            return layer.num_experts
        expert_bytes = 2 * 3 * layer.hidden_size * layer.intermediate_size
        return max(1, min(RUN_BYTES // expert_bytes, layer.num_experts // 16))

    def _read(self, reader: ShardReader, module: str, run: slice) -> dict[str, Tensor]:
        """Reads the parameters of experts `run` of a module: name in the module -> tensor."""
        return {
            target.removeprefix(f"{module}."): self.plan.read_experts(reader, target, run)
            for target in self.plan.targets_below(module)
        }


@contextlib.contextmanager
def _named(layer: LayerPlan) -> Iterator[None]:
    """Names the layer in errors of packing."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"experts {layer.exported_name} ({layer.family}) not packed: {error}") from error


def _matrices(layout: ExpertLayout) -> tuple[str, ...]:
    """Names of the matrices of an experts module."""
    return *layout.gate_up, layout.down


def _fill_with_zeros(model: nn.Module) -> None:
    """Replaces tensors on the meta device by zeros; shared tensors remain shared."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        if (stored := stored_int4(module)) is not None:
            module.stored_int4 = stored.map(_zeros)  # type: ignore[assignment]
        for name, tensor in module._parameters.items():
            if tensor is not None and tensor.is_meta:
                if id(tensor) not in made:
                    made[id(tensor)] = nn.Parameter(_zeros(tensor), requires_grad=False)
                module._parameters[name] = made[id(tensor)]  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = made.setdefault(id(buffer), _zeros(buffer))


def _zeros(like: Tensor) -> Tensor:
    """Zeros on the CPU whose pages are allocated on the first write; torch.zeros writes all of them."""
    if like.numel() == 0:
        return torch.empty(like.shape, dtype=like.dtype)
    return torch.frombuffer(mmap.mmap(-1, like.numel() * like.element_size()), dtype=like.dtype).reshape(like.shape)


def _check_group_size(fusion: FusionOptions, hidden_size: int, intermediate_size: int) -> None:
    if SCHEMES[fusion.scheme].packed:
        check_layer_group_size(fusion.group_size, hidden_size, intermediate_size)


def _pack_run(
    fusion: FusionOptions,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    first_expert: int = 0,
) -> PackedExperts:
    """Packs some experts of a layer, of which the first has number `first_expert`."""
    return pack_experts(
        gate_up,
        down,
        scheme=fusion.scheme,
        group_size=fusion.group_size,
        algorithm=fusion.algorithm,
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        first_expert=first_expert,
    )


def _for_all(packed: PackedExperts, make: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {name: None if tensor is None else make(tensor) for name, tensor in packed.tensors().items()}
