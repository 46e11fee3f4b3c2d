"""Checks sizes before any module is built: a configuration against the stored weights, synthetic models and KV caches
against this machine's memory and disk."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from executorch_moe.export.host_memory import total_memory

if TYPE_CHECKING:
    from executorch_moe.export.checkpoint.shards import Shards
    from executorch_moe.export.models.synthetic import SyntheticModel

FACTOR = 4
"""A configuration that asks for more than this many times the stored weights is refused at once; others are compared
weight by weight later."""
MAX_LAYERS = 1000
"""Limit for synthetic models. Tracing takes seconds per layer; the largest published models have about 130 layers."""
LARGEST_GPU = 1 << 40
"""Bytes, more than the memory of any GPU. Limit for placeholder weights, which the GPU that loads them computes."""

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
_DENSE = re.compile(r"\.mlp\.(gate|up|down|gate_up)_proj\.")


def check_numbers(config: Mapping[str, Any], where: Path) -> None:
    """Check that the sizes of a configuration are whole numbers, and that all numbers can be computed with.

    Raises:
        ValueError: a size that is no whole number, NaN or Inf, a RoPE base that is not positive, or a negative epsilon.
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
                f"{name}={value!r} in {where} must be {what}: put the number there that the model was trained with"
            )
    for least, names in ((1, _AT_LEAST_ONE), (0, _AT_LEAST_ZERO)):
        for name in names:
            value = config.get(name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ValueError(
                    f"{name}={value!r} in {where} must be a whole number of at least {least}: "
                    "put the number there that the model was trained with"
                )


def _scalars(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Key and value of every number in a configuration, nested objects included."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _scalars(value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield name, value


def check_sizes(config: Mapping[str, Any], shards: Shards) -> None:
    """Check that a configuration does not ask for far more weights than its checkpoint has; reads no weights.

    Smaller differences are found weight by weight later (`CheckpointPlan`).

    Raises:
        ValueError: see `check_numbers`; or a size that is far too large. Names the field, what it asks for and what
            the checkpoint has.
    """
    where = shards.folder / "config.json"
    check_numbers(config, where)
    held = sum(math.prod(stored.shape) for stored in shards.tensors.values())
    remedy = "check that config.json and weights are of the same model, and correct the number"
    layers = {int(match[1]) for name in shards.tensors if (match := _LAYER.search(name))}
    asked = config.get("num_hidden_layers") or 0
    if layers and asked > FACTOR * (max(layers) + 1):
        raise ValueError(
            f"num_hidden_layers={asked} in {where} asks for about {count(held // (max(layers) + 1) * asked)} weights, "
            f"but the checkpoint has {max(layers) + 1} layers and {count(held)} weights: {remedy}"
        )
    for fields, needed in _estimates(config, any(map(_DENSE.search, shards.tensors))):
        if needed > FACTOR * held:
            # The largest factor is most likely the wrong one.
            name = max(fields, key=lambda field: int(config[field]))
            others = ", ".join(f"{field}={config[field]}" for field in fields if field != name)
            raise ValueError(
                f"{name}={config[name]} in {where}, with {others}, asks for {count(needed)} weights or more, but the "
                f"checkpoint has {count(held)}: {remedy}"
            )


def _estimates(config: Mapping[str, Any], has_dense: bool) -> Iterator[tuple[tuple[str, ...], int]]:
    """Fields of a configuration, and the least number of weights that they ask for together."""
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


def check_cache(config: Any, max_context: int, item_bytes: int) -> None:
    """Check that a KV cache fits into the memory of this machine, where the export allocates it.

    Args:
        config: a transformers configuration.
        max_context: positions in the cache.
        item_bytes: bytes of one element.

    Raises:
        ValueError: it does not fit. Names the sizes of the cache and of the memory.
    """
    layers = config.num_hidden_layers  # a layer with a sliding window has a cache of all positions too
    if rank := getattr(config, "kv_lora_rank", None):
        width = rank + config.qk_rope_head_dim
    else:
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        width = 2 * config.num_key_value_heads * head
    needed, there = layers * width * max_context * item_bytes, total_memory()
    if there and needed > there:
        raise ValueError(
            f"max_context={max_context} needs a KV cache of {size(needed)}, but this machine has {size(there)} of "
            f"memory: use at most {there * max_context // needed}, or export where there is more"
        )


def check_synthetic(
    model: SyntheticModel, preset: SyntheticModel, bits: float, out: Path | None, placeholder_weights: bool
) -> None:
    """Check that a synthetic model fits into memory and can be written.

    Args:
        model: the model.
        preset: the preset that it was derived from.
        bits: bits per weight of the experts.
        out: where it is written; None: nowhere.
        placeholder_weights: its weights are made on the GPU that loads it.

    Raises:
        ValueError: it does not fit. Names the field that is farthest from the preset, the size of the model and the
            space that is available.
    """
    if model.layers > MAX_LAYERS:
        raise ValueError(f"layers={model.layers} of {model.name} is more than can be traced: use at most {MAX_LAYERS}")
    needed = model.weight_bytes(bits)
    rooms = {"any GPU has": LARGEST_GPU} if placeholder_weights else {"of this machine's memory": total_memory()}
    if not placeholder_weights and out is not None:
        folder = next(parent for parent in out.absolute().parents if parent.exists())
        rooms[f"free in {folder}"] = shutil.disk_usage(folder).free
    names = ("layers", "hidden", "experts", "intermediate", "heads", "kv_heads", "head_dim", "vocabulary")
    name = max(names, key=lambda field: getattr(model, field) / getattr(preset, field))
    for what, there in rooms.items():
        if there and needed > there:
            more = f"more than {what}" if placeholder_weights else f"more than the {size(there)} {what}"
            raise ValueError(
                f"{name}={getattr(model, name)} of {model.name} makes a model of about {size(needed)}, {more}: "
                "use a smaller one"
            )


def count(number: int) -> str:
    """A readable number: 1.2 billion."""
    for unit, name in ((10**15, ""), (10**12, " trillion"), (10**9, " billion"), (10**6, " million")):
        if number >= unit:
            return f"{number / unit:.1f}{name}" if name else f"{float(number):.1e}"
    return f"{number:,}"


def size(num_bytes: float) -> str:
    """A readable size: 1.9 MB."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.2f} GB" if num_bytes < 1000 else f"{num_bytes / 1000:,.1f} TB"
