"""Arguments of the operators for rows of several texts, and their checks.

The operators, their fakes and their CPU kernels share the checks, which depend only on shapes, dtypes and devices.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from executorch_moe.kernels.checks import check_dtype, check_eps, check_layout, check_matrix, check_shape

HEAD_DIMS = (32, 64, 128, 256)
"""Supported sizes of a head. Tensor cores take powers of two of at least 16, and half a head is rotated at a time."""
MAX_ROWS = 64
"""A program holds all rows of its part of a product in registers."""
MAX_EXPERTS = 1024
"""A program of the router holds the logits of several rows in registers."""
FLOATS = (torch.bfloat16, torch.float32, torch.float16)


class RowsAttentionArguments(NamedTuple):
    """Arguments of `op.rows_attention`, in its order; its docstring gives shapes and dtypes."""

    x: Tensor
    weight: Tensor
    scale: Tensor | None
    q_norm: Tensor
    k_norm: Tensor
    cos: Tensor
    sin: Tensor
    positions: Tensor
    slots: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    eps: float


def fits_rows_linear(x: Tensor) -> bool:
    """True if `rows_linear` supports x [..., K] and it pays off: bf16, and a fixed number of rows, 2 to `MAX_ROWS`."""
    sizes = x.shape[:-1]
    return x.dtype == torch.bfloat16 and all(isinstance(size, int) for size in sizes) and fits_rows(math.prod(sizes))


def fits_rows(rows: int) -> bool:
    """True for a number of rows that the operators support."""
    return 2 <= rows <= MAX_ROWS


def check_rows_linear(x: Tensor, weight: Tensor, scale: Tensor | None) -> None:
    """Check every argument of `rows_linear` against its docstring.

    Raises:
        ValueError: a dtype, shape, device or layout that the operator does not accept.
    """
    check_dtype("x", x, (torch.bfloat16,))
    if x.dim() < 2 or x.shape[-1] < 1 or not 1 <= math.prod(x.shape[:-1]) <= MAX_ROWS:
        raise ValueError(
            f"x has shape {list(x.shape)}, expected [..., K] with 1 to {MAX_ROWS} rows: use a linear layer for more"
        )
    check_matrix("weight", weight, scale, x.shape[-1])
    check_layout("x", x, {"x": x, "weight": weight, "scale": scale}, ("weight", "scale"))


def check_rows_attention(arguments: RowsAttentionArguments) -> None:
    """Check every argument of `rows_attention` against its docstring.

    Raises:
        ValueError: a dtype, shape, device, layout or value that the operator does not accept.
    """
    x, weight, scale, q_norm, k_norm, cos, sin, positions, slots, key, value, scaling, eps = arguments
    rows = _check_rows("x", x)
    for name, cache in (("key", key), ("value", value)):
        check_dtype(name, cache, (torch.bfloat16,))
        if cache.dim() != 4 or min(cache.shape) < 1:
            raise ValueError(
                f"{name} has shape {list(cache.shape)}, expected [S, kv_heads, C, D]: pass one layer's cache"
            )
    check_shape("value", value, tuple(key.shape), "keys and values of a layer have one shape")
    _, kv_heads, context, head_dim = key.shape
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"key has heads of D={head_dim}, expected one of {HEAD_DIMS}: use such a model")
    if context * head_dim >= 2**31:
        raise ValueError(
            f"key has C={context} positions of D={head_dim}, expected fewer than 2^31 numbers a head: shorten the cache"
        )
    check_matrix("weight", weight, scale, x.shape[2])
    columns = weight.shape[0]
    heads = columns // head_dim - 2 * kv_heads
    if columns % head_dim or heads < 1 or heads % kv_heads:
        raise ValueError(
            f"weight has {columns} rows, expected (heads + 2 * kv_heads) * D with kv_heads={kv_heads}, D={head_dim} "
            "and heads a multiple of kv_heads: concatenate the projections of query, key and value in this order"
        )
    for name, t in (("q_norm", q_norm), ("k_norm", k_norm)):
        check_dtype(name, t, FLOATS)
        if t.numel() != head_dim:
            raise ValueError(f"{name} has shape {list(t.shape)}, expected {head_dim} elements: pass one for each of D")
    for name, t in (("cos", cos), ("sin", sin)):
        check_dtype(name, t, FLOATS)
        check_shape(name, t, (1, rows, head_dim // 2), "pass the angles of the first half of a head, for each row")
    for name, t in (("positions", positions), ("slots", slots)):
        check_dtype(name, t, (torch.int64,))
        check_shape(name, t, (rows,), "pass one number for each row")
    if not (math.isfinite(scaling) and scaling > 0):
        raise ValueError(f"scaling={scaling} must be a positive number: try D**-0.5 = {head_dim**-0.5}")
    check_eps(eps)
    check_layout("x", x, arguments._asdict(), ("weight", "scale", "key", "value"))


def check_places(positions: Tensor, slots: Tensor, num_slots: int, context: int) -> None:
    """Check the values of positions and slots, which is possible on the CPU only.

    Raises:
        ValueError: a position beyond the cache, or a slot that there is not.
    """
    if int(positions.max()) > context:
        raise ValueError(
            f"positions has {int(positions.max())}, expected at most the C={context} positions of a slot: pass the "
            "number of tokens before each row's, or use a larger cache"
        )
    if not 0 <= int(slots.min()) <= int(slots.max()) < num_slots:
        raise ValueError(
            f"slots has numbers from {int(slots.min())} to {int(slots.max())}, expected 0 to {num_slots - 1}: pass the "
            "slot of each row, and any for empty rows"
        )


def check_rows_router(x: Tensor, router: Tensor, positions: Tensor, top_k: int) -> None:
    """Check every argument of `rows_router` against its docstring.

    Raises:
        ValueError: a dtype, shape, device, layout or value that the operator does not accept.
    """
    rows = _check_rows("x", x)
    check_dtype("router", router, (torch.bfloat16,))
    if router.dim() != 2 or router.shape[1] != x.shape[2] or not 1 <= router.shape[0] <= MAX_EXPERTS:
        raise ValueError(
            f"router has shape {list(router.shape)}, expected [E, H={x.shape[2]}] with E from 1 to {MAX_EXPERTS}: pass "
            "the router's weight"
        )
    check_dtype("positions", positions, (torch.int64,))
    check_shape("positions", positions, (rows,), "pass one number for each row")
    if not 1 <= top_k <= router.shape[0]:
        raise ValueError(
            f"top_k={top_k} must be from 1 to the E={router.shape[0]} experts of router: pass the model's own top_k"
        )
    check_layout("x", x, {"router": router, "positions": positions}, ("router",))


def _check_rows(name: str, t: Tensor) -> int:
    """Checks a bf16 tensor [1, T, columns] and returns T."""
    check_dtype(name, t, (torch.bfloat16,))
    if t.dim() != 3 or t.shape[0] != 1 or not 1 <= t.shape[1] <= MAX_ROWS or t.shape[2] < 1:
        raise ValueError(
            f"{name} has shape {list(t.shape)}, expected [1, T, columns] with T from 1 to {MAX_ROWS}: pass one token "
            "of each text"
        )
    return t.shape[1]
