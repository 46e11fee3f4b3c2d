"""Reads a Hugging Face model folder: configuration, weights and tokenizer, from disk only."""

from __future__ import annotations

import importlib.resources
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

# model_type of config.json. Their experts are fused by any of our partitioners; here they must fit `CausalLM` as well,
# whose cache knows plain attention only (neither sliding windows nor DeepSeek's latent attention).
SUPPORTED_MODEL_TYPES = ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "glm4_moe")
TINY = "tiny"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def require_transformers() -> Any:
    """The transformers package, silenced.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ModuleNotFoundError(
            "transformers is not installed: reading a model folder needs it; pip install 'executorch-moe[hf]'"
        ) from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def resolve(model: str | Path) -> Path:
    """The folder that `model` names; "tiny" is the model that comes with this package.

    Raises:
        FileNotFoundError: no such folder, or a folder without config.json or weights.
    """
    if str(model) == TINY:
        # Found by name, not imported: the examples are a layer above this one.
        return Path(str(importlib.resources.files("executorch_moe.examples.tiny") / "checkpoint"))
    folder = Path(model)
    remedy = "give a folder with config.json and *.safetensors (nothing is downloaded), or 'tiny'"
    if not folder.is_dir():
        raise FileNotFoundError(f"model={str(model)!r} is not a folder: {remedy}")
    for pattern in ("config.json", "*.safetensors"):
        if not any(folder.glob(pattern)):
            raise FileNotFoundError(f"model={str(model)!r} has no {pattern}: {remedy}")
    return folder


def check_supported(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a supported model.

    Raises:
        ValueError: config.json is unreadable.
        NotImplementedError: another architecture.
    """
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        kind = config["model_type"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / 'config.json'} is no model configuration ({type(error).__name__}: {error}): download it again"
        ) from None
    if kind not in SUPPORTED_MODEL_TYPES:
        raise NotImplementedError(
            f"model_type={kind!r} in {folder / 'config.json'} is not supported yet: "
            f"use a model of type {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    return config


def load_model(folder: Path, dtype: torch.dtype, attention: str = "sdpa") -> nn.Module:
    """The model on the CPU in `dtype`, in eval mode; `attention` is transformers' `attn_implementation`.

    Raises:
        ValueError: the weights are unreadable or do not fit the configuration.
    """
    transformers = require_transformers()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, attn_implementation=attention
        )
    except Exception as error:  # safetensors, transformers and torch each raise their own kinds here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"the weights in {folder} cannot be loaded ({reason}): download the model again") from error
    return model.eval()


def tokenizer_json(folder: Path) -> str:
    """The tokenizer as the text of a `tokenizer.json`.

    Raises:
        ValueError: the folder has no tokenizer that can be written as one file.
    """
    transformers = require_transformers()
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    try:
        # Without any file of its own, AutoTokenizer makes an empty tokenizer of the model's kind.
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
