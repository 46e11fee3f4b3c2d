"""The operators for several tokens, their fakes and their CPU kernels.

None of them writes to its arguments: between `rotated_heads` and `cached_attention`, the caller writes the new keys and
values to the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from executorch_moe.kernels.inference_only import inference_operator

from .arguments import (
    CachedAttentionArguments,
    HeadsArguments,
    check_cached_attention,
    check_prompt_linear,
    check_residual_norm,
    check_rotated_heads,
    check_top_experts,
    check_visible,
)
from .arguments import fits_cached_attention as fits_cached_attention
from .arguments import fits_cached_attention_on_cpu as fits_cached_attention_on_cpu
from .arguments import fits_residual_norm as fits_residual_norm
from .arguments import fits_top_experts as fits_top_experts
from .aten import (
    cached_attention_aten,
    linear_aten,
    residual_norm_aten,
    rotated_heads_aten,
    top_experts_aten,
)
from .launches import run_cached_attention, run_residual_norm, run_rotated_heads, run_top_experts
from .linear import run_prompt_linear


@inference_operator("residual_norm")
def residual_norm(hidden: Tensor, update: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The residual stream after an update, and its RMS norm.

    Args:
        hidden, update: bf16 [1, T, H], H at most `MAX_HIDDEN`.
        norm: float, H elements, the norm's weight. fp32, bf16 or fp16. eps: of the norm.

    Returns:
        hidden + update, and its norm, bf16 [1, T, H] each.

    Raises:
        ValueError: see `check_residual_norm`.
        NotImplementedError: backward.
    """
    check_residual_norm(hidden, update, norm, eps)
    run = residual_norm_aten if hidden.device.type == "cpu" else run_residual_norm
    return run(hidden, update, norm, eps)


@inference_operator("rotated_heads", HeadsArguments)
def rotated_heads(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """RMS norm of each head of query and key, and their rotary embedding; values are copied.

    Args:
        qkv: bf16 [1, T, (heads + 2 * kv_heads) * D], one projection of query, key and value.
        q_norm, k_norm: float, D elements. fp32, bf16 or fp16.
        cos, sin: float [1, T, D/2], for the first half of a head; the second half has the same angles.
        kv_heads: heads of key and of value. eps: of the norms.

    Returns:
        Query, bf16 [1, T, heads, D]; keys and values, bf16 [2, 1, kv_heads, T, D].

    Raises:
        ValueError: see `check_rotated_heads`.
        NotImplementedError: backward.
    """
    arguments = HeadsArguments(*args, **kwargs)
    check_rotated_heads(arguments)
    on_cpu = arguments.qkv.device.type == "cpu"
    return rotated_heads_aten(arguments) if on_cpu else run_rotated_heads(arguments)


@inference_operator("cached_attention", CachedAttentionArguments)
def cached_attention(*args: Any, **kwargs: Any) -> Tensor:
    """Attention of several tokens over a cache, which has the tokens' own keys and values already.

    Time and memory traffic depend on the positions that are visible, not on the size of the cache.

    Args:
        query: bf16 [1, T, heads, D], D one of `HEAD_DIMS`. heads / kv_heads consecutive heads share one of the cache.
            On the CPU, any D, and fp32 and fp16 too.
        key, value: bf16 [1, kv_heads, C, D], contiguous except on the CPU. Positions that no token sees may hold
            anything, NaN included.
        visible: int64, the positions that a token sees: [T, 1], the last one, or [T, 2], the first and the last one.
        scaling: factor of the scores, positive.

    Returns:
        [1, T, heads, D] in the dtype of `query`.

    Raises:
        ValueError: see `check_cached_attention`; on the CPU also positions outside [0, C).
        NotImplementedError: backward.
    """
    arguments = CachedAttentionArguments(*args, **kwargs)
    check_cached_attention(arguments)
    on_cpu = arguments.query.device.type == "cpu"
    return cached_attention_aten(arguments) if on_cpu else run_cached_attention(arguments)


@inference_operator("top_experts")
def top_experts(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The experts of each token and their weights, for a router with a softmax over the chosen experts.

    Args:
        logits: float [T, E], E at most `MAX_EXPERTS`. top_k: experts of a token.

    Returns:
        Weights, fp32 [T, top_k], which sum to 1; experts, int64 [T, top_k], by falling logits, and by number if logits
        are equal. The experts of a token differ from each other and are in [0, E) even if logits are NaN.

    Raises:
        ValueError: see `check_top_experts`.
        NotImplementedError: backward.
    """
    check_top_experts(logits, top_k)
    return top_experts_aten(logits, top_k) if logits.device.type == "cpu" else run_top_experts(logits, top_k)


@inference_operator("prompt_linear")
def prompt_linear(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """A linear layer for any number of tokens: x @ weight.T * scale, with fp32 sums, rounded to bf16 once.

    int8 weights become bf16 in a temporary matrix, which is exact.

    Args:
        x: bf16 [..., T, K]. weight: int8 or bf16 [N, K]. scale: fp32 [N] or None.

    Returns:
        bf16 [..., T, N].

    Raises:
        ValueError: see `check_prompt_linear`.
        NotImplementedError: backward.
    """
    check_prompt_linear(x, weight, scale)
    return linear_aten(x, weight, scale) if x.device.type == "cpu" else run_prompt_linear(x, weight, scale)


@residual_norm.register_kernel("cpu")
def _(hidden, update, norm, eps):  # type: ignore[no-untyped-def]
    check_residual_norm(hidden, update, norm, eps)
    return residual_norm_aten(hidden, update, norm, eps)


@residual_norm.register_fake
def _(hidden, update, norm, eps):  # type: ignore[no-untyped-def]
    check_residual_norm(hidden, update, norm, eps)
    return hidden.new_empty(hidden.shape), hidden.new_empty(hidden.shape)


@rotated_heads.register_kernel("cpu")
def _(*args):  # type: ignore[no-untyped-def]
    arguments = HeadsArguments(*args)
    check_rotated_heads(arguments)
    return rotated_heads_aten(arguments)


@cached_attention.register_kernel("cpu")
def _(*args):  # type: ignore[no-untyped-def]
    arguments = CachedAttentionArguments(*args)
    check_cached_attention(arguments)
    check_visible(arguments.visible, arguments.key.shape[2])
    return cached_attention_aten(arguments)


@rotated_heads.register_fake
def _(*args):  # type: ignore[no-untyped-def]
    arguments = HeadsArguments(*args)
    check_rotated_heads(arguments)
    qkv, kv_heads, head_dim = arguments.qkv, arguments.kv_heads, arguments.q_norm.numel()
    tokens, heads = qkv.shape[1], qkv.shape[2] // head_dim - 2 * kv_heads
    return qkv.new_empty(1, tokens, heads, head_dim), qkv.new_empty(2, 1, kv_heads, tokens, head_dim)


@cached_attention.register_fake
def _(*args):  # type: ignore[no-untyped-def]
    arguments = CachedAttentionArguments(*args)
    check_cached_attention(arguments)
    return arguments.query.new_empty(arguments.query.shape)


@top_experts.register_kernel("cpu")
def _(logits, top_k):  # type: ignore[no-untyped-def]
    check_top_experts(logits, top_k)
    return top_experts_aten(logits, top_k)


@top_experts.register_fake
def _(logits, top_k):  # type: ignore[no-untyped-def]
    check_top_experts(logits, top_k)
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int64)


@prompt_linear.register_kernel("cpu")
def _(x, weight, scale):  # type: ignore[no-untyped-def]
    check_prompt_linear(x, weight, scale)
    return linear_aten(x, weight, scale)


@prompt_linear.register_fake
def _(x, weight, scale):  # type: ignore[no-untyped-def]
    check_prompt_linear(x, weight, scale)
    return x.new_empty(*x.shape[:-1], weight.shape[0])
