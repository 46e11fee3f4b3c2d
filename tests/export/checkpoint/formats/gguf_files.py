"""Writes a model as a GGUF file, by the package gguf. Its `dequantize` gives the right values.

The package does not quantize to K-quants, so that their blocks are random bytes with scales of a usual magnitude.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from .gguf_conversion import convert, write_metadata
from .stored import tiny_model

transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf", reason="needs the package gguf")
TYPES = gguf.GGMLQuantizationType
SIZE = 256  # the values in a block of K-quants
BLOCKS = {"Q4_K": (144, (0, 2)), "Q5_K": (176, (0, 2)), "Q6_K": (210, (208,))}
"""K-quants: bytes of a block, and where fp16 scales are."""


def quantized(weight: Tensor, kind: str) -> tuple[np.ndarray, Tensor]:
    """Stored blocks, and their values."""
    array = weight.numpy()
    if kind in BLOCKS:
        nbytes, scales = BLOCKS[kind]
        shape = (*weight.shape[:-1], weight.shape[-1] // SIZE, nbytes)
        blocks = np.random.default_rng(weight.numel()).integers(0, 256, shape, dtype=np.uint8)
        for place, value in zip(scales, (1e-4 if kind != "Q6_K" else 2e-5, 1e-3), strict=False):
            blocks[..., place : place + 2] = np.frombuffer(np.float16(value).tobytes(), dtype=np.uint8)
        stored = blocks.reshape(*weight.shape[:-1], -1)
    else:
        stored = gguf.quants.quantize(array, TYPES[kind])
    return stored, torch.from_numpy(gguf.quants.dequantize(stored, TYPES[kind]).copy())


@dataclass(frozen=True)
class Written:
    """A GGUF file, transformers' model on its values, and its stored blocks by name in the file."""

    path: Path
    reference: Any
    blocks: dict[str, np.ndarray]


def write(
    path: Path,
    model: Any,
    kind_of: Callable[[str], str],
    architecture: str = "qwen3moe",
    change: Callable[[Any], object] | None = None,
    most_tensors: int = 0,
    variant: str = "",
) -> Written:
    """Writes a model's file.

    Args:
        kind_of: name in the file -> name of the type.
        change: changes the writer before it writes.
        most_tensors: in one file; 0 for all.
        variant: see `Converted`.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=most_tensors)
    write_metadata(writer, config, architecture, variant)
    plain, blocks = {}, {}

    def add(name: str, tensor: Tensor) -> Tensor:
        # As llama.cpp does: vectors, and the kernels of convolutions, are floats.
        floats = tensor.dim() == 1 or name.endswith("bias") or "conv1d" in name
        kind = "F32" if floats else kind_of(name)
        stored, values = quantized(tensor.contiguous(), kind)
        blocks[name] = stored
        writer.add_tensor(name, stored, raw_dtype=None if kind in ("F32", "F16") else TYPES[kind])
        return values.float()

    for name, tensor in model.state_dict().items():
        converted = convert(name, tensor.detach().float(), config, architecture, variant)
        values = [add(stored, part) for stored, part in converted.parts.items()]
        plain[name] = converted.back(*values).contiguous().clone()
    if change is not None:
        change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    folder = path.parent / f"{path.stem}-plain"
    config.save_pretrained(folder)
    save_file(plain, folder / "model.safetensors", {"format": "pt"})
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return Written(path, reference.eval(), blocks)


def big_model() -> Any:
    return tiny_model(hidden_size=SIZE, moe_intermediate_size=SIZE, norm_topk_prob=True, head_dim=128)


def only(kind: str) -> Callable[[str], str]:
    """All matrices but the router in one type."""
    return lambda name: "F32" if "ffn_gate_inp" in name else kind


def check_configuration(found: Any, expected: Any) -> None:
    """Checks that all entries of two configurations are equal, but those for training and those for text."""
    ours, others = found.to_dict(), expected.to_dict()
    # transformers' own conversion does not undo the rounding to 32 bits.
    assert ours.pop("rms_norm_eps") == pytest.approx(others.pop("rms_norm_eps"), rel=1e-6)
    differ = {name for name in ours.keys() | others.keys() if ours.get(name) != others.get(name)}
    unused = {"initializer_range", "eos_token_id", "architectures", "_name_or_path"}
    assert not differ - unused, {name: (ours.get(name), others.get(name)) for name in differ - unused}
