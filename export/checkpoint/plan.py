"""Plans from which stored tensors each weight of a model is made, and checks the plan before it reads them.

Renames and merges are those of transformers (`conversion_mapping`), so that every layout that transformers loads is
supported: one matrix for each expert, as in checkpoints on the Hub, and the stacked ones that transformers 5 writes.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from executorch_moe.export.models.pretrained import plain_outputs_, require_transformers, special_tokens

from . import tied_weights
from .shards import COMPLETE, ShardReader, Shards, all_finite, listed

_FLOATS = ("BF16", "F16", "F32", "F64")
# Buffers that older versions of transformers stored and newer ones compute.
_IGNORED = re.compile(r"rotary_emb\.inv_freq$")
# Layers for multi-token prediction, which transformers does not run. They are either numbered after the decoder layers,
# and have weights that decoder layers lack, or have their own name.
_NUMBERED = re.compile(r"^(?P<list>.*\blayers)\.(?P<number>\d+)\.(?P<rest>.*)$")
_OF_PREDICTION = re.compile(r"^(eh_proj|enorm|hnorm|shared_head)\.")
_PREDICTION = re.compile(r"(^|\.)mtp(_layers|_block|_heads)?\.")
_IN_FP32 = ("A_log", "dt_bias")
"""Parameters that stay in fp32: the decay of a recurrent state is the exponential of an exponential of them."""
COMPARED_ROWS = 4096
"""Rows of two stored matrices to compare at a time."""


def meta_model(folder: Path, dtype: torch.dtype, attention: str) -> nn.Module:
    """Builds the model of a config.json in eval mode, with its parameters on the meta device; buffers have values.

    Args:
        folder: model folder.
        dtype: dtype of the parameters, except those in `_IN_FP32`.
        attention: transformers' `attn_implementation`.

    Raises:
        ValueError: a configuration that transformers refuses, or see `special_tokens`.
    """
    transformers = require_transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        plain_outputs_(config)
        # Quantized weights are read as floats, into plain layers.
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with _parameters_on_meta():
            model: nn.Module = transformers.AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention
            )
    except Exception as error:  # transformers, its dataclasses and torch each raise their own classes
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{folder / 'config.json'} does not make a model ({reason}): correct it, or use the one that the model "
            "was published with"
        ) from error
    special_tokens(folder, config)
    for module in model.modules():
        for name in _IN_FP32:
            if name in module._parameters:
                module._parameters[name] = nn.Parameter(module._parameters[name].float(), requires_grad=False)  # type: ignore[union-attr]
    return model.eval()


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """A context in which modules get parameters on the meta device, and buffers (rotary frequencies) with values.

    Modules that other threads make at the same time are not affected.
    """
    mine = threading.get_ident()

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if threading.get_ident() != mine:  # hooks apply to the whole process
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=False)

    hook = register_module_parameter_registration_hook(on_meta)
    try:
        yield
    finally:
        hook.remove()


@dataclass
class Source:
    """The stored tensors of one weight.

    Attributes:
        target: name of the weight in the model; the first one if a converter makes several weights of one tensor.
        converter: transformers' WeightConverter; None for a tensor that is only renamed.
        names: source pattern of the converter -> names of stored tensors, in order (experts by number).
    """

    target: str
    converter: Any = None
    names: dict[str, list[str]] = field(default_factory=dict)

    def stacks_experts(self) -> bool:
        """True if tensor i of each pattern is expert i, so that a run of experts needs only a run of tensors."""
        first: Any = self.converter.operations[0] if self.converter is not None else None
        return type(first).__name__ == "MergeModulelist" and first.dim == 0

    def all_names(self) -> list[str]:
        """Names of all stored tensors, pattern by pattern."""
        return [name for names in self.names.values() for name in names]


class CheckpointPlan:
    """Maps the stored tensors to the weights of a model. The constructor reads no weights.

    Attributes:
        model: the model; its parameters may be on the meta device.
        shards: the stored tensors.
        state: name -> weight of the model.
        sources: name of a weight -> its stored tensors.
        left_out: names of stored tensors that the text model does not use: of other modalities, and of layers for
            multi-token prediction.
        made: names of the weights that the stored tensors make.

    Raises:
        ValueError: tensors that are missing, unexpected, of another shape, or of a dtype that is not a plain float. The
            message names the first ones.
    """

    def __init__(self, model: nn.Module, shards: Shards) -> None:
        self.model, self.shards = model, shards
        self.state: dict[str, Tensor] = model.state_dict(keep_vars=True)
        self.sources = self._match()
        self.made = self._check_shapes()
        self._check_missing()

    # ------------------------------------------------------------------ matching and checks; reads no weights

    def _match(self) -> dict[str, Source]:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        model: Any = self.model
        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        sources: dict[str, Source] = {}
        unexpected = []
        for name in sorted(self.shards.tensors, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, self.state)
            if target not in self.state and name in self.state:
                target, pattern = name, None
            if target not in self.state:
                unexpected.append(name)
                continue
            converter = by_pattern[pattern] if pattern is not None else None
            source = sources.setdefault(target, Source(target, converter))
            source.names.setdefault(pattern or "", []).append(name)
        further = self._prediction_layers(unexpected)
        self.left_out = [name for name in unexpected if not _IGNORED.search(name)]
        unexpected = [name for name in unexpected if not self._is_ignored(name, "unexpected")]
        if unexpected := [name for name in unexpected if not (_PREDICTION.search(name) or name.startswith(further))]:
            raise ValueError(
                f"{self.shards.folder} has {_tensors(unexpected)} that {type(model).__name__} does not use: "
                "check that config.json and weights are of the same model"
            )
        return sources

    def _is_ignored(self, name: str, kind: str) -> bool:
        """True if the model's class lets `name` be absent (kind "missing") or ignores it (kind "unexpected")."""
        attribute = f"_keys_to_ignore_on_load_{kind}"
        patterns = {p for module in self.model.modules() for p in getattr(module, attribute, None) or ()}
        return bool(_IGNORED.search(name)) or any(re.search(pattern, name) for pattern in patterns)

    def _prediction_layers(self, names: list[str]) -> tuple[str, ...]:
        """Prefixes of stored layers for multi-token prediction, numbered after the model's last decoder layer."""
        model: Any = self.model
        found = {
            f"{match['list']}.{match['number']}."
            for match in map(_NUMBERED.match, names)
            if match and _OF_PREDICTION.match(match["rest"]) and int(match["number"]) >= model.config.num_hidden_layers
        }
        return tuple(sorted(found))

    def _check_shapes(self) -> set[str]:
        """Makes every weight from meta tensors and compares shapes; returns the names of the weights."""
        made: set[str] = set()
        for source in self.sources.values():
            self._check_experts(source)
            tensors = {
                pattern: [torch.empty(self._shape(name), device="meta") for name in names]
                for pattern, names in source.names.items()
            }
            for target, tensor in self.convert(source, tensors).items():
                made.add(target)
                expected = tuple(self.state[target].shape) if target in self.state else None
                if tuple(tensor.shape) != expected:
                    raise ValueError(
                        f"{listed(source.all_names(), 1)} of {self.shards.folder} makes {target} "
                        f"{list(tensor.shape)}, but config.json asks for {list(expected or ())}: "
                        "check that config.json and weights are of the same model"
                    )
        return made

    def _check_experts(self, source: Source) -> None:
        """Checks the stored tensors of a weight: plain floats; for experts, one for each, all of the same shape."""
        for name in source.all_names():
            stored = self.shards.tensors[name]
            if (
                stored.dtype not in _FLOATS
                and stored.encoding is None
                and self.state[source.target].is_floating_point()
            ):
                raise ValueError(
                    f"{name} of {self.shards.folder} is stored as {stored.dtype}, expected {', '.join(_FLOATS)}: "
                    "use the checkpoint in bf16"
                )
        if not source.stacks_experts():
            return
        for pattern in source.converter.source_patterns:
            names = source.names.get(pattern, [])
            prefix, _, suffix = pattern.partition("*")
            if not names:
                raise ValueError(
                    f"{self.shards.folder} lacks tensors {prefix.strip('.')}.*{suffix} for {source.target}: {COMPLETE}"
                )
            count = self.state[source.target].shape[0]
            numbers = [int(_expert_number(name, suffix)) for name in names]
            if absent := sorted(set(range(count)) - set(numbers)):
                like = names[0]
                number = _expert_number(like, suffix)
                lacking = [like.replace(f".{number}{suffix}", f".{i}{suffix}") for i in absent]
                raise ValueError(f"{self.shards.folder} lacks {_tensors(lacking)}: {COMPLETE}")
            if beyond := [name for name, number in zip(names, numbers, strict=True) if number >= count]:
                raise ValueError(
                    f"{self.shards.folder} has {_tensors(beyond)} beyond the {count} experts of config.json: "
                    "check that config.json and weights are of the same model"
                )
            shapes = {name: self._shape(name) for name in names}
            for name, shape in shapes.items():
                if shape != shapes[names[0]]:
                    raise ValueError(
                        f"{name} has shape {list(shape)}, but {names[0]} has {list(shapes[names[0]])}: "
                        "the experts of a layer must have the same shape"
                    )

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.shards.tensors[name].shape

    def _check_missing(self) -> None:
        made = self.made | tied_weights.supplied(self.model, self.made)
        missing = [name for name in self.state if name not in made and not self._is_ignored(name, "missing")]
        if missing:
            remedy = tied_weights.untied_remedy(self.model, missing, made) or COMPLETE
            raise ValueError(f"{self.shards.folder} lacks {_tensors(missing)}: {remedy}")

    # ------------------------------------------------------------------ reading

    def targets_below(self, module: str) -> list[str]:
        """Targets of the weights below a module."""
        return [target for target in self.sources if below(target, module)]

    def names_below(self, module: str) -> list[str]:
        """Names of the stored tensors of the weights below a module."""
        return [name for target in self.targets_below(module) for name in self.sources[target].all_names()]

    def can_read_runs(self, target: str) -> bool:
        """True if `read_experts` reads only the experts that it returns."""
        source = self.sources[target]
        return source.converter is None or source.stacks_experts()

    def read(self, reader: ShardReader, target: str) -> dict[str, Tensor]:
        """Reads the weight `target`, and others that its tensors make, in the stored dtype: name -> tensor."""
        source = self.sources[target]
        tensors = {pattern: [reader.read(name) for name in names] for pattern, names in source.names.items()}
        return self.convert(source, tensors)

    def read_experts(self, reader: ShardReader, target: str, run: slice) -> Tensor:
        """Reads experts `run` of the stacked weight `target`, in the stored dtype."""
        source = self.sources[target]
        if not self.can_read_runs(target):
            return self.read(reader, target)[target][run]
        if source.converter is None:
            return reader.read(source.all_names()[0], run)
        tensors = {pattern: [reader.read(name) for name in names[run]] for pattern, names in source.names.items()}
        return self.convert(source, tensors)[target]

    def convert(self, source: Source, tensors: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        """The weights that transformers makes of stored tensors: name -> tensor.

        Args:
            source: of the weights.
            tensors: source pattern -> tensors in the order of `source.names`, or a run of the experts.
        """
        if source.converter is None:
            return {source.target: tensors[""][0]}
        converter = copy.deepcopy(source.converter)
        for pattern, parts in tensors.items():
            for tensor in parts:
                converter.add_tensor(source.target, source.target, pattern, tensor)
        made = converter.convert(source.target, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def load(self, except_below: tuple[str, ...] = ()) -> None:
        """Reads all weights into the model, in the model's dtypes, except those below the modules `except_below`.

        Raises:
            ValueError: NaN, Inf, or values beyond the range of the model's dtype.
        """
        for target in self.sources:
            if any(below(target, module) for module in except_below):
                continue
            # One reader for each weight frees the file's pages before the next weight is read.
            with self.shards.reader() as reader:
                for name, tensor in self.read(reader, target).items():
                    converted = tensor.to(dtype := self.state[name].dtype, copy=True)
                    if tensor.dtype.itemsize > dtype.itemsize and not all_finite(converted):
                        raise ValueError(
                            f"{name} of {self.shards.folder} holds values that {str(dtype).removeprefix('torch.')} "
                            "cannot hold: export with --dtype fp32, or use another checkpoint"
                        )
                    set_weight(self.model, name, converted)
        self.share_weights(self.model)

    def share_weights(self, model: nn.Module) -> None:
        """Ties the weights of `model` that are tied in this checkpoint; its weights must be set."""
        tied_weights.share(model, self._shared)

    @functools.cached_property
    def _shared(self) -> dict[str, str]:
        return tied_weights.shared(self.model, self.made, self._are_equal)

    def _are_equal(self, first: str, second: str) -> bool:
        """True if two stored weights are equal in the model's dtype."""
        dtype, shape = self.state[first].dtype, self.state[first].shape
        if shape != self.state[second].shape:
            return False
        for start in range(0, shape[0], COMPARED_ROWS):
            rows = slice(start, start + COMPARED_ROWS)
            with self.shards.reader() as reader:
                one, other = (self.read_experts(reader, name, rows).to(dtype) for name in (first, second))
                if not torch.equal(one, other):
                    return False
        return True


def below(name: str, module: str) -> bool:
    """True if `name` is below `module`."""
    return name.startswith(f"{module}.")


def set_weight(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Replaces a parameter or buffer of a model by a tensor."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    if attribute in module._parameters:
        module._parameters[attribute] = nn.Parameter(tensor.contiguous(), requires_grad=False)
    else:
        module._buffers[attribute] = tensor.contiguous()


def _expert_number(name: str, suffix: str) -> str:
    match = re.search(r"\.(\d+)" + re.escape(suffix) + "$", name)
    return match[1] if match else "-1"


def _tensors(names: list[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({listed(names)})"
