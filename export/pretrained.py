"""Reads a Hugging Face model folder: configuration, weights and tokenizer, from disk only."""

from __future__ import annotations

import importlib.resources
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .shards import Shards, all_finite, fp8_block, read_config
from .sizes import check_sizes

# model_type of config.json. Any model's experts are fused by our partitioners; these fit `CausalLM` as well.
SUPPORTED_MODEL_TYPES = ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "glm4_moe", "gpt_oss", "deepseek_v3")
WITH_SINKS = ("gpt_oss",)
"""Of these, those whose attention has a sink for each head."""
WITH_LATENTS = ("deepseek_v3",)
"""Of these, those whose attention has keys and values of different widths, made of latents."""
TINY = "tiny"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def require_transformers() -> Any:
    """The transformers package, silenced.

    Raises:
        ModuleNotFoundError: it is not installed.
        RuntimeError: a version outside the range that this package requires.
    """
    check_version("transformers")
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


def check_version(package: str) -> None:
    """Check an installed package against this package's own requirements, the one place where ranges are stated.

    Raises:
        RuntimeError: a version outside the range. A package that is not installed is no error here.
    """
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("executorch-moe") or []
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        return
    for requirement in map(Requirement, lines):
        if requirement.name == package and not requirement.specifier.contains(version, prereleases=True):
            raise RuntimeError(
                f"{package} {version} is installed, but {requirement.specifier} is needed: "
                f"pip install '{package}{requirement.specifier}'"
            )


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
        ValueError: config.json is unreadable, or of a model without experts.
        NotImplementedError: another architecture, or weights that are quantised already, but for fp8 in blocks.
    """
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = config["model_type"]
        method = dict(config.get("quantization_config") or {}).get("quant_method")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{folder / 'config.json'} is no model configuration ({type(error).__name__}: {error}): "
            "take the one that the model was published with"
        ) from None
    if not any("expert" in key for key in _all_keys(config)):
        raise ValueError(
            f"model_type={kind!r} in {folder / 'config.json'} is no Mixture-of-Experts model (no experts in its "
            f"configuration): use a model of type {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    if kind not in SUPPORTED_MODEL_TYPES:
        raise NotImplementedError(
            f"model_type={kind!r} in {folder / 'config.json'} is not supported yet: "
            f"use a model of type {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    if method and fp8_block(config) is None:
        raise NotImplementedError(
            f"the weights in {folder} are quantised ({method}), which is not supported yet: use the model in bf16"
        )
    return config


def _all_keys(config: dict[str, Any]) -> set[str]:
    """Keys of a configuration and of the configurations in it."""
    inner = [_all_keys(value) for value in config.values() if isinstance(value, dict)]
    return {*config, *(key for keys in inner for key in keys)}


def load_model(folder: Path, dtype: torch.dtype, attention: str = "sdpa") -> nn.Module:
    """The model on the CPU in `dtype`, in eval mode; `attention` is transformers' `attn_implementation`.

    Raises:
        ValueError: the weights are unreadable or do not fit the configuration.
        NotImplementedError: weights in fp8, which only `StreamedModel` reads.
    """
    transformers = require_transformers()
    if fp8_block(read_config(folder)) is not None:
        raise NotImplementedError(
            f"the weights in {folder} are in fp8, which only --experts ours reads: leave --experts out"
        )
    check_sizes(read_config(folder), Shards(folder))
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, attn_implementation=attention
        )
    except Exception as error:  # safetensors, transformers and torch each raise their own kinds here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"the weights in {folder} cannot be loaded ({reason}): check that config.json and weights are of the same "
            "model and whole"
        ) from error
    for name, tensor in model.state_dict().items():
        if not all_finite(tensor):
            raise ValueError(
                f"{name} in {folder} holds NaN or Inf: compare the files' checksums with the publisher's; if they are "
                "theirs, use another checkpoint"
            )
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
