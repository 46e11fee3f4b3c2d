"""AWQ checkpoints with 4 bits in the layout "gemm", as AutoAWQ writes them.

PREFIX.qweight int32 [K, N/8]: nibble i of word [k, c] is the code of n = 8c + ORDER[i].
PREFIX.qzeros int32 [K/group_size, N/8]: zero points, in the same order.
PREFIX.scales fp16 [K/group_size, N].

Source: `WQLinear_GEMM` of AutoAWQ (`order_map`), and `awq_dequantize` of vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from .base import StoredTensor, WeightFormat, check_part, take, weights_of, without_activations
from .int4 import FLOATS, PER_WORD, Int4Encoding, Unpacked, centered, check_groups, nibbles
from .parameters import BITS, Declared, choice, flag, group_size_of

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_NIBBLE_OF = [ORDER.index(n) for n in range(PER_WORD)]


class AwqEncoding(Int4Encoding):
    """One weight; see the module."""

    def unpack(self, parts: Mapping[str, Tensor]) -> Unpacked:
        codes, zero = (nibbles(parts[role])[..., _NIBBLE_OF].flatten(1).t() for role in ("codes", "zero_point"))
        return Unpacked(centered(codes), parts["scale"].t().contiguous(), centered(zero))


class Awq(WeightFormat):
    """The format of a checkpoint; see the module.

    Raises:
        NotImplementedError: another number of bits, or another layout.
        ValueError: invalid parameters.
    """

    def __init__(self, declared: Declared) -> None:
        for key in ("bits", "w_bit"):
            choice(declared, key, (BITS,), default=BITS)
        for key in ("version", "format"):
            choice(declared, key, ("gemm",), default="gemm")
        self.group_size = group_size_of(declared.within({"group_size": declared.get("q_group_size"), **declared}))
        self.symmetric = not flag(declared, "zero_point", default=True)
        self.file = declared.file
        group = f"groups of {self.group_size}" if self.group_size else "one group per row"
        self.title = f"AWQ, 4 bits, {group}, {'symmetric' if self.symmetric else 'with zero points'}"

    def join(self, tensors: Mapping[str, StoredTensor], folder: Path) -> dict[str, StoredTensor]:
        joined = without_activations(tensors)
        where = f"{folder}, {self},"
        roles = {"codes": "qweight", "scale": "scales", "zero_point": "qzeros"}
        for prefix, codes in list(weights_of(joined, "qweight")):
            joined[f"{prefix}weight"] = self._weight(codes, take(joined, prefix, roles, {}, where), where)
        return joined

    def _weight(self, codes: StoredTensor, parts: dict[str, StoredTensor], where: str) -> StoredTensor:
        if len(codes.shape) != 2:
            check_part(codes, (0, 0), ("I32",), where, self.title)
        k, n = codes.shape[0], codes.shape[1] * PER_WORD
        group_size = self.group_size or k
        groups = check_groups(codes, k, group_size, self)
        check_part(codes, codes.shape, ("I32",), where, self.title)
        check_part(parts["scale"], (groups, n), FLOATS, where, self.title)
        check_part(parts["zero_point"], (groups, codes.shape[1]), ("I32",), where, self.title)
        encoding = AwqEncoding(codes.name, group_size, self.symmetric)
        return StoredTensor(codes.file, (n, k), "AWQ", codes.name, encoding, parts)
