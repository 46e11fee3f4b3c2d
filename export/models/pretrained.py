"""Finds a Hugging Face model and reads its configuration. Nothing is downloaded."""

from __future__ import annotations

import functools
import importlib.resources
import json
from pathlib import Path
from typing import Any

from executorch_moe.backends.versions import HUGGING_FACE, check_versions
from executorch_moe.export.host_memory import size, total_memory
from executorch_moe.export.hub import cached, hub_model

TINY = "tiny"
BUNDLED = ("demo", TINY)
"""Models that are part of this package: one that writes sentences, and a smaller one for tests."""
CHANGING_ROPE = ("dynamic", "longrope")
"""RoPE types whose frequencies depend on the length of the text, which a traced method cannot follow."""
LINEAR = "linear_attention"
"""transformers' name for layers whose state does not grow with the text."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def require_transformers() -> Any:
    """Imports transformers and silences its log and progress bars.

    Raises:
        RuntimeError: a required package is missing, or its version is outside the supported range.
    """
    check_versions(*HUGGING_FACE)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def resolve(model: str | Path) -> Path:
    """Path of a model's folder.

    Args:
        model: a folder; a model's id on the Hub, if it is in huggingface_hub's cache, see `hub.hub_model`; or one of
            `BUNDLED`, models that are part of this package.

    Raises:
        FileNotFoundError: the folder, its config.json or its weights are missing, or the cache lacks the model.
        RuntimeError: an id on the Hub without the package huggingface_hub.
    """
    if str(model) in BUNDLED:
        # By name and not by import: export may not import examples.
        return Path(str(importlib.resources.files(f"executorch_moe.examples.{model}") / "checkpoint"))
    folder = cached(on_hub) if (on_hub := hub_model(model)) else Path(model)
    remedy = "give a folder with config.json and *.safetensors, a GGUF file, a model's id on the Hub, or 'demo'"
    if not folder.is_dir():
        raise FileNotFoundError(f"model={str(model)!r} is not a folder: {remedy}")
    for pattern in ("config.json", "*.safetensors"):
        if not any(folder.glob(pattern)) and not (pattern == "*.safetensors" and any(folder.glob("*.gguf"))):
            raise FileNotFoundError(f"model={str(model)!r} has no {pattern}: {remedy}")
    return folder


def check_supported(folder: Path) -> dict[str, Any]:
    """Reads config.json and checks that its model is supported.

    Returns:
        Its content; of a multimodal model, the text model's part with the `model_type` of the whole.

    Raises:
        ValueError: config.json is unreadable, or the model has no experts, or no text model.
        NotImplementedError: an unsupported architecture.
    """
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = config["model_type"]
        dict(config.get("quantization_config") or {})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{folder / 'config.json'} is not a model configuration ({type(error).__name__}: {error}): "
            "use the one that the model was published with"
        ) from None
    classes = _causal_models()
    if kind not in classes:
        raise NotImplementedError(
            f"model_type={kind!r} in {folder / 'config.json'} is no causal language model of the installed "
            "transformers: use another model, or a transformers that has it and that `executorch-moe doctor` accepts"
        )
    if classes[kind] and not isinstance(config.get("text_config"), dict):
        raise ValueError(
            f"model_type={kind!r} in {folder / 'config.json'} has no text_config, so there is no text model to export: "
            "use the whole model as it was published"
        )
    if not any("expert" in key for key in _all_keys(config)):
        raise ValueError(
            f"model_type={kind!r} in {folder / 'config.json'} is not a Mixture-of-Experts model (no experts in its "
            f"configuration): use a model with experts, see docs/support.md"
        )
    return text_part(config)


@functools.cache
def _causal_models() -> dict[str, bool]:
    """Values of model_type of the causal language models of transformers; true if their text model is a part."""
    transformers = require_transformers()
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as names

    return {
        kind: "text_config" in getattr(transformers.CONFIG_MAPPING[kind], "sub_configs", {})
        for kind in names
        if kind in transformers.CONFIG_MAPPING
    }


def layer_kinds(folder: Path, config: dict[str, Any]) -> list[str]:
    """Kinds of a model's layers, by its config.json, else by transformers; none if that refuses the file.

    transformers takes "mamba" for linear attention, so that its own names say less.
    """
    if isinstance(kinds := config.get("layer_types"), list):
        return sorted({"full_attention" if kind == "attention" else str(kind) for kind in kinds})
    transformers = require_transformers()
    try:
        return attention_kinds(transformers.AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config())
    except Exception:  # transformers and its dataclasses raise their own classes; `meta_model` reports it
        return []


def text_part(config: dict[str, Any]) -> dict[str, Any]:
    """The text model's part of a config.json, with the `model_type` of the whole."""
    text = config.get("text_config")
    return config if not isinstance(text, dict) else {**text, "model_type": config["model_type"]}


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder, of a multimodal model the text model's part; empty if it is unreadable, which
    `check_supported` reports."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return text_part(config) if isinstance(config, dict) else {}


def plain_outputs_(config: Any) -> None:
    """Changes a transformers configuration, in place: the model is to return only logits, in an output object.

    Fine-tuned checkpoints keep flags of their training. With `output_router_logits`, for example, a model also computes
    a loss over the routers of all layers, which cannot be traced with a cache.
    """
    for name in ("output_router_logits", "output_attentions", "output_hidden_states"):
        if getattr(config, name, None):
            setattr(config, name, False)
    if getattr(config, "return_dict", True) is not True:
        config.return_dict = True


def attention_kinds(config: Any) -> list[str]:
    """Kinds of attention among a model's layers. `layer_types` decides: a configuration may set an unused window."""
    if kinds := getattr(config, "layer_types", None):
        return sorted(set(kinds))
    return ["sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"]


def rope_types(config: Any) -> set[str]:
    """RoPE types of a model's layers, in transformers' names; some configurations set one for each kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    parts = [part for part in (parameters, *parameters.values()) if isinstance(part, dict)]
    return {part["rope_type"] for part in parts if "rope_type" in part}


def check_rope(config: Any) -> None:
    """Checks the RoPE of a transformers configuration.

    Raises:
        NotImplementedError: frequencies that depend on the length of the text.
    """
    if changing := sorted(rope_types(config) & set(CHANGING_ROPE)):
        raise NotImplementedError(
            f"RoPE of type {', '.join(changing)} is not supported: its frequencies depend on the length of the text; "
            "use a model with another rope_type (default, linear, llama3, yarn)"
        )


def check_cache(config: Any, max_context: int, item_bytes: int, slots: int = 1) -> None:
    """Checks that a KV cache fits into this machine's memory, in which the export allocates it.

    Args:
        config: transformers' configuration.
        max_context: positions in a slot of the cache. slots: their number. item_bytes: bytes of one element.

    Raises:
        ValueError: it does not fit; gives the bytes needed and available.
    """
    layers = config.num_hidden_layers  # layers with a sliding window cache all positions too
    layers -= list(getattr(config, "layer_types", None) or ()).count(LINEAR)  # their states are small
    if rank := getattr(config, "kv_lora_rank", None):
        width = rank + config.qk_rope_head_dim
    else:
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        width = 2 * config.num_key_value_heads * head
    needed, available = layers * width * max_context * item_bytes * slots, total_memory()
    if available and needed > available:
        raise ValueError(
            f"max_context={max_context} needs a KV cache of {size(needed)}, but this machine has {size(available)} of "
            f"memory: use at most {available * max_context // needed}, or export on a machine with more memory"
        )


def read_generation_config(folder: Path) -> dict[str, Any]:
    """generation_config.json of a model folder; empty if the file does not exist.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise TypeError(f"a {type(config).__name__}")
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is not a generation configuration ({type(error).__name__}: {error}): download it again, or "
            "remove it"
        ) from None
    return config


def special_tokens(folder: Path | None, config: Any) -> tuple[list[int], int | None]:
    """End-of-text tokens of a model, and its begin-of-text token or None.

    As in transformers, generation_config.json takes precedence over config.json: chat models often end a turn with a
    token that only the former names.

    Args:
        folder: the model folder; None for a model without files.
        config: transformers' configuration of the model.

    Raises:
        ValueError: an invalid token, or a damaged generation_config.json.
    """
    generation = {} if folder is None else read_generation_config(folder)

    def tokens(name: str) -> list[int]:
        where, value = "generation_config.json", generation.get(name)
        if value is None:
            where, value = "config.json", getattr(config, name, None)
        found = [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
        # Some configurations write -1 for "no token".
        found = [token for token in dict.fromkeys(found) if token != -1]
        for token in found:
            if type(token) is not int or token < 0:
                raise ValueError(
                    f"{name}={value!r} of {where} must be a token id or a list of token ids: correct it, or "
                    "download the model again"
                )
        return found

    begins = tokens("bos_token_id")
    return tokens("eos_token_id"), begins[0] if begins else None


def _all_keys(config: dict[str, Any]) -> set[str]:
    """Keys of a configuration, with those of nested configurations."""
    inner = [_all_keys(value) for value in config.values() if isinstance(value, dict)]
    return {*config, *(key for keys in inner for key in keys)}


def tokenizer_json(folder: Path) -> str:
    """Text of the model's `tokenizer.json`, converted from another format if need be.

    Raises:
        ValueError: no tokenizer, or one that cannot be written as one file.
    """
    transformers = require_transformers()
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    try:
        # AutoTokenizer makes an empty tokenizer if the folder has no tokenizer file.
        if not any((folder / name).is_file() for name in TOKENIZER_FILES):
            raise FileNotFoundError(f"none of {', '.join(TOKENIZER_FILES)}")
        if path.is_file():
            text = path.read_text(encoding="utf-8")
        else:
            text = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer.to_str()
        Tokenizer.from_str(text)
    except Exception as error:  # the bindings of tokenizers raise plain Exception
        raise ValueError(f"{folder} has no usable tokenizer ({error}): put the model's tokenizer.json there") from error
    return text
