"""The operators `rows_linear`, `rows_attention` and `rows_router`, their fakes and their CPU kernels.

A row is the one new token of a text. None of them writes to its arguments: the caller writes the new keys and values to
the cache. An empty row has a negative position: its results mean nothing, and it costs next to nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from executorch_moe.kernels.inference_only import inference_operator
from executorch_moe.kernels.prefill.aten import linear_aten

from .arguments import (
    RowsAttentionArguments,
    check_places,
    check_rows_attention,
    check_rows_linear,
    check_rows_router,
)
from .arguments import fits_rows as fits_rows
from .arguments import fits_rows_linear as fits_rows_linear
from .aten import rows_attention_aten, rows_router_aten
from .launches import run_rows_attention, run_rows_linear, run_rows_router


@inference_operator("rows_linear")
def rows_linear(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """A linear layer for few rows: x @ weight.T * scale. Each weight is read once and never stored as bf16.

    Args:
        x: bf16 [..., K], 1 to `MAX_ROWS` rows. weight: int8 or bf16 [N, K]. scale: fp32 [N] or None.

    Returns:
        bf16 [..., N].

    Raises:
        ValueError: see `check_rows_linear`.
        NotImplementedError: backward.
    """
    check_rows_linear(x, weight, scale)
    return linear_aten(x, weight, scale) if x.device.type == "cpu" else run_rows_linear(x, weight, scale)


@inference_operator("rows_attention", RowsAttentionArguments)
def rows_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Projection of query, key and value, their norm and rotation, and attention over the cache, for rows of texts.

    Args:
        x: bf16 [1, T, H], T at most `MAX_ROWS`.
        weight: int8 or bf16 [(heads + 2 * kv_heads) * D, H], query, key and value projections. scale: fp32, one for
            each row of it, or None.
        q_norm, k_norm: float, D elements. fp32, bf16 or fp16.
        cos, sin: float [1, T, D/2], for the first half of a head; the second half has the same angles.
        positions: int64 [T], of the rows; a row reads the positions before its own. Below 0: an empty row.
        slots: int64 [T], the part of the cache that a row reads; any for empty rows.
        key, value: bf16 [S, kv_heads, C, D], the cache. Positions that no row reads may hold anything, NaN included.
        scaling: factor of the scores, positive. eps: of the norms.

    Returns:
        The result of attention, bf16 [1, T, heads * D]; the rows' keys and values, bf16 [2, T, kv_heads, 1, D].

    Raises:
        ValueError: see `check_rows_attention`; on the CPU also a position above C, or a slot outside [0, S).
        NotImplementedError: backward.
    """
    arguments = RowsAttentionArguments(*args, **kwargs)
    check_rows_attention(arguments)
    on_cpu = arguments.x.device.type == "cpu"
    return rows_attention_aten(arguments) if on_cpu else run_rows_attention(arguments)


@inference_operator("rows_router")
def rows_router(x: Tensor, router: Tensor, positions: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The experts of each row and their weights, for a router with a softmax over the chosen experts.

    Args:
        x: bf16 [1, T, H], T at most `MAX_ROWS`. router: bf16 [E, H], E at most `MAX_EXPERTS`.
        positions: int64 [T]; below 0: an empty row. top_k: experts of a row.

    Returns:
        Weights, fp32 [T, top_k], which sum to 1; experts, int64 [T, top_k], as `top_experts` chooses them, and -1 in
        empty rows.

    Raises:
        ValueError: see `check_rows_router`.
        NotImplementedError: backward.
    """
    check_rows_router(x, router, positions, top_k)
    run = rows_router_aten if x.device.type == "cpu" else run_rows_router
    return run(x, router, positions, top_k)


@rows_linear.register_kernel("cpu")
def _(x, weight, scale):  # type: ignore[no-untyped-def]
    check_rows_linear(x, weight, scale)
    return linear_aten(x, weight, scale)


@rows_attention.register_kernel("cpu")
def _(*args):  # type: ignore[no-untyped-def]
    arguments = RowsAttentionArguments(*args)
    check_rows_attention(arguments)
    check_places(arguments.positions, arguments.slots, *arguments.key.shape[:3:2])
    return rows_attention_aten(arguments)


@rows_router.register_kernel("cpu")
def _(x, router, positions, top_k):  # type: ignore[no-untyped-def]
    check_rows_router(x, router, positions, top_k)
    return rows_router_aten(x, router, positions, top_k)


@rows_linear.register_fake
def _(x, weight, scale):  # type: ignore[no-untyped-def]
    check_rows_linear(x, weight, scale)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@rows_attention.register_fake
def _(*args):  # type: ignore[no-untyped-def]
    arguments = RowsAttentionArguments(*args)
    check_rows_attention(arguments)
    x, (_, kv_heads, _, head_dim) = arguments.x, arguments.key.shape
    heads = arguments.weight.shape[0] // head_dim - 2 * kv_heads
    return x.new_empty(1, x.shape[1], heads * head_dim), x.new_empty(2, x.shape[1], kv_heads, 1, head_dim)


@rows_router.register_fake
def _(x, router, positions, top_k):  # type: ignore[no-untyped-def]
    check_rows_router(x, router, positions, top_k)
    shape = (x.shape[1], top_k)
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.int64)
