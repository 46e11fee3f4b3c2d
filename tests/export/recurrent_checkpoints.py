"""Small checkpoints of models with gated delta rule layers, as they are published."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from executorch_moe.export.models.pretrained import resolve

from .families import Family, by_name

TYPES = ("qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next")
TWO_LAYERS = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}


def family_of(model_type: str, **options: Any) -> Family:
    """The family of the text model of a `model_type`, with further options."""
    family = by_name(model_type if model_type != "qwen3_5_moe" else "qwen3_5_moe_text")
    return dataclasses.replace(
        family, options=family.options | {"max_position_embeddings": 1088} | options, moe_layers=len(options) or 4
    )


FEW_CHOICES = {"experts.down_proj": 1 / 16}
"""The experts add little, so that their activations in bf16 change few choices of experts and tokens."""


def save_recurrent(
    model_type: str, folder: Path, factors: Mapping[str, float] = FEW_CHOICES, **options: Any
) -> nn.Module:
    """Saves a random model as a model folder with the tiny model's tokenizer; returns it, in fp32.

    The parameters whose names end with a key of `factors` are multiplied by its value.
    "qwen3_5_moe" is saved like the published checkpoints: the text model inside a multimodal one, with layers for
    multi-token prediction.
    """
    model: Any = family_of(model_type, **options).model()
    for name, parameter in model.named_parameters():
        for end, factor in factors.items():
            if name.endswith(end):
                parameter.data.mul_(factor)
    if model_type == "qwen3_5_moe":
        folder.mkdir(parents=True)
        write_multimodal(folder, model.state_dict(), model.config.to_dict())
    else:
        model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(resolve("tiny") / file, folder / file)
    return model  # type: ignore[no-any-return]


def write_multimodal(folder: Path, weights: dict[str, Tensor], text_config: dict[str, Any] | None) -> None:
    """Writes a multimodal checkpoint around the weights of a text model; without either if they are empty or None."""
    from safetensors.torch import save_file

    stored = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in weights.items()}
    stored |= {
        "model.visual.patch_embed.proj.weight": torch.ones(8, 3),
        "model.visual.blocks.0.attn.qkv.weight": torch.ones(24, 8),
        "mtp.fc.weight": torch.ones(8, 16),
    }
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "model.safetensors")
    config: dict[str, Any] = {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "vision_config": {"model_type": "qwen3_5_moe_vision", "depth": 1, "hidden_size": 8, "num_heads": 2},
        "tie_word_embeddings": False,
    }
    if text_config is not None:
        config["text_config"] = {**text_config, "model_type": "qwen3_5_moe_text"}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
