"""The operators for one token, their fakes and their CPU kernels.

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
    SharedRouteArguments,
    check_one_token_attention,
    check_one_token_linear,
    check_one_token_norm_linear,
    check_one_token_router,
    check_one_token_shared_router,
    check_position,
)
from .arguments import fits_one_token as fits_one_token
from .aten import (
    one_token_attention_aten,
    one_token_linear_aten,
    one_token_norm_linear_aten,
    one_token_router_aten,
    one_token_shared_router_aten,
)
from .launches import (
    run_one_token_attention,
    run_one_token_linear,
    run_one_token_norm_linear,
    run_one_token_router,
    run_one_token_shared_router,
)


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
        gated: `weight` has heads * D more rows, the output gate, and the result is multiplied with its sigmoid.

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


@inference_operator("one_token_shared_router", SharedRouteArguments)
def one_token_shared_router(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`one_token_router`, and the first half of a shared expert, which takes every token.

    Args:
        x, weight, scale, residual, norm, router, top_k, eps: as for `one_token_router`.
        gate_up: int8 or bf16 [N, H]: the shared expert's gate projection and its up projection, `width` rows each;
            then, if N > 2 * width, one row for the gate of its result, and any number of unused rows.
        gate_up_scale: fp32 [N] or None. width: of the shared expert.

    Returns:
        The results of `one_token_router`; silu(gate) * up, bf16 [1, width]; the sigmoid of the expert's own gate, or 1,
        fp32 [1, 1]. The last two are `shared` and `share` of `fused_experts`.

    Raises:
        ValueError: see `check_one_token_shared_router`.
        NotImplementedError: backward.
    """
    arguments = SharedRouteArguments(*args, **kwargs)
    check_one_token_shared_router(arguments)
    on_cpu = arguments.x.device.type == "cpu"
    return one_token_shared_router_aten(arguments) if on_cpu else run_one_token_shared_router(arguments)


@inference_operator("one_token_norm_linear")
def one_token_norm_linear(
    hidden: Tensor, update: Tensor | None, norm: Tensor, weight: Tensor, scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The residual stream after an update, and a linear layer of its RMS norm, for one token.

    Args:
        hidden: bf16 [1, 1, H]; the input is hidden + update. update: bf16 [1, 1, H] or None.
        norm: float, H elements, the norm's weight: fp32, bf16 or fp16. eps: of the norm.
        weight: int8 or bf16 [N, H]. scale: fp32 [N] or None.

    Returns:
        hidden + update, bf16 [1, 1, H]; the linear layer's result, bf16 [1, 1, N].

    Raises:
        ValueError: see `check_one_token_norm_linear`.
        NotImplementedError: backward.
    """
    check_one_token_norm_linear(hidden, update, norm, weight, scale, eps)
    run = one_token_norm_linear_aten if hidden.device.type == "cpu" else run_one_token_norm_linear
    return run(hidden, update, norm, weight, scale, eps)


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


@one_token_shared_router.register_kernel("cpu")
def _(*args):  # type: ignore[no-untyped-def]
    arguments = SharedRouteArguments(*args)
    check_one_token_shared_router(arguments)
    return one_token_shared_router_aten(arguments)


@one_token_norm_linear.register_kernel("cpu")
def _(*args):  # type: ignore[no-untyped-def]
    check_one_token_norm_linear(*args)
    return one_token_norm_linear_aten(*args)


@one_token_linear.register_kernel("cpu")
def _(x, weight, scale):  # type: ignore[no-untyped-def]
    check_one_token_linear(x, weight, scale)
    return one_token_linear_aten(x, weight, scale)


@one_token_attention.register_fake
def _(*args):  # type: ignore[no-untyped-def]
    arguments = AttentionArguments(*args)
    check_one_token_attention(arguments)
    hidden, heads, (_, kv_heads, _, head_dim) = arguments.hidden, arguments.heads, arguments.key.shape
    summed = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    return summed, hidden.new_empty(1, 1, heads * head_dim), hidden.new_empty(2, 1, kv_heads, 1, head_dim)


def _route_fake(arguments: RouteArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    residual, top_k = arguments.residual, arguments.top_k
    return (
        torch.empty_like(residual, memory_format=torch.contiguous_format),
        residual.new_empty(1, residual.shape[2]),
        residual.new_empty(1, top_k, dtype=torch.float32),
        residual.new_empty(1, top_k, dtype=torch.int64),
    )


@one_token_router.register_fake
def _(*args):  # type: ignore[no-untyped-def]
    arguments = RouteArguments(*args)
    check_one_token_router(arguments)
    return _route_fake(arguments)


@one_token_shared_router.register_fake
def _(*args):  # type: ignore[no-untyped-def]
    arguments = SharedRouteArguments(*args)
    check_one_token_shared_router(arguments)
    residual = arguments.residual
    shared, share = residual.new_empty(1, arguments.width), residual.new_empty(1, 1, dtype=torch.float32)
    return *_route_fake(arguments.route), shared, share


@one_token_norm_linear.register_fake
def _(hidden, update, norm, weight, scale, eps):  # type: ignore[no-untyped-def]
    check_one_token_norm_linear(hidden, update, norm, weight, scale, eps)
    summed = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    return summed, hidden.new_empty(1, 1, weight.shape[0])


@one_token_linear.register_fake
def _(x, weight, scale):  # type: ignore[no-untyped-def]
    check_one_token_linear(x, weight, scale)
    return x.new_empty(*x.shape[:-1], weight.shape[0])
