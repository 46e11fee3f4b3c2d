"""Qwen3-MoE and Qwen3.5-MoE models of any shape with random weights, to measure speed: `synthetic:qwen3-30b-a3b`.

Weights are generated layer by layer. Experts are generated as packed codes, so that the model never exists in bf16.
"""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from executorch_moe.backends.cuda.placeholders import LEAST_BYTES
from executorch_moe.export.host_memory import size, total_memory
from executorch_moe.kernels import FusedExperts
from executorch_moe.kernels.measure.timing import random_packed
from executorch_moe.kernels.schemes import K_BLOCK, check_layer_group_size, get_scheme
from executorch_moe.kernels.shapes import LayerShape

from .pretrained import require_transformers

PREFIX = "synthetic:"
Device: TypeAlias = "torch.device | str"
MakeExperts: TypeAlias = "Callable[[LayerShape, str, Device, torch.Generator], nn.Module]"


@dataclass(frozen=True)
class SyntheticModel:
    """Sizes of a Qwen3-MoE model: each of `layers` layers uses `top_k` of `experts` experts of width `intermediate`.

    Raises:
        ValueError: a size below 1, or sizes that do not fit together.
    """

    name: str
    layers: int
    hidden: int
    experts: int
    top_k: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int

    def __post_init__(self) -> None:
        for field in fields(self)[1:]:
            if getattr(self, field.name) < 1:
                raise ValueError(f"{field.name}={getattr(self, field.name)} of {PREFIX}{self.name} must be at least 1")
        for name in ("hidden", "intermediate"):
            if getattr(self, name) % K_BLOCK:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be a multiple of {K_BLOCK}, because random codes are not padded"
                )
        if self.top_k > self.experts:
            raise ValueError(f"top_k={self.top_k} must be at most experts={self.experts}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")
        if self.vocabulary < MIN_VOCABULARY:
            raise ValueError(f"vocabulary={self.vocabulary} must be at least {MIN_VOCABULARY}, for the byte tokenizer")

    def weight_bytes(self, bits: float) -> int:
        """Estimated bytes of all weights: `bits` for each weight of an expert, bf16 for the rest."""
        experts = self.layers * self.experts * 3 * self.hidden * self.intermediate
        others = self._attention_weights() + self.layers * self.experts * self.hidden
        return int(experts * bits / 8) + 2 * (others + 2 * self.vocabulary * self.hidden)

    def _attention_weights(self) -> int:
        """Weights of the attention of all layers."""
        return self.layers * 2 * (self.heads + self.kv_heads) * self.head_dim * self.hidden

    def config(self) -> Any:
        """The transformers configuration."""
        return require_transformers().Qwen3MoeConfig(
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=3 * self.hidden,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim, max_position_embeddings=self.context, num_experts=self.experts,
            num_experts_per_tok=self.top_k, moe_intermediate_size=self.intermediate, norm_topk_prob=True,
            decoder_sparse_step=1, mlp_only_layers=[], tie_word_embeddings=False, use_sliding_window=False,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6}, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip

    def constant(self, name: str) -> float:
        """Value of the parameter `name`, one with less than two dimensions, that leaves its input about as it is."""
        return 1.0 if name.endswith("norm.weight") else 0.0


@dataclass(frozen=True)
class SyntheticRecurrentModel(SyntheticModel):
    """Sizes of a Qwen3.5-MoE model: every fourth layer has full attention, the others are gated delta rule.

    `shared` is the width of the shared expert; `key_heads` and `value_heads` of `linear_dim` are those of the gated
    delta rule.

    Raises:
        ValueError: see `SyntheticModel`.
    """

    shared: int = 512
    key_heads: int = 16
    value_heads: int = 32
    linear_dim: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.value_heads % self.key_heads:
            raise ValueError(f"value_heads={self.value_heads} must be a multiple of key_heads={self.key_heads}")

    def _attention_weights(self) -> int:
        full = self.layers // 4
        queries = (3 * self.heads + 2 * self.kv_heads) * self.head_dim  # query, its gate and the output
        linear = (2 * self.key_heads + 3 * self.value_heads) * self.linear_dim + 2 * self.value_heads
        shared = self.layers * (3 * self.shared + 1)
        return (full * queries + (self.layers - full) * linear + shared) * self.hidden

    def config(self) -> Any:
        """The transformers configuration."""
        return require_transformers().Qwen3_5MoeTextConfig(
            vocab_size=self.vocabulary, hidden_size=self.hidden, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_key_value_heads=self.kv_heads, head_dim=self.head_dim,
            max_position_embeddings=self.context, num_experts=self.experts, num_experts_per_tok=self.top_k,
            moe_intermediate_size=self.intermediate, shared_expert_intermediate_size=self.shared,
            linear_num_key_heads=self.key_heads, linear_num_value_heads=self.value_heads,
            linear_key_head_dim=self.linear_dim, linear_value_head_dim=self.linear_dim, linear_conv_kernel_dim=4,
            rope_parameters={"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
            tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip

    def constant(self, name: str) -> float:
        """As for `SyntheticModel`; the weights of all norms but one are offsets from 1."""
        return 1.0 if name.endswith(("linear_attn.norm.weight", "dt_bias")) else 0.0


MAX_LAYERS = 1000
"""Limit for a synthetic model. Tracing takes seconds a layer; the largest published models have about 130."""
LARGEST_GPU = 1 << 40
"""Bytes, more than any GPU has. It limits artifacts whose weights are generated on the GPU that loads them."""
MIN_VOCABULARY = 264
"""Tokens of the tiny model's tokenizer, which synthetic models use: bytes and a few special tokens."""

PRESETS: dict[str, SyntheticModel] = {
    model.name: model
    for model in (
        SyntheticModel("qwen3-30b-a3b", 48, 2048, 128, 8, 768, 32, 4, 128, 151936, 40960),
        SyntheticModel("tiny", 2, 128, 8, 2, 128, 4, 2, 32, 300, 512),
        SyntheticRecurrentModel("qwen3.5-35b-a3b", 40, 2048, 256, 8, 512, 16, 2, 256, 248320, 262144),
    )
}


def is_synthetic(model: str) -> bool:
    """True for a synthetic model's name, which `parse` reads; false for a folder."""
    return model.startswith(PREFIX)


def parse(model: str, layers: int | None = None) -> SyntheticModel:
    """Parses `synthetic:PRESET[,FIELD=NUMBER...]`, as synthetic:qwen3-30b-a3b,experts=64; `layers` overrides a field.

    Raises:
        ValueError: an unknown preset or field, or sizes that do not fit together.
    """
    name, *changes = model.removeprefix(PREFIX).split(",")
    if name not in PRESETS:
        raise ValueError(f"model={model!r} is unknown: use {PREFIX} and one of {', '.join(PRESETS)}")
    known = [field.name for field in fields(PRESETS[name])[1:]]
    numbers: dict[str, Any] = {}
    for change in changes:
        field, _, number = change.partition("=")
        if field not in known or not number.isdecimal():
            raise ValueError(f"{change!r} in model={model!r} must be FIELD=NUMBER, with one of {', '.join(known)}")
        numbers[field] = int(number)
    if layers is not None:
        numbers["layers"] = layers
    return replace(PRESETS[name], **numbers)


def check_room(
    model: SyntheticModel, scheme: str, group_size: int, out: Path | None = None, *, placeholder_weights: bool = False
) -> None:
    """Checks that a model fits into this machine's memory and, if `out` is given, its disk; see `check_synthetic`.

    Raises:
        ValueError: an unknown scheme, or a model that is too large.
    """
    bits = 4 + 16 / max(group_size, 1) if get_scheme(scheme).packed else 16
    check_synthetic(model, PRESETS.get(model.name, model), bits, out, placeholder_weights)


def check_synthetic(
    model: SyntheticModel, preset: SyntheticModel, bits: float, out: Path | None, placeholder_weights: bool
) -> None:
    """Checks that a synthetic model can be generated and written on this machine.

    Args:
        preset: the preset that `model` is based on.
        bits: bits of an expert's weight.
        out: the file to write; None if nothing is written.
        placeholder_weights: weights are not written, but generated on the GPU that loads the artifact.

    Raises:
        ValueError: too many layers or bytes; names the field that differs most from the preset, and the bytes needed
            and available.
    """
    if model.layers > MAX_LAYERS:
        raise ValueError(f"layers={model.layers} of {model.name} is more than can be traced: use at most {MAX_LAYERS}")
    needed = model.weight_bytes(bits)
    limits = {"any GPU has": LARGEST_GPU} if placeholder_weights else {"of this machine's memory": total_memory()}
    if not placeholder_weights and out is not None:
        folder = next(parent for parent in out.absolute().parents if parent.exists())
        limits[f"free in {folder}"] = shutil.disk_usage(folder).free
    names = ("layers", "hidden", "experts", "intermediate", "heads", "kv_heads", "head_dim", "vocabulary")
    name = max(names, key=lambda field: getattr(model, field) / getattr(preset, field))
    for what, available in limits.items():
        if available and needed > available:
            more = f"more than {what}" if placeholder_weights else f"more than the {size(available)} {what}"
            raise ValueError(
                f"{name}={getattr(model, name)} of {model.name} makes a model of about {size(needed)}, {more}: "
                "use a smaller one"
            )


def build(
    model: SyntheticModel,
    scheme: str = "w4a16",
    group_size: int = 32,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    attention: str = "sdpa",
    device: Device = "cpu",
    make_experts: MakeExperts | None = None,
    prepare: Callable[[nn.Module], object] | None = None,
) -> nn.Module:
    """Builds a synthetic model in eval mode, with packed experts.

    On one kind of device, the same seed gives the same weights. A layer's weights do not depend on the number of
    layers.

    Args:
        scheme: packing of the experts.
        group_size: expert weights that share a scale; ignored by scheme bf16.
        dtype: dtype of everything but the experts.
        attention: transformers' `attn_implementation`.
        device: where weights are generated. "meta" generates none: the model gets CPU memory, which is uninitialized
            for large tensors and zero for small ones.
        make_experts: (shape, scheme, device, generator) -> experts module; None makes `FusedExperts`.
        prepare: called with each decoder layer, and at the end with the model, as soon as its weights exist. It may
            quantize other weights before the next layer is generated.

    Raises:
        ValueError: an unknown scheme, a group size that does not divide the widths, or a model that does not fit into
            memory.
    """
    if torch.device(device).type != "cuda":
        check_room(model, scheme, group_size, placeholder_weights=device == "meta")
    if get_scheme(scheme).packed:
        check_layer_group_size(group_size, model.hidden, model.intermediate)
    transformers = require_transformers()
    config = model.config()
    with torch.device("meta"):
        net: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    shape = LayerShape(model.experts, model.top_k, model.hidden, model.intermediate, group_size)
    for index, layer in enumerate(net.model.layers):
        layer.mlp.experts = (make_experts or fused_experts)(
            shape, scheme, device, _generator(device, seed, f"experts {index}")
        )  # fmt: skip
        _fill(layer, device, seed, f"layers.{index}", model.constant)
        if prepare is not None:
            prepare(layer)
    _fill(net, device, seed, "", model.constant)
    if prepare is not None:
        prepare(net)
    if device == "meta":
        net.to_empty(device="cpu")
        for tensor in net.state_dict().values():
            if tensor.nbytes < LEAST_BYTES:
                tensor.zero_()  # it is written to the file, which must be reproducible
    net.model.rotary_emb = type(net.model.rotary_emb)(config)  # a table on the CPU, not a weight
    return net.eval()


def fused_experts(shape: LayerShape, scheme: str, device: Device, generator: torch.Generator) -> nn.Module:
    """`FusedExperts` on random codes."""
    return FusedExperts(random_packed(shape, scheme, str(device), generator))


def _generator(device: Device, seed: int, what: str) -> torch.Generator:
    # 32 bits: the generator ignores higher bits.
    generator = torch.Generator("cpu" if device == "meta" else device)
    return generator.manual_seed(zlib.crc32(f"{seed} {what}".encode()))


def _fill(module: nn.Module, device: Device, seed: int, prefix: str, constant: Callable[[str], float]) -> None:
    """Initializes parameters on the meta device: matrices of gain 1, embeddings of variance 1, others `constant`."""
    for name, parameter in list(module.named_parameters()):
        if not parameter.is_meta:
            continue
        values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        if values.dim() < 2:
            values.fill_(constant(name))
        else:
            deviation = 1.0 if "embed" in name else values.shape[-1] ** -0.5
            values.normal_(0.0, deviation, generator=_generator(device, seed, f"{prefix}.{name}"))
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, nn.Parameter(values, requires_grad=False))
