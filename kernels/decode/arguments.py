"""Arguments of the operators for one token, and their checks.

The operators, their fakes and their CPU kernels share the checks, which depend only on shapes, dtypes and devices.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from executorch_moe.kernels.checks import check_dtype, check_eps, check_layout, check_shape

HEAD_DIMS = (32, 64, 128, 256)
"""Supported sizes of a head. Tensor cores take half a head at a time, a power of two of at least 16."""
MAX_EXPERTS = 1024
"""One program ranks all experts, and its work is quadratic in their number."""
MAX_HIDDEN = 8192
"""A program of the router holds a few whole rows in registers."""
FLOATS = (torch.bfloat16, torch.float32, torch.float16)
UNFUSED = "or compute this layer with transformers' modules"


def fits_one_token(head_dim: int, hidden: int, experts: int) -> bool:
    """True if the operators support a layer of these sizes."""
    return head_dim in HEAD_DIMS and hidden <= MAX_HIDDEN and experts <= MAX_EXPERTS


class AttentionArguments(NamedTuple):
    """Arguments of `op.one_token_attention`, in its order; its docstring gives shapes and dtypes."""

    hidden: Tensor
    update: Tensor | None
    norm: Tensor
    weight: Tensor
    scale: Tensor | None
    q_norm: Tensor
    k_norm: Tensor
    cos: Tensor
    sin: Tensor
    position: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    eps: float
    gated: bool = False

    @property
    def heads(self) -> int:
        """Query heads, from the rows of the projection; not checked."""
        _, kv_heads, _, head_dim = self.key.shape
        return (self.weight.shape[0] // head_dim - 2 * kv_heads) // (1 + self.gated)


class RouteArguments(NamedTuple):
    """Arguments of `op.one_token_router`, in its order; its docstring gives shapes and dtypes."""

    x: Tensor
    weight: Tensor
    scale: Tensor | None
    residual: Tensor
    norm: Tensor
    router: Tensor
    top_k: int
    eps: float


class SharedRouteArguments(NamedTuple):
    """Arguments of `op.one_token_shared_router`, in its order; its docstring gives shapes and dtypes."""

    x: Tensor
    weight: Tensor
    scale: Tensor | None
    residual: Tensor
    norm: Tensor
    router: Tensor
    top_k: int
    eps: float
    gate_up: Tensor
    gate_up_scale: Tensor | None
    width: int

    @property
    def route(self) -> RouteArguments:
        """The arguments of `one_token_router` among these."""
        return RouteArguments(*self[:8])

    @property
    def has_own_gate(self) -> bool:
        """True if `gate_up` has a row for the shared expert's own gate."""
        return self.gate_up.shape[0] > 2 * self.width


def check_one_token_attention(arguments: AttentionArguments) -> None:
    """Check every argument of `one_token_attention` against its docstring.

    Raises:
        ValueError: a dtype, shape, device, layout or value that the operator does not accept.
    """
    hidden, update, norm, weight, scale, q_norm, k_norm, cos, sin, position, key, value, scaling, eps, _ = arguments
    h = _check_row("hidden", hidden)
    if update is not None:
        check_shape("update", update, hidden.shape, "it is the output of the previous layer's experts")
        check_dtype("update", update, (torch.bfloat16,))
    _check_numbers("norm", norm, h, "one weight for each of the H elements of hidden")
    for name, cache in (("key", key), ("value", value)):
        if cache.dim() != 4 or cache.shape[0] != 1 or min(cache.shape) < 1:
            raise ValueError(
                f"{name} has shape {list(cache.shape)}, expected [1, kv_heads, C, D]: pass one layer's cache"
            )
        check_dtype(name, cache, (torch.bfloat16,))
    check_shape("value", value, key.shape, "keys and values of a layer have one shape")
    _, kv_heads, context, head_dim = key.shape
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"key has heads of D={head_dim}, expected one of {HEAD_DIMS}: use such a model, {UNFUSED}")
    if context * head_dim >= 2**31:
        raise ValueError(
            f"key has C={context} positions of D={head_dim}, expected fewer than 2^31 numbers a head: shorten the cache"
        )
    _check_matrix("weight", weight, scale, h)
    rows, heads = weight.shape[0], arguments.heads
    if heads < 1 or heads % kv_heads or rows != ((1 + arguments.gated) * heads + 2 * kv_heads) * head_dim:
        gates = " and the gate" if arguments.gated else ""
        raise ValueError(
            f"weight has {rows} rows, expected ({'2 * ' * arguments.gated}heads + 2 * kv_heads) * D with "
            f"kv_heads={kv_heads}, D={head_dim} and heads a multiple of kv_heads: concatenate the projections of "
            f"query, key, value{gates} in this order"
        )
    for name, t in (("q_norm", q_norm), ("k_norm", k_norm)):
        _check_numbers(name, t, head_dim, "one weight for each of the D elements of a head")
    for name, t in (("cos", cos), ("sin", sin)):
        _check_numbers(name, t, head_dim // 2, "the angles of the first half of a head, which the second half shares")
    check_dtype("position", position, (torch.int64,))
    check_shape("position", position, (1,), "pass the position of the one token")
    if not math.isfinite(scaling):
        raise ValueError(f"scaling={scaling} must be a finite number: try D**-0.5 = {head_dim**-0.5}")
    check_eps(eps)
    check_layout("hidden", hidden, arguments._asdict(), ("norm", "weight", "scale", "key", "value"))


def check_position(position: Tensor, context: int) -> None:
    """Check the value of `one_token_attention`'s position, which is possible on the CPU only.

    Raises:
        ValueError: it is negative or greater than `context`.
    """
    if not 0 <= int(position) <= context:
        raise ValueError(
            f"position={int(position)} must be from 0 to the C={context} positions of the cache: "
            "pass the number of tokens before this one, or use a larger cache"
        )


def check_one_token_router(arguments: RouteArguments) -> None:
    """Check every argument of `one_token_router` against its docstring.

    Raises:
        ValueError: a dtype, shape, device, layout or value that the operator does not accept.
    """
    x, weight, scale, residual, norm, router, top_k, eps = arguments
    k, h = _check_row("x", x), _check_row("residual", residual)
    if weight.dim() == 2 and weight.shape[0] != h:
        raise ValueError(
            f"weight has {weight.shape[0]} rows, expected H={h} as residual has: pass the output projection"
        )
    _check_matrix("weight", weight, scale, k)
    if h > MAX_HIDDEN:
        raise ValueError(f"residual has H={h}, expected {MAX_HIDDEN} at most: use a smaller model, {UNFUSED}")
    _check_numbers("norm", norm, h, "one weight for each of the H elements of residual")
    check_dtype("router", router, (torch.bfloat16,))
    if router.dim() != 2 or router.shape[1] != h or router.shape[0] < 1:
        raise ValueError(f"router has shape {list(router.shape)}, expected [E, H={h}]: pass the router's weight")
    experts = router.shape[0]
    if experts > MAX_EXPERTS:
        raise ValueError(f"router has E={experts} experts, expected {MAX_EXPERTS} at most: use fewer, {UNFUSED}")
    if not 1 <= top_k <= experts:
        raise ValueError(
            f"top_k={top_k} must be from 1 to the E={experts} experts of router: pass the model's own top_k"
        )
    check_eps(eps)
    check_layout("x", x, arguments._asdict(), ("weight", "scale", "norm", "router"))


def check_one_token_shared_router(arguments: SharedRouteArguments) -> None:
    """Check every argument of `one_token_shared_router` against its docstring.

    Raises:
        ValueError: a dtype, shape, device, layout or value that the operator does not accept.
    """
    check_one_token_router(arguments.route)
    gate_up, scale, width = arguments[-3:]
    _check_matrix("gate_up", gate_up, scale, arguments.residual.shape[2])
    if not 1 <= width <= gate_up.shape[0] // 2 or gate_up.numel() >= 2**31:
        raise ValueError(
            f"gate_up has {gate_up.shape[0]} rows, expected at least 2 * width with width={width}, and fewer than 2^31 "
            "elements: concatenate the gate and up projections, of `width` rows each, and the expert's own gate"
        )
    check_layout("x", arguments.x, arguments._asdict(), ("gate_up", "gate_up_scale"))


def check_one_token_norm_linear(
    hidden: Tensor, update: Tensor | None, norm: Tensor, weight: Tensor, scale: Tensor | None, eps: float
) -> None:
    """Check every argument of `one_token_norm_linear` against its docstring.

    Raises:
        ValueError: a dtype, shape, device, layout or value that the operator does not accept.
    """
    h = _check_row("hidden", hidden)
    if update is not None:
        check_shape("update", update, hidden.shape, "it is the output of the previous layer's experts")
        check_dtype("update", update, (torch.bfloat16,))
    _check_numbers("norm", norm, h, "one weight for each of the H elements of hidden")
    _check_matrix("weight", weight, scale, h)
    check_eps(eps)
    tensors = {"hidden": hidden, "update": update, "norm": norm, "weight": weight, "scale": scale}
    check_layout("hidden", hidden, tensors, ("norm", "weight", "scale"))


def check_one_token_linear(x: Tensor, weight: Tensor, scale: Tensor | None) -> None:
    """Check every argument of `one_token_linear` against its docstring.

    Raises:
        ValueError: a dtype, shape, device or layout that the operator does not accept.
    """
    check_dtype("x", x, (torch.bfloat16,))
    if x.dim() < 1 or x.shape[-1] < 1 or math.prod(x.shape[:-1]) != 1:
        raise ValueError(
            f"x has shape {list(x.shape)}, expected one row, [..., K]: use a linear layer for several rows"
        )
    _check_matrix("weight", weight, scale, x.shape[-1])
    check_layout("x", x, {"x": x, "weight": weight, "scale": scale}, ("weight", "scale"))


def _check_row(name: str, t: Tensor) -> int:
    """Checks a bf16 tensor [1, 1, columns] and returns the number of columns."""
    check_dtype(name, t, (torch.bfloat16,))
    if t.dim() != 3 or tuple(t.shape[:2]) != (1, 1) or t.shape[2] < 1:
        raise ValueError(f"{name} has shape {list(t.shape)}, expected [1, 1, columns]: pass one token of one text")
    return t.shape[2]


def _check_numbers(name: str, t: Tensor, count: int, remedy: str) -> None:
    """Checks a float tensor of any shape by its number of elements."""
    check_dtype(name, t, FLOATS)
    if t.numel() != count:
        raise ValueError(f"{name} has shape {list(t.shape)}, expected {count} elements: pass {remedy}")


def _check_matrix(name: str, weight: Tensor, scale: Tensor | None, columns: int) -> None:
    """Checks a weight, int8 or bf16 [N, columns], and its scales, fp32 [N] or None."""
    check_dtype(name, weight, (torch.int8, torch.bfloat16))
    if weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[1] != columns:
        raise ValueError(
            f"{name} has shape {list(weight.shape)}, expected [N, {columns}]: its columns are the input's elements"
        )
    if scale is not None:
        check_dtype("scale", scale, (torch.float32,))
        check_shape("scale", scale, (weight.shape[0],), f"pass one scale for each row of {name}")
