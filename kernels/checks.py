"""Checks of single arguments that several operators share.

Each raises ValueError with what was given, what is expected, and what to do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def check_dtype(name: str, t: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """Check that a tensor has one of the dtypes."""
    if t.dtype not in allowed:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise ValueError(
            f"{name} has dtype {str(t.dtype).removeprefix('torch.')}, expected {names}: convert it with .to(...)"
        )


def check_shape(name: str, t: Tensor, expected: tuple[int, ...], remedy: str) -> None:
    """Check that a tensor has this shape."""
    if tuple(t.shape) != tuple(expected):
        raise ValueError(f"{name} has shape {list(t.shape)}, expected {list(expected)}: {remedy}")


def check_eps(eps: float) -> None:
    """Check the constant that a norm adds to the mean square."""
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps={eps} must be a finite number, 0 or more: pass that of the norm, as 1e-6")


def check_layout(first: str, where: Tensor, arguments: Mapping[str, object], stored: tuple[str, ...] = ()) -> None:
    """Check that all tensors are on the device of `where`, and that weights and caches (`stored`) are contiguous.

    Args:
        first: name of `where`.
    """
    for name, t in arguments.items():
        if not isinstance(t, Tensor):
            continue
        if t.device != where.device:
            raise ValueError(f"{name} is on {t.device} but {first} is on {where.device}: move both to one device")
        if name in stored and not t.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous, strides are {list(t.stride())}: call .contiguous() once after loading"
            )


def check_matrix(name: str, weight: Tensor, scale: Tensor | None, columns: int) -> None:
    """Check a weight, int8 or bf16 [N, columns], and its scales, fp32 [N] or None."""
    check_dtype(name, weight, (torch.int8, torch.bfloat16))
    if weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[1] != columns:
        raise ValueError(
            f"{name} has shape {list(weight.shape)}, expected [N, {columns}]: its columns are the input's elements"
        )
    if scale is not None:
        check_dtype("scale", scale, (torch.float32,))
        check_shape("scale", scale, (weight.shape[0],), f"pass one scale for each row of {name}")
