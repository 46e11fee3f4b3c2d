"""Checkpoints of compressed-tensors (llm-compressor), which has several formats for weights.

pack-quantized, 4-bit integers:
PREFIX.weight_packed int32 [N, K/8]: nibble i of word [n, c] is the code of k = 8c + i.
PREFIX.weight_scale float [N, K/group_size].
PREFIX.weight_zero_point, if not symmetric: int32 [N/8, K/group_size]: nibble i of word [r, g] is the zero point of
n = 8r + i; or int8 [N, K/group_size] minus 8, as older versions wrote it.
PREFIX.weight_shape int64 [2]: N and K.
PREFIX.weight_g_idx int32 [K], optional: the group of each k; -1 means that groups are in order.

float-quantized: see `fp8`; nvfp4-pack-quantized and mxfp4-pack-quantized: see `fp4`.

Source: `PackedQuantizationCompressor` of the package compressed-tensors, 0.20.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from . import fp4
from .base import StoredTensor, WeightFormat, check_part, take, weights_of, without_activations
from .fp8 import Fp8, block_of
from .int4 import FLOATS, PER_WORD, Int4Encoding, Unpacked, centered, check_groups, nibbles
from .parameters import BITS, Declared, choice, flag, group_size_of

METHOD = "compressed-tensors"


class PackedEncoding(Int4Encoding):
    """One weight in pack-quantized; see the module."""

    def unpack(self, parts: Mapping[str, Tensor]) -> Unpacked:
        codes, zero = nibbles(parts["codes"]).flatten(1), parts.get("zero_point")
        if (shape := parts.get("shape")) is not None and shape.tolist() != list(codes.shape):
            raise ValueError(
                f"{self.name} has codes for {list(codes.shape)}, but its weight_shape says {shape.tolist()}: download "
                "the model again, or use it in bf16"
            )
        if zero is not None and zero.dtype != torch.int8:
            zero = centered(nibbles(zero.t()).flatten(1).t()[: len(codes)])
        return Unpacked(centered(codes), parts["scale"], zero, self.order(parts.get("group_of"), codes.shape[1]))


class PackQuantized(WeightFormat):
    """4-bit integers; see the module.

    Raises:
        NotImplementedError: another number of bits, or another kind of groups.
        ValueError: invalid parameters.
    """

    def __init__(self, weights: Declared) -> None:
        choice(weights, "num_bits", (BITS,))
        choice(weights, "type", ("int",), default="int")
        strategy = choice(weights, "strategy", ("group", "channel"), default="group")
        self.group_size = group_size_of(weights) if strategy == "group" else 0
        self.symmetric = flag(weights, "symmetric", default=True)
        self.file = weights.file
        group = f"groups of {self.group_size}" if self.group_size else "one group per row"
        zeros = "symmetric" if self.symmetric else "with zero points"
        self.title = f"{METHOD} pack-quantized, 4 bits, {group}, {zeros}"

    def join(self, tensors: Mapping[str, StoredTensor], folder: Path) -> dict[str, StoredTensor]:
        joined = without_activations(tensors)
        where = f"{folder}, {self},"
        roles = {"codes": "weight_packed", "scale": "weight_scale"}
        optional = {"shape": "weight_shape", "group_of": "weight_g_idx"}
        (optional if self.symmetric else roles)["zero_point"] = "weight_zero_point"
        for prefix, codes in list(weights_of(joined, "weight_packed")):
            joined[f"{prefix}weight"] = self._weight(codes, take(joined, prefix, roles, optional, where), where)
        return joined

    def _weight(self, codes: StoredTensor, parts: dict[str, StoredTensor], where: str) -> StoredTensor:
        if len(codes.shape) != 2:
            check_part(codes, (0, 0), ("I32",), where, self.title)
        n, k = codes.shape[0], codes.shape[1] * PER_WORD
        group_size = self.group_size or k
        groups = check_groups(codes, k, group_size, self)
        zero = parts.get("zero_point")
        packed_zero = zero is not None and zero.dtype != "I8"
        shapes: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
            "codes": (codes.shape, ("I32",)),
            "scale": ((n, groups), FLOATS),
            "zero_point": ((-(-n // PER_WORD) if packed_zero else n, groups), ("I32", "I8")),
            "shape": ((2,), ("I64", "I32")),
            "group_of": ((k,), ("I32", "I64")),
        }
        for role, part in parts.items():
            shape, dtypes = shapes[role]
            check_part(part, shape, dtypes, where, self.title)
        encoding = PackedEncoding(codes.name, group_size, self.symmetric)
        return StoredTensor(codes.file, (n, k), METHOD, codes.name, encoding, parts)


def _float_quantized(weights: Declared) -> WeightFormat:
    choice(weights, "num_bits", (8,))
    choice(weights, "type", ("float",))
    strategy = choice(weights, "strategy", ("tensor", "channel", "block"))
    block = block_of(weights, "block_structure")
    if (strategy == "block") != (block is not None):
        raise ValueError(
            f"strategy={strategy!r} and block_structure={weights.get('block_structure')!r} in {weights.path} do not "
            "belong together: use the published file"
        )
    return Fp8(weights, block, f"{METHOD} float-quantized")


def _nvfp4(weights: Declared) -> WeightFormat:
    choice(weights, "group_size", (fp4.NV_GROUP,))
    return fp4.Fp4(weights, f"{METHOD} nvfp4-pack-quantized", fp4.NVFP4_COMPRESSED, divides=True)


def _mxfp4(weights: Declared) -> WeightFormat:
    choice(weights, "group_size", (fp4.MX_GROUP,))
    return fp4.Fp4(weights, f"{METHOD} mxfp4-pack-quantized", fp4.MXFP4_COMPRESSED)


FORMATS: dict[str, Callable[[Declared], WeightFormat]] = {
    "pack-quantized": PackQuantized,
    "float-quantized": _float_quantized,
    "nvfp4-pack-quantized": _nvfp4,
    "mxfp4-pack-quantized": _mxfp4,
}
"""`format` -> function that makes the `WeightFormat` from the declaration of the weights."""


def compressed_tensors(declared: Declared) -> WeightFormat:
    """The format that a checkpoint of compressed-tensors declares.

    Raises:
        NotImplementedError: another format, weights of several formats, or transforms and sparsity.
        ValueError: a declaration without weights.
    """
    for key in ("transform_config", "sparsity_config"):
        inner = declared.within(declared.get(key))
        if inner.get("config_groups") or inner.get("format", "dense") != "dense":
            raise NotImplementedError(
                f"the weights in {declared.folder} have a {key} in {declared.file}, which is not supported yet: use "
                "another version of the model, or the model in bf16"
            )
    groups = [declared.within(group) for group in declared.within(declared.get("config_groups")).values()]
    weights = [declared.within(group.get("weights")) for group in groups]
    if not weights or not all(weights):
        raise ValueError(
            f"{declared.path} declares {METHOD} without config_groups that have weights: use the published file"
        )
    formats = [group.get("format") or declared.get("format") for group in groups]
    kinds = {(str(name), *(str(one.get(key)) for key in _KIND)) for name, one in zip(formats, weights, strict=True)}
    if len(kinds) > 1:
        raise NotImplementedError(
            f"the weights in {declared.folder} have {len(kinds)} formats (config_groups of {declared.file}): a mix of "
            "formats between layers is not supported; use another version of the model, or the model in bf16"
        )
    name = choice(declared.within({"format": formats[0]}), "format", tuple(FORMATS))
    return FORMATS[name](weights[0])


_KIND = ("num_bits", "type", "strategy", "group_size", "block_structure", "symmetric")
