"""Weights in fp4 (e2m1) with one scale per group of consecutive weights along K: NVFP4, MXFP4. Two codes share a byte.

e2m1 has the values 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives. The low nibble of a byte has the even k.

NVFP4 has groups of 16, a scale in fp8 (e4m3) per group, and one in fp32 for the tensor.
    modelopt            PREFIX.weight uint8 [N, K/2], weight_scale fp8 [N, K/16], weight_scale_2 fp32:
                        value = e2m1 * weight_scale * weight_scale_2
    compressed-tensors  PREFIX.weight_packed, weight_scale, weight_global_scale fp32:
                        value = e2m1 * weight_scale / weight_global_scale
MXFP4 has groups of 32, and a power of two (e8m0: the exponent plus 127) per group. All values are exact in bf16.
    GPT-OSS             X_blocks uint8 [E, N, K/32, 16], X_scales uint8 [E, N, K/32]. The model's X is [E, K, N].
    compressed-tensors  PREFIX.weight_packed uint8 [N, K/2], weight_scale uint8 [N, K/32]

Source: `NVFP4PackedCompressor` and `MXFP4PackedCompressor` of compressed-tensors 0.20; vLLM's modelopt quantization;
transformers' `convert_moe_packed_tensors` (GPT-OSS); OCP Microscaling Formats 1.0 (e2m1, e8m0).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from executorch_moe.kernels.packing.mxfp4 import Mxfp4Codes

from .base import Encoding, StoredTensor, WeightFormat, check_part, take, weights_of, without_activations
from .int4 import check_groups
from .parameters import Declared

NV_GROUP, MX_GROUP = 16, 32
E8M0_BIAS = 127
E8M0_NAN = 255
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_VALUES = torch.cat((_E2M1, -_E2M1))


def e2m1(packed: Tensor) -> Tensor:
    """uint8 [..., K/2] -> fp32 [..., K]."""
    both = torch.stack((packed & 0xF, packed >> 4), -1).flatten(-2)
    return _VALUES[both.int()]


@dataclass(frozen=True)
class Nvfp4Encoding(Encoding):
    """One weight in NVFP4. `divides`: True if the tensor's scale is a divisor, as in compressed-tensors."""

    divides: bool

    def dequantize(self, parts: Mapping[str, Tensor]) -> Tensor:
        """fp32 [N, K]."""
        scale, whole = parts["scale"].float(), parts["tensor_scale"].float().reshape(())
        scale = scale / whole if self.divides else scale * whole
        return (e2m1(parts["codes"]).unflatten(-1, (-1, NV_GROUP)) * scale[..., None]).flatten(-2)


@dataclass(frozen=True)
class Mxfp4Encoding(Encoding):
    """One weight in MXFP4.

    Attributes:
        name: of the codes in the file, for messages.
        transposed: True if the model has it as [E, K, N], as GPT-OSS does.
    """

    name: str
    transposed: bool
    microscaled = True

    def mxfp4(self, parts: Mapping[str, Tensor]) -> Mxfp4Codes:
        scale = parts["scale"]
        packed = parts["codes"].flatten(scale.dim() - 1)
        return Mxfp4Codes(torch.stack((packed & 0xF, packed >> 4), -1).flatten(-2), scale)

    def dequantize(self, parts: Mapping[str, Tensor]) -> Tensor:
        """bf16 [N, K] or [E, K, N], exact."""
        scale = parts["scale"]
        if bool((scale == E8M0_NAN).any()):
            raise ValueError(
                f"the scales of {self.name} hold NaN ({E8M0_NAN}): compare the file's checksum with the publisher's; "
                "if they are equal, use another checkpoint"
            )
        grouped = e2m1(parts["codes"].flatten(scale.dim() - 1)).unflatten(-1, (-1, MX_GROUP))
        values = torch.ldexp(grouped, (scale.int() - E8M0_BIAS)[..., None]).flatten(-2).to(torch.bfloat16)
        return values.transpose(-1, -2).contiguous() if self.transposed else values


class Fp4(WeightFormat):
    """Two-dimensional weights in NVFP4 or MXFP4; see the module.

    Args:
        declared: the declaration.
        name: of the format, for messages.
        roles: role -> end of the tensor's name, for codes, scales and, in NVFP4, the scale of the tensor.
        divides: True if the tensor's scale is a divisor.
    """

    def __init__(self, declared: Declared, name: str, roles: Mapping[str, str], *, divides: bool = False) -> None:
        self.roles, self.divides = roles, divides
        self.group_size = NV_GROUP if "tensor_scale" in roles else MX_GROUP
        self.file = declared.file
        self.title = f"{name}, groups of {self.group_size}"

    def join(self, tensors: Mapping[str, StoredTensor], folder: Path) -> dict[str, StoredTensor]:
        joined = without_activations(tensors)
        where = f"{folder}, {self},"
        for prefix, codes in list(weights_of(joined, self.roles["codes"])):
            if codes.dtype == "U8":
                parts = take(joined, prefix, self.roles, {}, where)
                joined[f"{prefix}weight"] = self._weight(codes, parts, where)
        return joined

    def _weight(self, codes: StoredTensor, parts: dict[str, StoredTensor], where: str) -> StoredTensor:
        if len(codes.shape) != 2:
            check_part(codes, (0, 0), ("U8",), where, self.title)
        n, k = codes.shape[0], codes.shape[1] * 2
        groups = check_groups(codes, k, self.group_size, self)
        nv = "tensor_scale" in parts
        check_part(parts["scale"], (n, groups), ("F8_E4M3",) if nv else ("U8",), where, self.title)
        if nv:
            whole = parts["tensor_scale"]
            check_part(whole, whole.shape if whole.shape in ((), (1,)) else (1,), ("F32",), where, self.title)
        encoding: Encoding = Nvfp4Encoding(self.divides) if nv else Mxfp4Encoding(codes.name, False)
        return StoredTensor(codes.file, (n, k), "NVFP4" if nv else "MXFP4", codes.name, encoding, parts)


class GptOssMxfp4(WeightFormat):
    """Stacked experts in MXFP4, as in the published GPT-OSS; see the module."""

    title = f"MXFP4, groups of {MX_GROUP}"

    def __init__(self, declared: Declared) -> None:
        self.file = declared.file

    def join(self, tensors: Mapping[str, StoredTensor], folder: Path) -> dict[str, StoredTensor]:
        joined = without_activations(tensors)
        where = f"{folder}, {self},"
        for name in [name for name in tensors if name.endswith("_blocks")]:
            prefix = name.removesuffix("_blocks")
            parts = take(joined, prefix, {"codes": "_blocks", "scale": "_scales"}, {}, where)
            codes = parts["codes"]
            if len(codes.shape) != 4:
                check_part(codes, (0, 0, 0, MX_GROUP // 2), ("U8",), where, self.title)
            e, n, groups, _ = codes.shape
            check_part(codes, (e, n, groups, MX_GROUP // 2), ("U8",), where, self.title)
            check_part(parts["scale"], (e, n, groups), ("U8",), where, self.title)
            shape = (e, groups * MX_GROUP, n)
            encoding = Mxfp4Encoding(name, transposed=True)
            joined[prefix] = StoredTensor(codes.file, shape, "MXFP4", name, encoding, parts)
        return joined


NVFP4_COMPRESSED = {"codes": "weight_packed", "scale": "weight_scale", "tensor_scale": "weight_global_scale"}
NVFP4_MODELOPT = {"codes": "weight", "scale": "weight_scale", "tensor_scale": "weight_scale_2"}
MXFP4_COMPRESSED = {"codes": "weight_packed", "scale": "weight_scale"}
