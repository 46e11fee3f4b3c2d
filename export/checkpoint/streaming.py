"""Model folder -> model with packed experts, layer by layer: never more than the packed model and a few experts.

Experts are read and packed in runs of a few, so that not even one layer is ever in memory unpacked.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from executorch_moe.backends.fusion import ExpertLayout, FusedLayer, FusionOptions, NotFusable
from executorch_moe.backends.fusion.modules import find_experts, kind_of, recognize_module
from executorch_moe.export.models.pretrained import read_config
from executorch_moe.kernels import SCHEMES, FusedExperts, PackedExperts, pack_experts
from executorch_moe.kernels.schemes import check_group_size

from .plan import CheckpointPlan, below, meta_model
from .shards import ShardReader, Shards
from .sizes import check_sizes
from .work_folder import WorkFolder, manifest_of

RUN_BYTES = 32 << 20
"""Experts are packed in runs of about this size in bf16, and of a 16th of a layer at most. Packing takes about ten
times as much for a moment."""


@dataclass(frozen=True)
class LayerPlan:
    """One layer of the plan.

    Attributes:
        name: of its module in the model. family: that module's class.
        layout: how it is stored and what it computes.
        num_experts, top_k, hidden_size, intermediate_size: E, top_k, H and I.
        stored_bytes: of its tensors in the checkpoint.
    """

    name: str
    family: str
    layout: ExpertLayout
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    stored_bytes: int

    @property
    def exported_name(self) -> str:
        """How the exported program names the module: the model is an attribute of what is exported."""
        return f"model.{self.name}"


class StreamedModel:
    """A checked plan to load a model folder with packed experts. Making it reads headers only.

    Args:
        folder: model folder.
        dtype: of everything but the experts.
        attention: transformers' `attn_implementation`.
        fusion: scheme and group size of the experts.

    Attributes:
        model: the model, its weights on the meta device until `load`.
        layers: the expert layers, in order.

    Raises:
        ValueError, FileNotFoundError: configuration and weights that are damaged or disagree, a model without experts,
            or a group size that does not fit.
        NotImplementedError: experts that are not supported; names module and reason.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, attention: str, fusion: FusionOptions) -> None:
        self.fusion = fusion
        self.shards = Shards(folder)
        check_sizes(read_config(folder), self.shards)
        self.model = meta_model(folder, dtype, attention)
        self.plan = CheckpointPlan(self.model, self.shards)
        self.layers = list(self._expert_layers())
        if not self.layers:
            raise ValueError(
                f"{type(self.model).__name__} has no experts modules: give a Mixture-of-Experts model's folder"
            )

    def _expert_layers(self) -> Iterator[LayerPlan]:
        layouts: dict[tuple[object, ...], ExpertLayout] = {}
        for name, experts in find_experts(self.model):
            kind = kind_of(experts)  # equal layers are recognized once
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
        config: Any = self.model.config
        _, down, *_ = layout.canonical(dict(experts.named_parameters()))
        num_experts, hidden, intermediate = down.shape
        if not 1 <= (top_k := config.num_experts_per_tok) <= num_experts:
            raise ValueError(
                f"num_experts_per_tok={top_k} of config.json must be between 1 and its {num_experts} experts: "
                "put the number there that the model was trained with"
            )
        _check_group_size(self.fusion, hidden, intermediate)
        stored = [self.shards.tensors[source] for source in self.plan.names_below(name)]
        return LayerPlan(
            name=name,
            family=type(experts).__name__,
            layout=layout,
            num_experts=num_experts,
            top_k=top_k,
            hidden_size=hidden,
            intermediate_size=intermediate,
            stored_bytes=sum(tensor.nbytes for tensor in stored),
        )

    def load(
        self,
        work: WorkFolder | None = None,
        on_layer: Callable[[FusedLayer], None] | None = None,
        skip: tuple[str, ...] = (),
    ) -> list[FusedLayer]:
        """Packs the experts and loads everything else into `model`.

        Args:
            work: keeps packed layers and supplies those that it has; without it they stay in memory.
            on_layer: called after each layer.
            skip: modules that are left on the meta device.

        Returns:
            One record a layer.
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
                    known = work.load(layer.exported_name) or known  # mapped, so that it leaves memory
            record, packed = known
            parent, _, attribute = layer.name.rpartition(".")
            setattr(self.model.get_submodule(parent), attribute, FusedExperts(packed, layer.layout.activation))
            records.append(record)
            if on_layer is not None:
                on_layer(record)
        self.plan.load(except_below=(*skip, *(layer.name for layer in self.layers)))
        return records

    def load_placeholders(self, prepare: Callable[[nn.Module], None] | None = None) -> None:
        """Puts weights of the right shapes and types into `model`, but no values: enough to trace it.

        Nothing is read, and memory that nothing writes to is never taken, so this works for a model of any size.

        Args:
            prepare: changes the model while everything but its experts is on the meta device, where that takes no
                memory either.
        """
        for layer in self.layers:
            one = _pack_run(self.fusion, *layer.layout.canonical(self._zeros(layer)))
            empty = _for_all(one, lambda t: torch.empty(layer.num_experts, *t.shape[1:], dtype=t.dtype))  # noqa: B023
            parent, _, attribute = layer.name.rpartition(".")
            experts = FusedExperts(replace(one, **empty), layer.layout.activation)
            setattr(self.model.get_submodule(parent), attribute, experts)
        self.plan.share_weights(self.model)
        if prepare is not None:
            prepare(self.model)
        _fill_with_zeros(self.model)

    def _zeros(self, layer: LayerPlan) -> dict[str, Tensor]:
        """Parameters of the first expert of a layer, all zero."""
        experts = self.model.get_submodule(layer.name)
        return {name: torch.zeros(1, *p.shape[1:], dtype=p.dtype) for name, p in experts.named_parameters()}

    def manifest(self) -> dict[str, Any]:
        """What the packed layers depend on, for `WorkFolder`."""
        return manifest_of(self.shards, asdict(self.fusion))

    def _pack(self, layer: LayerPlan) -> tuple[FusedLayer, PackedExperts]:
        """Packs one layer, a run of experts at a time."""
        count = layer.num_experts
        whole: PackedExperts | None = None
        step = self._run_length(layer)
        for start in range(0, count, step):
            run = slice(start, min(start + step, count))
            # A reader of its own: the files' pages are given back before the next run is read.
            with self.shards.reader() as reader:
                weights = layer.layout.canonical(self._read(reader, layer.name, run))
                try:
                    part = _pack_run(self.fusion, *weights, first_expert=start)
                except ValueError as error:
                    raise ValueError(f"experts {layer.exported_name} ({layer.family}) not packed: {error}") from error
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
            algorithm=self.fusion.algorithm,
            bytes_before=layer.stored_bytes,
            bytes_after=whole.nbytes(),
        )
        return record, whole

    def _run_length(self, layer: LayerPlan) -> int:
        """Experts that are packed at once: all of them if the checkpoint's tensors cannot be read in parts."""
        if not all(self.plan.can_read_runs(target) for target in self.plan.targets_below(layer.name)):
            return layer.num_experts
        expert_bytes = 2 * 3 * layer.hidden_size * layer.intermediate_size
        return max(1, min(RUN_BYTES // expert_bytes, layer.num_experts // 16))

    def _read(self, reader: ShardReader, module: str, run: slice) -> dict[str, Tensor]:
        """Parameters of an experts module by their name in it, for some of the experts."""
        return {
            target.removeprefix(f"{module}."): self.plan.read_experts(reader, target, run)
            for target in self.plan.targets_below(module)
        }


def _fill_with_zeros(model: nn.Module) -> None:
    """Puts zeros in the place of tensors on the meta device; those that are shared stay so."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None and tensor.is_meta:
                if id(tensor) not in made:
                    made[id(tensor)] = nn.Parameter(_zeros(tensor), requires_grad=False)
                module._parameters[name] = made[id(tensor)]  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = made.setdefault(id(buffer), _zeros(buffer))


def _zeros(like: Tensor) -> Tensor:
    """Zeros on the CPU that take memory only where they are written; torch.zeros writes them all."""
    if like.numel() == 0:
        return torch.empty(like.shape, dtype=like.dtype)
    return torch.frombuffer(mmap.mmap(-1, like.numel() * like.element_size()), dtype=like.dtype).reshape(like.shape)


def _check_group_size(fusion: FusionOptions, hidden_size: int, intermediate_size: int) -> None:
    if SCHEMES[fusion.scheme].packed:
        check_group_size(fusion.group_size, hidden_size, "hidden size H")
        check_group_size(fusion.group_size, intermediate_size, "intermediate size I")


def _pack_run(
    fusion: FusionOptions,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    first_expert: int = 0,
) -> PackedExperts:
    """Some experts of a layer, from number `first_expert` on."""
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
