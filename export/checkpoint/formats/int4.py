"""4-bit integers packed in 32-bit words, which GPTQ, AWQ and compressed-tensors store in different orders.

value = (code - zero_point) * scale, with one scale and zero point per group of consecutive weights along K. Codes and
zero points are 0 to 15 in files. Here 8 is subtracted from both, so that a symmetric weight has zero points of 0.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from executorch_moe.kernels import Int4Codes

from .base import Encoding, StoredTensor, WeightFormat

FLOATS = ("F16", "BF16", "F32")
PER_WORD = 8


@dataclass(frozen=True)
class Unpacked:
    """A weight whose codes are in the order of K.

    Attributes:
        q: int8 [N, K] in [-8, 7].
        scale: float [N, K/group_size].
        zero_point: int8 [N, K/group_size] in [-8, 7]; None if all are 0.
        group_of: int64 [K], the group of each k; None if groups are in order.
    """

    q: Tensor
    scale: Tensor
    zero_point: Tensor | None
    group_of: Tensor | None = None


@dataclass(frozen=True)
class Int4Encoding(Encoding):
    """A weight [N, K] of 4-bit integers.

    Attributes:
        name: of the codes in the file, for messages.
        group_size: weights along K that share a scale.
        symmetric: True if zero points are absent, or all are 8 in the file.
    """

    name: str
    group_size: int
    symmetric: bool

    @abstractmethod
    def unpack(self, parts: Mapping[str, Tensor]) -> Unpacked:
        """The weight with codes in the order of K."""

    def _unpacked(self, parts: Mapping[str, Tensor]) -> Unpacked:
        unpacked = self.unpack(parts)
        if self.symmetric and unpacked.zero_point is not None:
            if unpacked.zero_point.any():
                raise ValueError(
                    f"{self.name} is declared as symmetric, but has zero points other than 8: correct the declaration "
                    "(sym or symmetric = false), or download the model again"
                )
            unpacked = Unpacked(unpacked.q, unpacked.scale, None, unpacked.group_of)
        return unpacked

    def dequantize(self, parts: Mapping[str, Tensor]) -> Tensor:
        """fp32 [N, K], exact."""
        unpacked = self._unpacked(parts)
        q, scale, zero = unpacked.q.float(), unpacked.scale.float(), unpacked.zero_point
        if unpacked.group_of is not None:
            scale = scale[:, unpacked.group_of]
            return (q if zero is None else q - zero.float()[:, unpacked.group_of]) * scale
        grouped = q.unflatten(-1, (-1, self.group_size))
        if zero is not None:
            grouped = grouped - zero.float()[..., None]
        return (grouped * scale[..., None]).flatten(-2)

    def codes(self, parts: Mapping[str, Tensor]) -> Int4Codes:
        unpacked = self._unpacked(parts)
        scale, zero = unpacked.scale.float(), unpacked.zero_point
        if unpacked.group_of is not None:
            order = self.order_of_groups(unpacked.group_of)
            scale = scale[:, order]
            zero = None if zero is None else zero[:, order]
        return Int4Codes(unpacked.q, scale, None if zero is None else -zero.float() * scale)

    def order(self, group_of: Tensor | None, k: int) -> Tensor | None:
        """The stored groups of each k as int64 [K]; None if groups are in order.

        Raises:
            ValueError: groups that do not exist.
        """
        if group_of is None or bool((group_of == -1).all()):
            return None
        group_of, last = group_of.long(), k // self.group_size - 1
        if int(group_of.min()) < 0 or int(group_of.max()) > last:
            raise ValueError(
                f"g_idx of {self.name} names groups {int(group_of.min())} to {int(group_of.max())}, but the weight has "
                f"groups 0 to {last}: download the model again"
            )
        return None if torch.equal(group_of, torch.arange(k) // self.group_size) else group_of

    def order_of_groups(self, group_of: Tensor) -> Tensor:
        """The group of each run of `group_size` consecutive weights. Whole groups may be in any order.

        Args:
            group_of: integers [K], the group of each k.

        Raises:
            ValueError: a group whose weights are not consecutive.
        """
        runs = group_of.long().unflatten(0, (-1, self.group_size))
        if not torch.equal(runs, runs[:, :1].expand_as(runs)):
            raise ValueError(
                f"{self.name} has groups of weights that are not consecutive (g_idx, from desc_act=true), so its "
                "codes cannot be kept: use a checkpoint that was quantized with desc_act=false, or the model in bf16"
            )
        return runs[:, 0]


def nibbles(words: Tensor) -> Tensor:
    """int32 [..., R, C] -> uint8 [..., R, C, 8]; nibble i of a word is its bits 4i to 4i + 3."""
    four = words.contiguous().view(torch.uint8).unflatten(-1, (-1, 4))
    return torch.stack((four & 0xF, four >> 4), -1).flatten(-2)


def centered(codes: Tensor) -> Tensor:
    """uint8 0 to 15 -> int8 -8 to 7."""
    return (codes.to(torch.int8) - 8).contiguous()


def check_groups(codes: StoredTensor, k: int, group_size: int, declared: WeightFormat) -> int:
    """Number of groups along K.

    Raises:
        ValueError: groups that do not divide K.
    """
    if k % group_size:
        raise ValueError(
            f"{codes.name} {list(codes.shape)} has K={k}, which group_size={group_size} of {declared.file} does not "
            "divide: use a checkpoint with smaller groups, or the model in bf16"
        )
    return k // group_size
