"""GPTQ checkpoints with 4 bits, as AutoGPTQ and GPTQModel write them.

PREFIX.qweight int32 [K/8, N]: nibble i of word [r, n] is the code of k = 8r + i.
PREFIX.scales fp16 [K/group_size, N].
PREFIX.qzeros int32 [K/group_size, N/8]: nibble i of word [g, c] is the zero point of n = 8c + i. Version 1, the usual
one, stores it minus 1, modulo 16. No tool chooses a zero point of 16, so a stored 15 means 0. Version 2
(`checkpoint_format: gptq_v2`) stores it unchanged.
PREFIX.g_idx int32 [K], optional: the group of each k, which is k // group_size unless `desc_act` is true.

Source: the packing of `QuantLinear` in AutoGPTQ 0.7 and GPTQModel; `convert_gptq_v1_to_v2_format` of GPTQModel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .base import StoredTensor, WeightFormat, check_part, take, weights_of, without_activations
from .int4 import FLOATS, PER_WORD, Int4Encoding, Unpacked, centered, check_groups, nibbles
from .parameters import BITS, Declared, choice, flag, group_size_of

_VERSIONS = ("gptq", "gptq_v2")


@dataclass(frozen=True)
class GptqEncoding(Int4Encoding):
    """One weight; see the module. `minus` is what the file subtracts from zero points, 1 or 0."""

    minus: int = 0

    def unpack(self, parts: Mapping[str, Tensor]) -> Unpacked:
        codes = nibbles(parts["codes"]).permute(1, 0, 2).flatten(1)
        zero = nibbles(parts["zero_point"]).flatten(1).t()[: len(codes)]
        scale, zero = parts["scale"].t().contiguous(), centered((zero + self.minus) & 0xF)
        return Unpacked(centered(codes), scale, zero, self.order(parts.get("group_of"), codes.shape[1]))


class Gptq(WeightFormat):
    """The format of a checkpoint; see the module.

    Raises:
        NotImplementedError: another number of bits, or another layout.
        ValueError: invalid parameters.
    """

    def __init__(self, declared: Declared) -> None:
        choice(declared, "bits", (BITS,))
        # GPTQModel calls it `format` since version 2, and transformers' configuration has both names.
        versions = {choice(declared, key, _VERSIONS, "gptq") for key in ("checkpoint_format", "format")}
        self.group_size = group_size_of(declared)
        self.symmetric = flag(declared, "sym", default=False)
        self.minus = 0 if "gptq_v2" in versions else 1
        version = ", version 2" if self.minus == 0 else ""
        self.file = declared.file
        group = f"groups of {self.group_size}" if self.group_size else "one group per row"
        self.title = f"GPTQ{version}, 4 bits, {group}, {'symmetric' if self.symmetric else 'with zero points'}"

    def join(self, tensors: Mapping[str, StoredTensor], folder: Path) -> dict[str, StoredTensor]:
        joined = without_activations(tensors)
        where = f"{folder}, {self},"
        for prefix, codes in list(weights_of(joined, "qweight")):
            parts = take(
                joined,
                prefix,
                {"codes": "qweight", "scale": "scales", "zero_point": "qzeros"},
                {"group_of": "g_idx"},
                where,
            )
            joined[f"{prefix}weight"] = self._weight(codes, parts, where)
        return joined

    def _weight(self, codes: StoredTensor, parts: dict[str, StoredTensor], where: str) -> StoredTensor:
        if len(codes.shape) != 2:
            check_part(codes, (0, 0), ("I32",), where, self.title)
        k, n = codes.shape[0] * PER_WORD, codes.shape[1]
        group_size = self.group_size or k
        groups = check_groups(codes, k, group_size, self)
        shapes: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
            "codes": (codes.shape, ("I32",)),
            "scale": ((groups, n), FLOATS),
            "zero_point": ((groups, -(-n // PER_WORD)), ("I32",)),
            "group_of": ((k,), ("I32", "I64")),
        }
        for role, part in parts.items():
            shape, dtypes = shapes[role]
            check_part(part, shape, dtypes, where, self.title)
        encoding = GptqEncoding(codes.name, group_size, self.symmetric, self.minus)
        return StoredTensor(codes.file, (n, k), "GPTQ", codes.name, encoding, parts)
