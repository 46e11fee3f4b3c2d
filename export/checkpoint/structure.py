"""What a model asks of its cache, its attention and its experts, found by running it without values.

No list of model types decides whether a model is supported. Its layers are called on the meta device with a cache that
records what is written to it, an attention function that records how it is called, and stubs in place of experts and
gated delta rule layers, which have modules of their own.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from executorch_moe.backends.fusion.modules import find_experts
from executorch_moe.export.models.causal_lm import cache_sizes, check_kinds
from executorch_moe.export.models.delta_rule import LINEAR, GatedDeltaNet
from executorch_moe.export.models.delta_rule import fits as is_delta_rule
from executorch_moe.export.models.keywords import cache_name, check
from executorch_moe.export.models.pretrained import attention_kinds, check_rope, require_transformers
from executorch_moe.kernels import FusedExperts

NAME = "executorch_moe_recorded"
"""The attention of a model while it is recorded."""
TOKENS = 5
SUPPORTED = (
    "use a model whose layers are full or sliding-window attention with a cache of keys and values, or gated delta rule"
)


@dataclass
class Structure:
    """What a model asks for.

    Attributes:
        caches: layer -> heads and width of its cached keys and values, (heads, width, heads, width).
        top_k: qualified name of an experts module -> experts of a token.
        sinks: attention has a sink for each head.
        unknown_terms: further arguments of the attention function that `grouped_attention` does not compute.
        latents: what layers cache is not what attention gets, as for latent attention.
    """

    caches: dict[int, tuple[int, int, int, int]] = field(default_factory=dict)
    top_k: dict[str, int] = field(default_factory=dict)
    sinks: bool = False
    unknown_terms: set[str] = field(default_factory=set)
    latents: bool = False


class Recorder:
    """A cache that records what is written to it. Its keys and values are those of the call."""

    is_compileable = True

    def __init__(self, structure: Structure) -> None:
        self.structure = structure

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, kwargs: Mapping[str, Any] | None = None, **keywords: Any
    ) -> tuple[Tensor, Tensor]:
        """Records the sizes of key and value [1, heads, T, width]; returns both."""
        check("the cache", {**(kwargs or {}), **keywords})
        self.structure.caches[layer_idx] = (key.shape[1], key.shape[3], value.shape[1], value.shape[3])
        return key, value


_recording = threading.local()


def _recorded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Records the arguments behind transformers' attention interface; returns a tensor of the right shape."""
    structure: Structure = _recording.structure
    sizes = key.shape[1], key.shape[3], value.shape[1], value.shape[3]
    structure.latents |= sizes != structure.caches.get(module.layer_idx, sizes)  # type: ignore[arg-type]
    structure.sinks |= s_aux is not None
    for name, argument in keywords.items():
        try:
            check("attention", {name: argument})
        except ValueError:
            structure.unknown_terms.add(name)
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


@contextlib.contextmanager
def _stubs(model: nn.Module, structure: Structure) -> Iterator[None]:
    """A context in which experts and gated delta rule layers return their input, and experts are recorded."""

    def experts(name: str) -> Callable[..., Tensor]:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            ids = [tensor for tensor in tensors if not tensor.is_floating_point() and tensor.dim() == 2]
            if ids:
                structure.top_k[name] = int(ids[0].shape[1])
            return torch.empty_like(tensors[0])

        return forward

    def same(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.empty_like(hidden_states)

    changed: list[Any] = []
    fused = [(name, module) for name, module in model.named_modules() if isinstance(module, FusedExperts)]
    try:
        for name, module in [*find_experts(model), *fused]:
            module.forward = experts(name)  # type: ignore[assignment]
            changed.append(module)
        for module in model.modules():
            if isinstance(module, GatedDeltaNet) or is_delta_rule(module):
                module.forward = same  # type: ignore[assignment]
                changed.append(module)
        yield
    finally:
        for module in changed:
            del module.forward


@torch.no_grad()
def structure_of(model: nn.Module) -> Structure:
    """Runs a transformers `*ForCausalLM` without values; its parameters may be on any device, and are not read.

    Raises:
        NotImplementedError: layers or RoPE of an unsupported kind, or layers that cannot be called with a cache of keys
            and values; names them.
    """
    config: Any = model.config
    kinds = attention_kinds(config)
    check_kinds(kinds)
    check_rope(config)
    _check_recurrent(model)
    require_transformers()
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _recorded_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    tensors = {name: tensor.to("meta") for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    mask = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool, device="meta")
    masks = {kind: None if kind == LINEAR else mask for kind in kinds}
    positions = torch.arange(TOKENS, device="meta")[None]
    structure, before = Structure(), config._attn_implementation
    arguments = {
        "input_ids": positions,
        "attention_mask": masks if len(masks) > 1 or LINEAR in masks else mask,
        "position_ids": positions,
        "use_cache": True,
        cache_name(model): Recorder(structure),
    }
    _recording.structure = structure
    try:
        config._attn_implementation = NAME
        with _stubs(model, structure):
            torch.func.functional_call(model, tensors, (), arguments)
    except Exception as error:  # whatever a layer raises that needs another cache or mask
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
        raise NotImplementedError(
            f"{type(model).__name__} cannot be run with a cache of keys and values alone ({type(error).__name__}: "
            f"{reason}): {SUPPORTED}"
        ) from error
    finally:
        config._attn_implementation = before
        del _recording.structure
    return structure


def check_structure(model: nn.Module) -> Structure:
    """Checks that `CausalLM` supports a model, whose parameters may be on the meta device.

    Returns:
        What the model asks for.

    Raises:
        NotImplementedError: see `structure_of`; attention with terms that `grouped_attention` does not compute; a layer
            that caches nothing, or caches of different sizes.
    """
    structure, config = structure_of(model), model.config
    recurrent = _recurrent_layers(model)
    for layer in range(config.num_hidden_layers):  # type: ignore[union-attr, arg-type]
        if layer not in structure.caches and layer not in recurrent:
            raise NotImplementedError(
                f"layer {layer} of {type(model).__name__}, {_mixer(model, layer)}, caches no keys and values: "
                f"{SUPPORTED}"
            )
    if structure.unknown_terms:
        raise NotImplementedError(
            f"attention of {type(model).__name__} with {', '.join(sorted(structure.unknown_terms))} is not supported: "
            f"{SUPPORTED}"
        )
    found = {sizes: layer for layer, sizes in reversed(structure.caches.items())}
    if len(found) > 1 or any(sizes != _configured_sizes(model) for sizes in found):
        shown = ", ".join(
            f"{sizes} in layer {layer}" for sizes, layer in sorted(found.items(), key=lambda entry: entry[1])
        )
        raise NotImplementedError(
            f"layers of {type(model).__name__} cache keys and values of (heads, width, heads, width) = {shown}: "
            "use a model whose layers have caches of one size, that of its configuration"
        )
    return structure


def _configured_sizes(model: nn.Module) -> tuple[int, int, int, int] | None:
    """Sizes of a layer's cache by the configuration, as in `Structure`; None if it has none for all layers."""
    try:
        heads, key_width, value_width = cache_sizes(model)
    except AttributeError:  # transformers raises it for sizes that differ between layers, too
        return None
    return heads, key_width, heads, value_width


def _recurrent_layers(model: nn.Module) -> set[int]:
    """Numbers of the gated delta rule layers."""
    found = (module for module in model.modules() if isinstance(module, GatedDeltaNet) or is_delta_rule(module))
    return {int(module.layer_idx) for module in found}  # type: ignore[arg-type]


def _check_recurrent(model: nn.Module) -> None:
    """Checks that layers of linear attention are gated delta rule.

    Raises:
        NotImplementedError: they are something else, such as Mamba.
    """
    config: Any = model.config
    kinds = list(getattr(config, "layer_types", None) or ())[: config.num_hidden_layers]
    recurrent = _recurrent_layers(model)
    others = sorted(
        {_mixer(model, layer) for layer, kind in enumerate(kinds) if kind == LINEAR and layer not in recurrent}
    )
    if others:
        raise NotImplementedError(f"layers of type {', '.join(others)} are not supported: {SUPPORTED}")


def _mixer(model: nn.Module, layer: int) -> str:
    """Name and class of the module that mixes the tokens of a layer: "mamba (JambaMambaMixer)"."""
    found = [
        (name.rpartition(".")[2], type(module).__name__)
        for name, module in model.named_modules()
        if getattr(module, "layer_idx", None) == layer and not isinstance(module, nn.ModuleList)
    ]
    named = [entry for entry in found if not entry[0].isdecimal()] or found or [("unknown", "no module")]
    name, kind = named[0]
    return kind if "attn" in name else f"{name} ({kind})"
