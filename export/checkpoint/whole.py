"""Loads a model folder in one piece through transformers, with its experts unpacked."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from executorch_moe.export.models.pretrained import plain_outputs_, read_config, require_transformers, special_tokens

from .formats import read_format
from .gguf import GgufFormat
from .shards import COMPLETE, Shards, all_finite, gguf_files, listed
from .sizes import check_sizes


def check_loadable(folder: Path) -> None:
    """Checks that `load_model` supports the format of a folder's weights.

    Raises:
        NotImplementedError: quantized weights, which only `StreamedModel` reads.
        ValueError: see `read_format`.
    """
    found = GgufFormat(folder, files) if (files := gguf_files(folder)) else read_format(folder)
    if found is not None:
        raise NotImplementedError(
            f"the weights in {folder} are quantized ({found}), which only --experts ours reads: leave --experts out"
        )


def load_model(folder: Path, dtype: torch.dtype, attention: str = "sdpa") -> nn.Module:
    """Loads a model on the CPU, in `dtype` and in eval mode.

    Args:
        folder: model folder.
        dtype: dtype of all weights.
        attention: transformers' `attn_implementation`.

    Raises:
        ValueError: weights that are unreadable, missing, NaN or Inf, or that do not fit the configuration.
        NotImplementedError: quantized weights, which only `StreamedModel` reads.
    """
    transformers = require_transformers()
    check_loadable(folder)
    check_sizes(read_config(folder), Shards(folder))
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        plain_outputs_(config)
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, local_files_only=True, attn_implementation=attention,
            output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # safetensors, transformers and torch each raise their own classes
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"the weights in {folder} cannot be loaded ({reason}): check that config.json and weights are of the same "
            "model and complete"
        ) from error
    special_tokens(folder, config)
    if missing := sorted(found["missing_keys"]):  # transformers fills them with random numbers
        raise ValueError(f"{folder} lacks {listed(missing)}: {COMPLETE}")
    for name, tensor in model.state_dict().items():
        if not all_finite(tensor):
            raise ValueError(
                f"{name} in {folder} holds NaN or Inf: compare the files' checksums with the publisher's; if they are "
                "equal, use another checkpoint"
            )
    return model.eval()
