"""Refuses absurd sizes in config.json before any module is built, by comparing them with the stored weights."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .shards import COMPLETE, Shards, listed

FACTOR = 4
"""A configuration is absurd if it needs more than this many times the stored weights."""

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_AT_LEAST_ONE = (
    "num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "moe_intermediate_size", "intermediate_size", "max_position_embeddings", "num_experts_per_tok", *EXPERTS,
)  # fmt: skip
_AT_LEAST_ZERO = (
    "shared_expert_intermediate_size", "n_shared_experts", "first_k_dense_replace", "q_lora_rank", "kv_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
)  # fmt: skip
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_BESIDE_TEXT = re.compile(r"(?:^|\.)(?:visual|vision_\w+|mtp(?:_\w+)?)\.")
"""Parts of a multimodal model that are not of its text model, and layers for multi-token prediction."""
_DENSE = re.compile(r"\.mlp\.(gate|up|down|gate_up)_proj\.")


def check_numbers(config: Mapping[str, Any], where: Path) -> None:
    """Checks that the sizes in a configuration are whole numbers, and that all numbers can be computed with.

    Raises:
        ValueError: a size that is not a whole number, or is negative or zero; NaN or Inf; a RoPE base that is not
            positive; a negative epsilon.
    """
    for name, value in _scalars(config):
        what = None
        if isinstance(value, float) and not math.isfinite(value):
            what = "a finite number"
        elif name == "rope_theta" and value <= 0:
            what = "greater than 0"
        elif name in ("rms_norm_eps", "layer_norm_eps") and value < 0:
            what = "at least 0"
        if what:
            raise ValueError(
                f"{name}={value!r} in {where} must be {what}: use the number that the model was trained with"
            )
    for least, names in ((1, _AT_LEAST_ONE), (0, _AT_LEAST_ZERO)):
        for name in names:
            value = config.get(name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ValueError(
                    f"{name}={value!r} in {where} must be a whole number of at least {least}: "
                    "use the number that the model was trained with"
                )


def _scalars(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Key and value of every number in a configuration, nested objects included."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _scalars(value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield name, value


def check_sizes(config: Mapping[str, Any], shards: Shards) -> None:
    """Checks that a configuration does not need far more weights than are stored. Reads no weights.

    `CheckpointPlan` later compares each weight exactly.

    Raises:
        ValueError: a size that is not a whole number, or that is absurd; names the field, the weights that it needs and
            the weights that are stored. Or no weights of a text model.
    """
    where = shards.folder / "config.json"
    if shards.tensors and all(map(_BESIDE_TEXT.search, shards.tensors)):
        raise ValueError(
            f"{shards.folder} has {len(shards.tensors)} tensors ({listed(sorted(shards.tensors))}) but none of a text "
            f"model: {COMPLETE}"
        )
    check_numbers(config, where)
    top_k = config.get("num_experts_per_tok")
    for name in EXPERTS:
        if top_k is not None and config.get(name) is not None and top_k > config[name]:
            raise ValueError(
                f"num_experts_per_tok={top_k} of config.json must be between 1 and its {config[name]} experts: "
                "use the number that the model was trained with"
            )
    stored = sum(math.prod(tensor.shape) for tensor in shards.tensors.values())
    remedy = "check that config.json and weights are of the same model, and correct the number"
    numbers = {int(match[1]) for name in shards.tensors if (match := _LAYER.search(name))}
    layers = max(numbers, default=-1) + 1
    asked = config.get("num_hidden_layers") or 0
    if layers and asked > FACTOR * layers:
        raise ValueError(
            f"num_hidden_layers={asked} in {where} asks for about {count(stored // layers * asked)} weights, "
            f"but the checkpoint has {layers} layers and {count(stored)} weights: {remedy}"
        )
    for fields, needed in _estimates(config, any(map(_DENSE.search, shards.tensors))):
        if needed > FACTOR * stored:
            # The largest factor is most likely the wrong one.
            name = max(fields, key=lambda field: int(config[field]))
            others = ", ".join(f"{field}={config[field]}" for field in fields if field != name)
            raise ValueError(
                f"{name}={config[name]} in {where}, with {others}, asks for {count(needed)} weights or more, but the "
                f"checkpoint has {count(stored)}: {remedy}"
            )


def _estimates(config: Mapping[str, Any], has_dense: bool) -> Iterator[tuple[tuple[str, ...], int]]:
    """Groups of fields, and the least number of weights that each group needs."""
    inner = "moe_intermediate_size" if config.get("moe_intermediate_size") else "intermediate_size"
    heads = "num_attention_heads"
    groups: list[tuple[int, tuple[str, ...]]] = [
        (1, ("vocab_size", "hidden_size")),
        *((3, (experts, "hidden_size", inner)) for experts in EXPERTS),
        (3, ("n_shared_experts", "hidden_size", inner)),
        (3, ("shared_expert_intermediate_size", "hidden_size")),
        *((1, (rank, "hidden_size")) for rank in ("q_lora_rank", "kv_lora_rank")),
    ]
    if has_dense:
        groups.append((3, ("intermediate_size", "hidden_size")))
    if config.get("kv_lora_rank"):
        groups += [(1, (heads, width, "kv_lora_rank")) for width in ("qk_nope_head_dim", "v_head_dim")]
        groups.append((1, (heads, "qk_rope_head_dim", "q_lora_rank" if config.get("q_lora_rank") else "hidden_size")))
    elif config.get("head_dim"):
        groups += [(1, (kind, "head_dim", "hidden_size")) for kind in (heads, "num_key_value_heads")]
    else:
        groups.append((1, (heads, "hidden_size")))
    for factor, fields in groups:
        if all(config.get(field) for field in fields):
            yield fields, factor * math.prod(config[field] for field in fields)


def count(number: int) -> str:
    """Formats a number for people: 1.2 billion."""
    for unit, name in ((10**15, ""), (10**12, " trillion"), (10**9, " billion"), (10**6, " million")):
        if number >= unit:
            return f"{number / unit:.1f}{name}" if name else f"{float(number):.1e}"
    return f"{number:,}"
