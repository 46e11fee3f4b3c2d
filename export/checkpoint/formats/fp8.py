"""Weights in fp8 (float8 e4m3) with one scale per block, row or tensor. They are read as bf16.

A weight X is stored in fp8. X_scale or X_scale_inv holds its scales; both are factors, although DeepSeek's name for the
second suggests an inverse. [N, 1] or [N] is one per row, one value is for the whole tensor, and blocks have the size
that the configuration declares. Stacked weights [E, N, K] have the same with E in front.

Source: `weight_dequant` of DeepSeek-V3's inference code; transformers' fine-grained FP8 (`fp8`, with or without blocks)
and FBGEMM (`fbgemm_fp8`, rows); `FloatQuantizationCompressor` of compressed-tensors; FP8 of NVIDIA's modelopt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .base import Encoding, StoredTensor, WeightFormat, without_activations
from .int4 import FLOATS
from .parameters import Declared, choice

FP8 = "F8_E4M3"
_SCALES = ("_scale_inv", "_scale")


@dataclass(frozen=True)
class BlockEncoding(Encoding):
    """value = code * scale of its block of `rows` x `columns`; 0 means all rows or columns."""

    rows: int
    columns: int

    def dequantize(self, parts: Mapping[str, Tensor]) -> Tensor:
        """bf16 [..., N, K]."""
        codes, scale = parts["codes"], parts["scale"].float()
        *stack, n, k = codes.shape
        rows, columns = self.rows or n, self.columns or k
        scale = scale.reshape(*(stack if scale.numel() >= math.prod(stack) else ()), -(-n // rows), -(-k // columns))
        for dim, size, of in ((-2, rows, n), (-1, columns, k)):
            # One scale for all is broadcast.
            scale = scale if size >= of else scale.repeat_interleave(size, dim).narrow(dim, 0, of)
        return (codes.float() * scale).to(torch.bfloat16)


class Fp8(WeightFormat):
    """The format of a checkpoint; see the module.

    Args:
        declared: the declaration.
        block: rows and columns of a block; None for one scale per row or tensor.
        name: of the format, for messages.
    """

    def __init__(self, declared: Declared, block: tuple[int, int] | None, name: str = "fp8") -> None:
        self.block = block
        self.file = declared.file
        self.title = f"{name}, blocks of {block[0]} x {block[1]}" if block else f"{name}, one scale per row or tensor"

    def join(self, tensors: Mapping[str, StoredTensor], folder: Path) -> dict[str, StoredTensor]:
        joined = without_activations(tensors)
        for name, stored in tensors.items():
            found = next((name + end for end in _SCALES if name + end in tensors), None)
            if stored.dtype != FP8 or len(stored.shape) < 2 or found is None:
                continue  # CheckpointPlan refuses fp8 without a scale
            scale = joined.pop(found)
            encoding = self._encoding(stored, scale, folder)
            joined[name] = replace(stored, encoding=encoding, parts={"codes": stored, "scale": scale})
        return joined

    def _encoding(self, stored: StoredTensor, scale: StoredTensor, folder: Path) -> BlockEncoding:
        *stack, n, k = stored.shape
        if scale.dtype not in FLOATS:
            raise ValueError(
                f"{scale.name} of {folder} is stored as {scale.dtype}, expected {', '.join(FLOATS)}: check that "
                f"{self.file} belongs to these weights"
            )
        if self.block is not None:
            rows, columns = (-(-size // of) for size, of in zip((n, k), self.block, strict=True))
            if scale.shape != (*stack, rows, columns):
                raise ValueError(
                    f"{scale.name} of {folder} has shape {list(scale.shape)}, but {stored.name} {list(stored.shape)} "
                    f"has {rows} x {columns} blocks of {self.block[0]} x {self.block[1]}: "
                    f"check that the block size in {self.file} belongs to these weights"
                )
            return BlockEncoding(*self.block)
        one = [(), (1,), (1, 1), tuple(stack), (*stack, 1), (*stack, 1, 1)]
        if scale.shape in ((*stack, n, 1), (*stack, n)) and n > 1:
            return BlockEncoding(1, 0)
        if scale.shape not in one:
            raise ValueError(
                f"{scale.name} of {folder} has shape {list(scale.shape)}, but {stored.name} {list(stored.shape)} needs "
                f"one scale, or one for each of {n} rows: check that {self.file} belongs to these weights"
            )
        return BlockEncoding(0, 0)


def fp8(declared: Declared) -> WeightFormat:
    """The format of `quant_method` "fp8" and "fbgemm_fp8".

    Raises:
        NotImplementedError: another number format than e4m3.
        ValueError: an invalid block size.
    """
    choice(declared, "fmt", ("e4m3",), default="e4m3")
    return Fp8(declared, block_of(declared, "weight_block_size"))


def block_of(declared: Declared, key: str) -> tuple[int, int] | None:
    """Rows and columns of a block that shares one scale; None if the declaration has none.

    Raises:
        ValueError: something else than two whole numbers.
    """
    block = declared.get(key)
    if block is None:
        return None
    whole = isinstance(block, list) and all(type(size) is int and size > 0 for size in block)
    if not whole or len(block) != 2:
        raise ValueError(
            f"{key}={block!r} in {declared.path} must be two whole numbers of at least 1: use the published file"
        )
    return block[0], block[1]
