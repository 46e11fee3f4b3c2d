"""Converts 4-bit weights of torchao and ExecuTorch to codes of this package, without rounding them again.

| source | codes | value |
|---|---|---|
| torchao `Int4Tensor` with int8 data | signed nibbles | q * scale + zero_point |
| `Int4Tensor` with uint8 data, as ExecuTorch makes it; `ExportableInt4Tensor` | unsigned | (q - zero_point) * scale |
| torchao `IntxUnpackedToInt8Tensor` of int4 | one int8 a code | (q - zero_point) * scale |
| ExecuTorch's packed experts | unsigned nibbles | (q - 8) * scale |

The low nibble of a byte has the even k. Codes keep their values. Scales and zero points are rounded to bf16 if they are
wider.

Source: torchao/quantization/quantize_/workflows (int4, intx), executorch/extension/llm/export (int4.py,
quant/quantize.py) and executorch/backends/cuda/triton/kernels/fused_moe.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from executorch_moe.backends.fusion.modules import pack_layer_codes
from executorch_moe.backends.fusion.recognize import ExpertLayout
from executorch_moe.kernels import Int4Codes, PackedExperts, pack_codes

ACCEPTED = ("Int4Tensor", "ExportableInt4Tensor", "IntxUnpackedToInt8Tensor")


def is_quantized(weight: Tensor) -> bool:
    """True for a tensor subclass of torchao or ExecuTorch that holds quantized data."""
    return hasattr(weight, "tensor_data_names") and hasattr(weight, "qdata")


def int4_codes(weight: Tensor | Sequence[Tensor]) -> Int4Codes:
    """Codes of a quantized weight.

    Args:
        weight: a tensor of the module's table, [N, K] or [E, N, K], or a sequence of E tensors [N, K], which are
            stacked. Activation quantization that a tensor requests is ignored.

    Returns:
        Int4Codes with q int8 [N, K] or [E, N, K].

    Raises:
        ValueError: groups along a dimension other than K, or tensors of different shapes.
        NotImplementedError: another class of tensor, another number of bits, or scales for each input channel.
    """
    if not isinstance(weight, Tensor):
        return _stack([int4_codes(one) for one in weight])
    tensor: Any = weight
    kind = type(weight).__name__
    if kind not in ACCEPTED:
        raise NotImplementedError(
            f"{kind} cannot be packed as a 4-bit tensor: use {', '.join(ACCEPTED)}, or pass the float weights"
        )
    if getattr(tensor, "act_pre_scale", None) is not None:
        raise NotImplementedError(
            f"{kind} has act_pre_scale, a scale of its input: fold it into the layer before, or pass the float weights"
        )
    if kind == "IntxUnpackedToInt8Tensor":
        if tensor.target_dtype != torch.int4:
            raise NotImplementedError(f"{kind} has target_dtype={tensor.target_dtype}: use torch.int4")
        _check_groups(kind, weight, tensor.block_size, tensor.qdata)
        return _affine(tensor.qdata, tensor.scale, tensor.zero_point.float())
    _check_groups(kind, weight, getattr(tensor, "block_size", [1] * (weight.dim() - 1) + [0]), tensor.qdata, 2)
    scale, zero = tensor.scale.transpose(-1, -2), tensor.zero_point.transpose(-1, -2)
    if kind == "Int4Tensor" and tensor.qdata.dtype == torch.int8:
        return _with_zero(_nibbles(tensor.qdata, signed=True), scale, zero)
    return _affine(_nibbles(tensor.qdata, signed=False), scale, zero.float() - 8)


def executorch_codes(packed: Tensor, scale: Tensor) -> Int4Codes:
    """Codes of one matrix in the layout of ExecuTorch's fused MoE kernels.

    Args:
        packed: int8 or uint8 [E, N, K/2].
        scale: float [E, N, K/group_size].

    Raises:
        ValueError: shapes or a dtype that do not fit this layout.
    """
    fits = packed.dim() == 3 and scale.dim() == 3 and packed.shape[:2] == scale.shape[:2] and scale.shape[2] > 0
    if packed.dtype not in (torch.int8, torch.uint8) or not fits or 2 * packed.shape[2] % scale.shape[2]:
        raise ValueError(
            f"packed {packed.dtype} {list(packed.shape)} and scale {list(scale.shape)} are not ExecuTorch's packed "
            "experts: pass int8 [E, N, K/2] and [E, N, K/group_size]"
        )
    return Int4Codes(_nibbles(packed, signed=False), scale.bfloat16().contiguous())


def pack_executorch_experts(
    w1: Tensor, w1_scale: Tensor, w2: Tensor, w2_scale: Tensor, *, scheme: str = "w4a16"
) -> PackedExperts:
    """Packs experts in the layout of ExecuTorch's fused MoE kernels for ours.

    Args:
        w1: int8 [E, 2I, H/2], gate rows first. w1_scale: float [E, 2I, H/group_size].
        w2: int8 [E, H, I/2]. w2_scale: float [E, H, I/group_size].
        scheme: "w4a16", or "w4a8" if the scales meet the requirements of `pack_codes`.

    Raises:
        ValueError: see `executorch_codes` and `pack_codes`.
    """
    return pack_codes(executorch_codes(w1, w1_scale), executorch_codes(w2, w2_scale), scheme=scheme)


def pack_quantized(layout: ExpertLayout, parameters: Mapping[str, Tensor], scheme: str) -> PackedExperts:
    """Packs a module's quantized experts with their own codes.

    Args:
        layout: how the module stores its experts.
        parameters: name in `layout` -> weight that `int4_codes` accepts, or float bias.
        scheme: "w4a16" or "w4a8".

    Raises:
        ValueError: weights stored [E, in, out], weights that are only partly quantized, or see `pack_codes`.
        NotImplementedError: see `int4_codes`.
    """
    names = (*layout.gate_up, layout.down)
    if plain := [name for name in names if not is_quantized(parameters[name])]:
        raise ValueError(f"{plain[0]} is not quantized but other weights are: quantize all of them, or none")
    if layout.transposed:
        raise ValueError(
            f"{layout.down} is stored [E, in, out], so its groups do not run along K: pass the float weights"
        )
    codes = dict(zip(names, _alike([int4_codes(parameters[name]) for name in names]), strict=True))
    biases = {name: parameters[name] for name in (layout.gate_up_bias, layout.down_bias) if name is not None}
    return pack_layer_codes(layout, codes, biases, scheme)


def _check_groups(kind: str, weight: Tensor, block_size: Sequence[int], qdata: Tensor, codes_a_byte: int = 1) -> None:
    """Checks that groups, and the codes of a byte, run along the last dimension."""
    wide = (*qdata.shape[:-1], qdata.shape[-1] * codes_a_byte)
    if any(size != 1 for size in block_size[:-1]) or wide != tuple(weight.shape) or weight.dim() not in (2, 3):
        raise ValueError(
            f"{kind} {list(weight.shape)} has block_size={list(block_size)} and data {list(qdata.shape)}: only groups "
            "along the last dimension of [N, K] or [E, N, K] can be packed; quantize before transposing"
        )


def _nibbles(packed: Tensor, signed: bool) -> Tensor:
    """[..., K/2] bytes, even k in the low nibble -> int8 [..., K] in [-8, 7]; subtracts 8 from unsigned codes."""
    byte = packed.view(torch.uint8)
    both = torch.stack((byte & 0xF, byte >> 4), -1).flatten(-2)
    return ((both ^ 8 if signed else both).to(torch.int8) - 8).contiguous()


def _affine(q: Tensor, scale: Tensor, zero_point: Tensor) -> Int4Codes:
    """Codes of value = (q - zero_point) * scale."""
    return _with_zero(q, scale, -zero_point * scale.float())


def _with_zero(q: Tensor, scale: Tensor, zero: Tensor) -> Int4Codes:
    """Drops zero points if all are zero."""
    return Int4Codes(q, scale.bfloat16().contiguous(), zero.bfloat16().contiguous() if zero.any() else None)


def _alike(codes: Sequence[Int4Codes]) -> list[Int4Codes]:
    """Gives all codes the same group size, and zero points to all or none; keeps the values."""
    group_size = math.gcd(*(code.group_size for code in codes))
    same = [code.regrouped(group_size) for code in codes]
    if all(code.zero is None for code in same):
        return same
    return [Int4Codes(c.q, c.scale, torch.zeros_like(c.scale) if c.zero is None else c.zero) for c in same]


def _stack(codes: Sequence[Int4Codes]) -> Int4Codes:
    shapes = {tuple(code.q.shape) for code in codes}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        found = ", ".join(str(list(shape)) for shape in sorted(shapes)) or "none"
        raise ValueError(
            f"the experts' weights have shapes {found}: pass one 2-D tensor for each expert, all of the same shape"
        )
    same = _alike(codes)
    zeros = [code.zero for code in same if code.zero is not None]
    return Int4Codes(
        torch.stack([code.q for code in same]),
        torch.stack([code.scale for code in same]),
        torch.stack(zeros) if zeros else None,
    )
