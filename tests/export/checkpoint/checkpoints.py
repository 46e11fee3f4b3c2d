"""Small checkpoints as they are published, edits that damage them, and the model that reads them."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from executorch_moe.backends.fusion import FusionOptions
from executorch_moe.export.checkpoint.shards import INDEX_FILE
from executorch_moe.export.checkpoint.streaming import StreamedModel

from ..families import by_name

pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file


def save_hub(name: str, folder: Path) -> torch.nn.Module:
    """Saves a model as on the Hub: one matrix for each expert, in several files."""
    model: Any = by_name(name).model()
    model.save_pretrained(folder, max_shard_size="40KB")
    return model


def save_stacked(name: str, folder: Path) -> torch.nn.Module:
    """Saves a model in the layout of transformers: stacked experts, in one file."""
    model: Any = by_name(name).model()
    model.config.save_pretrained(folder)
    weights = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return model


def stream(folder: Path, scheme: str = "w4a16", group_size: int = 32) -> StreamedModel:
    # GPT-OSS supports no other attention.
    return StreamedModel(folder, torch.float32, "eager", FusionOptions(scheme, group_size))


BLOCK = (16, 24)  # neither number divides the sizes of the weights


def in_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """fp8 codes, the scales of blocks, and the dequantized bf16 weight, computed block by block."""
    rows, columns = (-(-size // of) for size, of in zip(weight.shape, BLOCK, strict=True))
    codes, scales = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
    exact = torch.empty_like(weight, dtype=torch.bfloat16)
    for i, j in itertools.product(range(rows), range(columns)):
        part = slice(i * BLOCK[0], (i + 1) * BLOCK[0]), slice(j * BLOCK[1], (j + 1) * BLOCK[1])
        scales[i, j] = weight[part].abs().max() / 448
        codes[part] = (weight[part] / scales[i, j]).to(torch.float8_e4m3fn)
        exact[part] = (codes[part].float() * scales[i, j]).bfloat16()
    return codes, scales, exact


def save_fp8(name: str, folder: Path) -> Path:
    """Saves a model in fp8 as published ones are, and the same model in bf16; returns the folder of the latter."""
    save_hub(name, folder)
    plain = folder.parent / "plain"
    shutil.copytree(folder, plain)
    index = json.loads((folder / INDEX_FILE).read_text())
    for file in sorted(set(index["weight_map"].values())):
        quantized, exact = {}, {}
        for key, tensor in load_file(folder / file).items():
            quantized[key] = exact[key] = tensor
            if key.endswith("_proj.weight"):
                quantized[key], quantized[f"{key}_scale_inv"], exact[key] = in_blocks(tensor)
                index["weight_map"][f"{key}_scale_inv"] = file
        save_file(quantized, folder / file, {"format": "pt"})
        save_file(exact, plain / file, {"format": "pt"})
    (folder / INDEX_FILE).write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK)}
    (folder / "config.json").write_text(json.dumps(config))
    return plain


def shard_of(folder: Path, name: str) -> Path:
    index = json.loads((folder / INDEX_FILE).read_text())["weight_map"]
    return folder / str(index[name])


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    change(index["weight_map"])
    (folder / INDEX_FILE).write_text(json.dumps(index))


def edit_shard(folder: Path, name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = shard_of(folder, name)
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


GATE = "model.layers.1.mlp.experts.2.gate_proj.weight"
NORM = "model.norm.weight"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])
