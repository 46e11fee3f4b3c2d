"""The operators `one_token_attention`, `one_token_router` and `one_token_linear`, their fakes and their CPU kernels.

None of them writes to its arguments. Attention returns the new key and value, and the caller writes them to the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from executorch_moe.kernels.inference_only import inference_operator

from .arguments import (
    AttentionArguments,
    RouteArguments,
    check_one_token_attention,
    check_one_token_linear,
    check_one_token_router,
    check_position,
)
from .arguments import fits_one_token as fits_one_token
from .aten import one_token_attention_aten, one_token_linear_aten, one_token_router_aten
from .launches import run_one_token_attention, run_one_token_linear, run_one_token_router


@inference_operator("one_token_attention", AttentionArguments)
def one_token_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Norm, one projection of query, key and value, their norm and rotation, attention over the cache, for one token.

    Args:
        hidden: bf16 [1, 1, H]; the input is hidden + update.
        update: bf16 [1, 1, H] or None: output of the previous layer's experts, if it is not added to `hidden` yet.
        norm: float, H elements. q_norm, k_norm: float, D elements. fp32, bf16 or fp16.
        weight: int8 or bf16 [(heads + 2 * kv_heads) * D, H], query, key and value projections. scale: fp32, one for
            each row, or None.
        cos, sin: float, D/2 elements, for the first half of a head; the second half has the same angles.
        position: int64 [1]; attention reads the positions before it from the cache.
        key, value: bf16 [1, kv_heads, C, D], the cache.
        scaling: factor of the scores. eps: of the norms.

    Returns:
        hidden + update, bf16 [1, 1, H]; the result of attention, bf16 [1, 1, heads * D]; this token's key and value,
        bf16 [2, 1, kv_heads, 1, D].

    Raises:
        ValueError: see `check_one_token_attention`; on the CPU also a position outside [0, C].
        NotImplementedError: backward.
    """
    arguments = AttentionArguments(*args, **kwargs)
    check_one_token_attention(arguments)
    if arguments.hidden.device.type == "cpu":  # only while tracing for the CPU
        return one_token_attention_aten(arguments)
    return run_one_token_attention(arguments)


@inference_operator("one_token_router", RouteArguments)
def one_token_router(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A projection plus residual, its RMS norm, and the router's choice of experts for it, for one token.

    Args:
        x: bf16 [1, 1, K]. residual: bf16 [1, 1, H]. norm: float, H elements.
        weight: int8 or bf16 [H, K]. scale: fp32 [H] or None.
        router: bf16 [E, H]. top_k: experts of a token. eps: of the norm.

    Returns:
        Projection plus residual, bf16 [1, 1, H]; its norm, bf16 [1, H]; routing weights, fp32 [1, top_k], which sum to
        1; experts, int64 [1, top_k]. The experts differ from each other and are in [0, E) even if logits are NaN.

    Raises:
        ValueError: see `check_one_token_router`.
        NotImplementedError: backward.
    """
    arguments = RouteArguments(*args, **kwargs)
    check_one_token_router(arguments)
    on_cpu = arguments.x.device.type == "cpu"
    return one_token_router_aten(arguments) if on_cpu else run_one_token_router(arguments)


@inference_operator("one_token_linear")
def one_token_linear(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """A linear layer for one token: x @ weight.T * scale.

    Args:
        x: bf16 [..., K], one row. weight: int8 or bf16 [N, K]. scale: fp32 [N] or None.

    Returns:
        bf16 [..., N].

    Raises:
        ValueError: see `check_one_token_linear`.
        NotImplementedError: backward.
    """
    check_one_token_linear(x, weight, scale)
    return one_token_linear_aten(x, weight, scale) if x.device.type == "cpu" else run_one_token_linear(x, weight, scale)


@one_token_attention.register_kernel("cpu")
def _(*args):  # type: ignore[no-untyped-def]
    arguments = AttentionArguments(*args)
    check_one_token_attention(arguments)
    check_position(arguments.position, arguments.key.shape[2])
    return one_token_attention_aten(arguments)


@one_token_router.register_kernel("cpu")
def _(*args):  # type: ignore[no-untyped-def]
    arguments = RouteArguments(*args)
    check_one_token_router(arguments)
    return one_token_router_aten(arguments)


@one_token_linear.register_kernel("cpu")
def _(x, weight, scale):  # type: ignore[no-untyped-def]
    check_one_token_linear(x, weight, scale)
    return one_token_linear_aten(x, weight, scale)


@one_token_attention.register_fake
def _(*args):  # type: ignore[no-untyped-def]
    arguments = AttentionArguments(*args)
    check_one_token_attention(arguments)
    hidden, (_, kv_heads, _, head_dim) = arguments.hidden, arguments.key.shape
    heads = arguments.weight.shape[0] // head_dim - 2 * kv_heads
    summed = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    return summed, hidden.new_empty(1, 1, heads * head_dim), hidden.new_empty(2, 1, kv_heads, 1, head_dim)


@one_token_router.register_fake
def _(*args):  # type: ignore[no-untyped-def]
    arguments = RouteArguments(*args)
    check_one_token_router(arguments)
    residual, top_k = arguments.residual, arguments.top_k
    return (
        torch.empty_like(residual, memory_format=torch.contiguous_format),
        residual.new_empty(1, residual.shape[2]),
        residual.new_empty(1, top_k, dtype=torch.float32),
        residual.new_empty(1, top_k, dtype=torch.int64),
    )


@one_token_linear.register_fake
def _(x, weight, scale):  # type: ignore[no-untyped-def]
    check_one_token_linear(x, weight, scale)
    return x.new_empty(*x.shape[:-1], weight.shape[0])
