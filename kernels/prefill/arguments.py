"""Arguments of the operators for several tokens, and their checks.

The operators, their fakes and their CPU kernels share the checks, which depend only on shapes, dtypes and devices.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from executorch_moe.kernels.checks import check_dtype, check_eps, check_layout, check_matrix

HEAD_DIMS = (32, 64, 128, 256)
"""Supported sizes of a head: tensor cores take powers of two of at least 16, and half a head is rotated at a time."""
MAX_EXPERTS = 1024
"""A program holds the logits of several tokens in registers."""
MAX_HIDDEN = 8192
"""A program of `residual_norm` holds a row in registers."""
FLOATS = (torch.bfloat16, torch.float32, torch.float16)


class HeadsArguments(NamedTuple):
    """Arguments of `op.rotated_heads`, in its order; its docstring gives shapes and dtypes."""

    qkv: Tensor
    q_norm: Tensor
    k_norm: Tensor
    cos: Tensor
    sin: Tensor
    kv_heads: int
    eps: float


class CachedAttentionArguments(NamedTuple):
    """Arguments of `op.cached_attention`, in its order; its docstring gives shapes and dtypes."""

    query: Tensor
    key: Tensor
    value: Tensor
    visible: Tensor
    scaling: float


def fits_cached_attention(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """True if `cached_attention` supports these, query [1, T, heads, D], key and value [1, kv_heads, C, D]."""
    return (
        all(t.dtype == torch.bfloat16 and t.dim() == 4 and t.shape[0] == 1 for t in (query, key, value))
        and key.shape == value.shape
        and query.shape[3] == key.shape[3]
        and key.shape[3] in HEAD_DIMS
        and query.shape[2] % key.shape[1] == 0
        and key.shape[2] * key.shape[3] < 2**31
    )


def fits_cached_attention_on_cpu(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """As `fits_cached_attention`, for a program that runs on the CPU."""
    return (
        all(t.dtype in FLOATS and t.dim() == 4 and t.shape[0] == 1 for t in (query, key, value))
        and key.shape == value.shape
        and query.shape[3] == key.shape[3]
        and query.shape[2] % key.shape[1] == 0
    )


def check_rotated_heads(arguments: HeadsArguments) -> None:
    """Check every argument of `rotated_heads` against its docstring.

    Raises:
        ValueError: a dtype, shape, device or value that the operator does not accept.
    """
    qkv, q_norm, k_norm, cos, sin, kv_heads, eps = arguments
    check_dtype("qkv", qkv, (torch.bfloat16,))
    if qkv.dim() != 3 or qkv.shape[0] != 1:
        raise ValueError(
            f"qkv has shape {list(qkv.shape)}, expected [1, T, (heads + 2 * kv_heads) * D]: pass the tokens of one text"
        )
    head_dim = q_norm.numel()
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"q_norm has {head_dim} elements, expected D, one of {HEAD_DIMS}: use transformers' attention")
    columns = qkv.shape[2]
    if kv_heads < 1 or columns % head_dim or (heads := columns // head_dim - 2 * kv_heads) < 1 or heads % kv_heads:
        raise ValueError(
            f"qkv has {columns} columns, expected (heads + 2 * kv_heads) * D with kv_heads={kv_heads}, D={head_dim} "
            "and heads a multiple of kv_heads: concatenate the projections of query, key and value in this order"
        )
    for name, t in (("q_norm", q_norm), ("k_norm", k_norm)):
        check_dtype(name, t, FLOATS)
        if t.numel() != head_dim:
            raise ValueError(f"{name} has shape {list(t.shape)}, expected {head_dim} elements: pass one for each of D")
    for name, t in (("cos", cos), ("sin", sin)):
        check_dtype(name, t, FLOATS)
        if t.dim() != 3 or t.shape[0] != 1 or t.shape[2] != head_dim // 2 or t.shape[1] != qkv.shape[1]:
            raise ValueError(
                f"{name} has shape {list(t.shape)}, expected [1, {qkv.shape[1]}, {head_dim // 2}]: pass the angles of "
                "the first half of a head, which the second half shares, for each token"
            )
    check_eps(eps)
    check_layout("qkv", qkv, arguments._asdict())


def check_cached_attention(arguments: CachedAttentionArguments) -> None:
    """Check every argument of `cached_attention` against its docstring.

    Raises:
        ValueError: a dtype, shape, device, layout or value that the operator does not accept.
    """
    query, key, value, visible, scaling = arguments
    on_cpu = query.device.type == "cpu"
    dtypes = FLOATS if on_cpu else FLOATS[:1]
    for name, t, expected in (("query", query, "[1, T, heads, D]"), ("key", key, "[1, kv_heads, C, D]")):
        check_dtype(name, t, dtypes)
        if t.dim() != 4 or t.shape[0] != 1:
            raise ValueError(f"{name} has shape {list(t.shape)}, expected {expected}: pass one text and one layer")
    check_dtype("value", value, dtypes)
    if value.shape != key.shape:
        raise ValueError(f"value has shape {list(value.shape)}, expected that of key, {list(key.shape)}")
    _, kv_heads, context, head_dim = key.shape
    if head_dim not in HEAD_DIMS and not on_cpu:
        raise ValueError(f"key has heads of D={head_dim}, expected one of {HEAD_DIMS}: use torch's own attention")
    if query.shape[3] != head_dim or query.shape[2] % kv_heads or context < 1:
        raise ValueError(
            f"query has shape {list(query.shape)}, expected [1, T, heads, {head_dim}] with heads a multiple of the "
            f"{kv_heads} heads of key, which has shape {list(key.shape)}: transpose it, or repeat its heads"
        )
    if context * head_dim >= 2**31:
        raise ValueError(
            f"key has C={context} positions of D={head_dim}, expected fewer than 2^31 numbers a head: shorten the cache"
        )
    check_dtype("visible", visible, (torch.int64,))
    if visible.dim() != 2 or visible.shape[1] not in (1, 2) or visible.shape[0] != query.shape[1]:
        raise ValueError(
            f"visible has shape {list(visible.shape)}, expected [{query.shape[1]}, 1] or [{query.shape[1]}, 2]: pass "
            "the last, or the first and the last position that each token sees"
        )
    if not (math.isfinite(scaling) and scaling > 0):
        raise ValueError(f"scaling={scaling} must be a positive number: try D**-0.5 = {head_dim**-0.5}")
    check_layout("query", query, arguments._asdict(), () if on_cpu else ("key", "value"))


def fits_residual_norm(hidden: Tensor) -> bool:
    """True if `residual_norm` supports hidden states [..., H]."""
    return hidden.dtype == torch.bfloat16 and hidden.shape[-1] <= MAX_HIDDEN


def check_residual_norm(hidden: Tensor, update: Tensor, norm: Tensor, eps: float) -> None:
    """Check the arguments of `residual_norm` against its docstring.

    Raises:
        ValueError: a dtype, shape, device or value that the operator does not accept.
    """
    for name, t in (("hidden", hidden), ("update", update)):
        check_dtype(name, t, (torch.bfloat16,))
    if hidden.dim() != 3 or hidden.shape[0] != 1 or not 1 <= hidden.shape[2] <= MAX_HIDDEN:
        raise ValueError(
            f"hidden has shape {list(hidden.shape)}, expected [1, T, H] with H from 1 to {MAX_HIDDEN}: pass the tokens "
            "of one text, or use the model's own norm"
        )
    if update.dim() != 3 or update.shape[0] != 1 or update.shape[1:] != hidden.shape[1:]:
        raise ValueError(f"update has shape {list(update.shape)}, expected that of hidden, {list(hidden.shape)}")
    check_dtype("norm", norm, FLOATS)
    if norm.numel() != hidden.shape[2]:
        raise ValueError(
            f"norm has shape {list(norm.shape)}, expected {hidden.shape[2]} elements: pass one for each of H"
        )
    check_eps(eps)
    check_layout("hidden", hidden, {"update": update, "norm": norm})


def check_prompt_linear(x: Tensor, weight: Tensor, scale: Tensor | None) -> None:
    """Check the arguments of `prompt_linear` against its docstring.

    Raises:
        ValueError: a dtype, shape, device or layout that the operator does not accept.
    """
    check_dtype("x", x, (torch.bfloat16,))
    if x.dim() < 2 or x.shape[-1] < 1:
        raise ValueError(f"x has shape {list(x.shape)}, expected [..., T, K]: pass tokens with K elements each")
    check_matrix("weight", weight, scale, x.shape[-1])
    check_layout("x", x, {"weight": weight, "scale": scale}, ("weight", "scale"))


def fits_top_experts(experts: int, top_k: int) -> bool:
    """True if `top_experts` supports a router of these sizes."""
    return 1 <= top_k <= experts <= MAX_EXPERTS


def check_top_experts(logits: Tensor, top_k: int) -> None:
    """Check the arguments of `top_experts` against its docstring.

    Raises:
        ValueError: a dtype, shape or value that the operator does not accept.
    """
    check_dtype("logits", logits, FLOATS)
    if logits.dim() != 2 or not 1 <= logits.shape[1] <= MAX_EXPERTS:
        raise ValueError(
            f"logits has shape {list(logits.shape)}, expected [T, E] with E from 1 to {MAX_EXPERTS}: flatten the "
            "tokens, or use torch.topk for more experts"
        )
    if not 1 <= top_k <= logits.shape[1]:
        raise ValueError(
            f"top_k={top_k} must be from 1 to the E={logits.shape[1]} experts of logits: pass the model's own top_k"
        )


def check_visible(visible: Tensor, context: int) -> None:
    """Check the positions of `cached_attention`, which is possible on the CPU only.

    Raises:
        ValueError: a position outside [0, context), or a first position after the last one.
    """
    if visible.numel() and not (int(visible.min()) >= 0 and int(visible.max()) < context):
        raise ValueError(
            f"visible has positions from {int(visible.min())} to {int(visible.max())}, expected 0 to {context - 1}: "
            "count the tokens of the text from 0, or use a larger cache"
        )
    if bool((visible[:, 0] > visible[:, -1]).any()):
        raise ValueError("visible has a first position after the last one: each token must see at least one position")
