"""Block types of ggml: rows consist of blocks, whose bytes hold codes and scales.

The package gguf computes the values. Three types have 4-bit codes with one scale per 32 weights: codes can be kept.
In a run of L bytes, byte j has value j in its low nibble and value j + L in its high nibble.
    Q4_0  18 bytes, 32 weights: d fp16, 16 bytes of nibbles; value = (nibble - 8) * d
    Q4_1  20 bytes, 32 weights: d fp16, m fp16, 16 bytes of nibbles; value = nibble * d + m
    Q4_K  144 bytes, 256 weights in 8 groups: d fp16, dmin fp16, 12 bytes with 6-bit scales and minima of the groups,
          4 runs of 32 bytes with two groups each; value = nibble * d * scale - dmin * minimum

MXFP4 keeps its codes in scheme mxfp4.
    MXFP4  17 bytes, 32 weights: e8m0, 16 bytes of nibbles; value = e2m1(nibble) * 2^(e8m0 - 127)

Source: ggml's `block_q4_0`, `block_q4_1`, `block_q4_K`, `get_scale_min_k4` and `block_mxfp4`; the package gguf,
`quants.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from executorch_moe.export.checkpoint.formats.base import Encoding
from executorch_moe.kernels import Int4Codes
from executorch_moe.kernels.packing.mxfp4 import Mxfp4Codes

from .changes import SAME, Change

Kinds = tuple[tuple[str, str], ...]
GROUP = 32
CODED = ("Q4_0", "Q4_1", "Q4_K")
"""Types whose codes can be kept."""
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TYPES = (*CODED, "Q5_0", "Q5_1", "Q8_0", "Q5_K", "Q6_K", "MXFP4", *FLOATS)
"""Types that can be read."""


@dataclass(frozen=True)
class GgufEncoding(Encoding):
    """A tensor of blocks, or of floats that change.

    Attributes:
        kind: name of ggml's type.
        change: what makes the model's tensor of the stored one.
    """

    kind: str
    change: Change = SAME

    @property
    def group_size(self) -> int:  # type: ignore[override]
        """32 for types with 4-bit codes, else 0."""
        return GROUP if self.kind in CODED and self.change.keeps_groups(GROUP) else 0

    @property
    def symmetric(self) -> bool:  # type: ignore[override]
        """True if codes have no zero points."""
        return self.kind == "Q4_0"

    @property
    def microscaled(self) -> bool:  # type: ignore[override]
        """True for MXFP4."""
        return self.kind == "MXFP4" and self.change.keeps_groups(GROUP)

    def mxfp4(self, parts: Mapping[str, Tensor]) -> Mxfp4Codes:
        blocks = parts["codes"].unflatten(-1, (-1, 17))
        q, scale = _halves(blocks[..., 1:]).flatten(-2), blocks[..., 0].contiguous()
        return Mxfp4Codes(self.change.moved(q), self.change.moved(scale, GROUP))

    def dequantize(self, parts: Mapping[str, Tensor]) -> Tensor:
        """fp32 [..., N, K], exact; floats keep their dtype if their values do not change."""
        stored = parts["codes"]
        if self.kind in FLOATS:
            return self.change.of(stored)
        import gguf

        kind: Any = gguf.GGMLQuantizationType[self.kind]
        return self.change.of(torch.from_numpy(gguf.quants.dequantize(stored.numpy(), kind)))

    def codes(self, parts: Mapping[str, Tensor]) -> Int4Codes:
        q, scale, zero = _UNPACK[self.kind](parts["codes"])
        moved = None if zero is None else self.change.moved(zero, GROUP)
        return Int4Codes(self.change.moved((q.to(torch.int8) - 8).contiguous()), self.change.moved(scale, GROUP), moved)


@dataclass(frozen=True)
class StackedEncoding(Encoding):
    """Experts of GPT-OSS, from tensors [E, N, K] of blocks or floats, or from biases [E, N].

    Roles: "gate" and "up", whose rows alternate in the result; or "down" alone. Weights are transposed to [E, K, N].

    Attributes:
        kinds: role -> name of ggml's type.
    """

    kinds: Kinds

    @property
    def microscaled(self) -> bool:  # type: ignore[override]
        """True for MXFP4."""
        return all(kind == "MXFP4" for _, kind in self.kinds)

    @property
    def group_size(self) -> int:  # type: ignore[override]
        """32 if all tensors have 4-bit codes of one type, else 0."""
        return group_of_kinds(self.kinds)

    @property
    def symmetric(self) -> bool:  # type: ignore[override]
        """True if codes have no zero points."""
        return self.kinds[0][1] == "Q4_0"

    def codes(self, parts: Mapping[str, Tensor]) -> Int4Codes:
        """[E, N, K]."""
        found = [GgufEncoding(kind).codes({"codes": parts[role]}) for role, kind in self.kinds]
        return found[0] if len(found) == 1 else joined_codes(found, lambda t: torch.stack(t, 2).flatten(1, 2))

    def mxfp4(self, parts: Mapping[str, Tensor]) -> Mxfp4Codes:
        found = [GgufEncoding(kind).mxfp4({"codes": parts[role]}) for role, kind in self.kinds]
        if len(found) == 1:
            return found[0]
        gate, up = found
        return Mxfp4Codes(
            torch.stack((gate.q, up.q), 2).flatten(1, 2), torch.stack((gate.scale, up.scale), 2).flatten(1, 2)
        )

    def dequantize(self, parts: Mapping[str, Tensor]) -> Tensor:
        """fp32 or the files' floats, [E, K, N], or [E, N] for biases."""
        found = [GgufEncoding(kind).dequantize({"codes": parts[role]}) for role, kind in self.kinds]
        rows = found[0] if len(found) == 1 else torch.stack(found, 2).flatten(1, 2)
        return rows.transpose(1, 2).contiguous() if rows.dim() == 3 else rows


@dataclass(frozen=True)
class LatentEncoding(Encoding):
    """DeepSeek's projection of the latents, [heads * (A + B), R], from "keys" [heads, R, A] and "values" [heads, B, R].

    Attributes:
        kinds: role -> name of ggml's type.
    """

    kinds: Kinds

    def dequantize(self, parts: Mapping[str, Tensor]) -> Tensor:
        """fp32, or the files' floats."""
        keys, values = (GgufEncoding(kind).dequantize({"codes": parts[role]}) for role, kind in self.kinds)
        return torch.cat((keys.transpose(1, 2), values), 1).flatten(0, 1)


@dataclass(frozen=True)
class RowsEncoding(Encoding):
    """A matrix whose rows are stored in several tensors.

    Attributes:
        kinds: role -> name of ggml's type, in order.
        change: order of the rows of all tensors together.
    """

    kinds: Kinds
    change: Change = SAME

    @property
    def group_size(self) -> int:  # type: ignore[override]
        """32 if all tensors have 4-bit codes of one type, else 0."""
        return group_of_kinds(self.kinds)

    @property
    def symmetric(self) -> bool:  # type: ignore[override]
        """True if codes have no zero points."""
        return self.kinds[0][1] == "Q4_0"

    def dequantize(self, parts: Mapping[str, Tensor]) -> Tensor:
        """fp32, or the files' floats."""
        found = [GgufEncoding(kind).dequantize({"codes": parts[role]}) for role, kind in self.kinds]
        return self.change.of(torch.cat(found))

    def codes(self, parts: Mapping[str, Tensor]) -> Int4Codes:
        found = [GgufEncoding(kind).codes({"codes": parts[role]}) for role, kind in self.kinds]
        return joined_codes(found, torch.cat).map(self.change.moved)


def group_of_kinds(kinds: Kinds) -> int:
    """32 if all types are one with 4-bit codes, else 0."""
    first = kinds[0][1]
    return GROUP if first in CODED and all(kind == first for _, kind in kinds) else 0


def joined_codes(found: list[Int4Codes], join: Callable[[list[Tensor]], Tensor]) -> Int4Codes:
    """Codes of one type as one; `join` joins their rows."""
    zeros = [codes.zero for codes in found if codes.zero is not None]
    return Int4Codes(
        join([codes.q for codes in found]), join([codes.scale for codes in found]), join(zeros) if zeros else None
    )


def _halves(byte: Tensor) -> Tensor:
    """uint8 [..., R, L] -> uint8 [..., R, 2L]: the low nibbles of a run, then its high nibbles."""
    return torch.cat((byte & 0xF, byte >> 4), -1)


def _fp16(byte: Tensor) -> Tensor:
    """uint8 [..., 2 * count] -> fp32 [..., count]."""
    return byte.contiguous().view(torch.float16).float()


def _q4_0(stored: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    blocks = stored.unflatten(-1, (-1, 18))
    return _halves(blocks[..., 2:]).flatten(-2), _fp16(blocks[..., :2])[..., 0], None


def _q4_1(stored: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    blocks = stored.unflatten(-1, (-1, 20))
    scale, minimum = _fp16(blocks[..., :4]).unbind(-1)
    return _halves(blocks[..., 4:]).flatten(-2), scale, minimum + 8 * scale


def _q4_k(stored: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    blocks = stored.unflatten(-1, (-1, 144))
    d, dmin = _fp16(blocks[..., :4]).split(1, -1)
    # Groups 0 to 3 have 6 bits in one byte. Groups 4 to 7 have four bits in the last bytes and two in the first ones.
    low, minimum, both = blocks[..., 4:16].unflatten(-1, (3, 4)).unbind(-2)
    scales = torch.cat((low & 0x3F, (both & 0xF) | ((low >> 2) & 0x30)), -1)
    minima = torch.cat((minimum & 0x3F, (both >> 4) | ((minimum >> 2) & 0x30)), -1)
    scale = (d * scales.float()).flatten(-2)
    zero = 8 * scale - (dmin * minima.float()).flatten(-2)
    return _halves(blocks[..., 16:].unflatten(-1, (4, 32))).flatten(-3), scale, zero


_UNPACK = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q4_K": _q4_k}
