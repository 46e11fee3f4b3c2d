"""Qwen3-MoE models of any shape with random weights, for measuring speed: `synthetic:qwen3-30b-a3b`.

Weights are made on the spot, layer by layer; experts are made packed, so that the model never exists in bf16.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from executorch_moe.backends.cuda.placeholders import LEAST_BYTES
from executorch_moe.export.report.sizes import check_synthetic
from executorch_moe.kernels import FusedExperts
from executorch_moe.kernels.measure.timing import random_packed
from executorch_moe.kernels.schemes import K_BLOCK, check_group_size, get_scheme
from executorch_moe.kernels.shapes import LayerShape

from .pretrained import require_transformers

PREFIX = "synthetic:"
Device: TypeAlias = "torch.device | str"
MakeExperts: TypeAlias = "Callable[[LayerShape, str, Device, torch.Generator], nn.Module]"


@dataclass(frozen=True)
class SyntheticModel:
    """Shape of a Qwen3-MoE model; `top_k` of `experts` experts of width `intermediate` in each of `layers` layers."""

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
                    f"{name}={getattr(self, name)} must be a multiple of {K_BLOCK}: random codes have no padding"
                )
        if self.top_k > self.experts:
            raise ValueError(f"top_k={self.top_k} must be at most experts={self.experts}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")
        if self.vocabulary < MIN_VOCABULARY:
            raise ValueError(f"vocabulary={self.vocabulary} must be at least {MIN_VOCABULARY}, for the byte tokenizer")

    def weight_bytes(self, bits: float) -> int:
        """About how many bytes its weights have, with `bits` for each weight of an expert and bf16 for all else."""
        experts = self.experts * 3 * self.hidden * self.intermediate
        attention = 2 * (self.heads + self.kv_heads) * self.head_dim * self.hidden + self.experts * self.hidden
        return int(self.layers * (experts * bits / 8 + 2 * attention)) + 2 * 2 * self.vocabulary * self.hidden

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


MIN_VOCABULARY = 264
"""The tokenizer of the tiny model, which synthetic ones borrow: bytes and a few marks."""

PRESETS = {
    model.name: model
    for model in (
        SyntheticModel("qwen3-30b-a3b", 48, 2048, 128, 8, 768, 32, 4, 128, 151936, 40960),
        SyntheticModel("tiny", 2, 128, 8, 2, 128, 4, 2, 32, 300, 512),
    )
}


def is_synthetic(model: str) -> bool:
    """True for a name that `parse` reads, rather than a folder."""
    return model.startswith(PREFIX)


def parse(model: str, layers: int | None = None) -> SyntheticModel:
    """`synthetic:PRESET[,FIELD=NUMBER...]`, as synthetic:qwen3-30b-a3b,experts=64; `layers` replaces that field.

    Raises:
        ValueError: no such preset or field, or sizes that do not fit together.
    """
    name, *changes = model.removeprefix(PREFIX).split(",")
    if name not in PRESETS:
        raise ValueError(f"model={model!r} is unknown: use {PREFIX} and one of {', '.join(PRESETS)}")
    known = [field.name for field in fields(SyntheticModel)[1:]]
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
    """Check that a model can be made here, and written to `out`; see `sizes.check_synthetic`.

    Raises:
        ValueError: unknown scheme, or a model that is too large.
    """
    bits = 4 + 16 / max(group_size, 1) if get_scheme(scheme).packed else 16
    check_synthetic(model, PRESETS.get(model.name, model), bits, out, placeholder_weights)


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
    """The model in eval mode, experts already packed.

    The same seed gives the same weights on one kind of device, and a layer's do not depend on the number of layers.

    Args:
        scheme: of the experts. group_size: weights that share a scale; ignored by scheme bf16.
        dtype: of everything but the experts.
        attention: transformers' `attn_implementation`.
        device: where weights are made; "meta" makes none, and gives memory on the CPU: zeros where it is small,
            else what nothing was written to.
        make_experts: (shape, scheme, device, generator) -> experts module; by default `FusedExperts`.
        prepare: called with each decoder layer, and last with the model, once it has its weights: the place to quantize
            what is not experts before the next layer is made.

    Raises:
        ValueError: unknown scheme, a group size that does not fit, or a model that does not fit into memory.
    """
    if torch.device(device).type != "cuda":
        check_room(model, scheme, group_size, placeholder_weights=device == "meta")
    if get_scheme(scheme).packed:
        check_group_size(group_size, model.hidden, "hidden")
        check_group_size(group_size, model.intermediate, "intermediate")
    transformers = require_transformers()
    config = model.config()
    with torch.device("meta"):
        net: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    shape = LayerShape(model.experts, model.top_k, model.hidden, model.intermediate, group_size)
    for index, layer in enumerate(net.model.layers):
        layer.mlp.experts = (make_experts or fused_experts)(
            shape, scheme, device, _generator(device, seed, f"experts {index}")
        )  # fmt: skip
        _fill(layer, device, seed, f"layers.{index}")
        if prepare is not None:
            prepare(layer)
    _fill(net, device, seed, "")
    if prepare is not None:
        prepare(net)
    if device == "meta":
        net.to_empty(device="cpu")
        for tensor in net.state_dict().values():
            if tensor.nbytes < LEAST_BYTES:
                tensor.zero_()  # it is written to the file: the same bytes each time
    net.model.rotary_emb = type(net.model.rotary_emb)(config)  # a table on the CPU, no weight
    return net.eval()


def fused_experts(shape: LayerShape, scheme: str, device: Device, generator: torch.Generator) -> nn.Module:
    """Our experts on random codes."""
    return FusedExperts(random_packed(shape, scheme, str(device), generator))


def _generator(device: Device, seed: int, what: str) -> torch.Generator:
    # 32 bits: the generator ignores higher ones.
    generator = torch.Generator("cpu" if device == "meta" else device)
    return generator.manual_seed(zlib.crc32(f"{seed} {what}".encode()))


def _fill(module: nn.Module, device: Device, seed: int, prefix: str) -> None:
    """Give every parameter that has no values yet some: norms 1, matrices of gain 1 (embeddings: variance 1)."""
    for name, parameter in list(module.named_parameters()):
        if not parameter.is_meta:
            continue
        values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        if values.dim() < 2:
            values.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        else:
            deviation = 1.0 if "embed" in name else values.shape[-1] ** -0.5
            values.normal_(0.0, deviation, generator=_generator(device, seed, f"{prefix}.{name}"))
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, nn.Parameter(values, requires_grad=False))
