"""Weights in fp8 (float8 e4m3) with one scale for each block, row or tensor. They are read as bf16.

Blocks: DeepSeek-V3 and Qwen3's FP8 models. X is stored in fp8, X_scale_inv holds the factor of each block (in spite of
its name), and config.json has the size of a block.

Source: `weight_dequant` of DeepSeek-V3's inference code, and transformers' fine-grained FP8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .base import Encoding, StoredTensor, WeightFormat, without_activations
from .parameters import Declared

FP8 = "F8_E4M3"
_SCALE = "_scale_inv"


@dataclass(frozen=True)
class BlockEncoding(Encoding):
    """value = code * scale of its block of `rows` x `columns`."""

    rows: int
    columns: int

    def dequantize(self, parts: Mapping[str, Tensor]) -> Tensor:
        """bf16 [..., N, K]."""
        codes, scale = parts["codes"], parts["scale"].float()
        for dim, size in ((-2, self.rows), (-1, self.columns)):
            scale = scale.repeat_interleave(size, dim)
        return (codes.float() * scale[..., : codes.shape[-2], : codes.shape[-1]]).to(torch.bfloat16)


class Fp8Blocks(WeightFormat):
    """The format of a checkpoint; see the module."""

    def __init__(self, declared: Declared, block: tuple[int, int]) -> None:
        self.block = block
        self.file = declared.file
        self.title = f"fp8, blocks of {block[0]} x {block[1]}"

    def join(self, tensors: Mapping[str, StoredTensor], folder: Path) -> dict[str, StoredTensor]:
        joined = without_activations(tensors)
        for name, stored in tensors.items():
            scale = tensors.get(name + _SCALE)
            if stored.dtype != FP8 or len(stored.shape) < 2 or scale is None:
                continue  # CheckpointPlan refuses fp8 without a scale
            rows, columns = (-(-size // of) for size, of in zip(stored.shape[-2:], self.block, strict=True))
            if scale.shape != (*stored.shape[:-2], rows, columns):
                raise ValueError(
                    f"{name}{_SCALE} of {folder} has shape {list(scale.shape)}, but {name} {list(stored.shape)} "
                    f"has {rows} x {columns} blocks of {self.block[0]} x {self.block[1]}: "
                    "check that weight_block_size in config.json belongs to these weights"
                )
            joined[name] = replace(
                stored, encoding=BlockEncoding(*self.block), parts={"codes": stored, "scale": joined.pop(name + _SCALE)}
            )
        return joined


def block_of(declared: Declared) -> tuple[int, int] | None:
    """Rows and columns of a block that shares one scale; None if the declaration has none."""
    block = declared.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2:
        return None
    if not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in block):
        return None
    return block[0], block[1]
