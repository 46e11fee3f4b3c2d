"""`attention_of_one`, `route_one`, `linear_of_one`: schema, fake, CPU kernel, launches; kernels are in one_token.py.

None writes to its arguments: the new key and value come back, and the caller puts them into the cache.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.library import triton_op

from .configs import INTERPRETER_GPU, Gpu
from .gpus import gpu_of
from .one_token import moe_row_attention, moe_row_matvec, moe_row_router
from .plan import Launch

ROUTER_ROWS = 4
"""Experts of one program of the router."""
POSITIONS = 128
"""Positions that a program of attention takes at a time."""
MAX_CELLS = 16384
"""Numbers that a program holds at once."""
MAX_EXPERTS = 1024
"""The ranking is one program's work, quadratic in the experts."""
MAX_HIDDEN = 8192
"""The router's program holds a few whole rows in registers."""


def fits_one_token(head_dim: int, hidden: int, experts: int) -> bool:
    """True for a layer that the operators can do: tensor cores take halves of a head, powers of two from 16 on."""
    return head_dim in (32, 64, 128, 256) and hidden <= MAX_HIDDEN and experts <= MAX_EXPERTS


class AttentionArguments(NamedTuple):
    """Arguments of `attention_of_one`, in its order."""

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


class RouteArguments(NamedTuple):
    """Arguments of `route_one`, in its order."""

    x: Tensor
    weight: Tensor
    scale: Tensor | None
    residual: Tensor
    norm: Tensor
    router: Tensor
    top_k: int
    eps: float


@triton_op("executorch_moe::attention_of_one", mutates_args={})
def attention_of_one(
    hidden: Tensor,
    update: Tensor | None,
    norm: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    q_norm: Tensor,
    k_norm: Tensor,
    cos: Tensor,
    sin: Tensor,
    position: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Norm, one projection of query, key and value, their norm and rotation, attention over the cache, for one token.

    Args:
        hidden: bf16 [1, 1, H], or what is to be added to `update` to give it.
        update: bf16 [1, 1, H] or None: the experts' output, which the layer before has not added yet.
        norm: bf16 [H]. q_norm, k_norm: bf16, D elements.
        weight: int8 or bf16 [(heads + 2 * kv_heads) * D, H]. scale: fp32, one for each row, or None.
        cos, sin: float, D/2 elements: of the first half of a head, whose angles are those of the second half too.
        position: int64 [1]; positions before it are read from the cache.
        key, value: bf16 [1, kv_heads, C, D].
        scaling: of the scores. eps: of the norms.

    Returns:
        hidden + update, bf16 [1, 1, H]; attention's result, bf16 [1, 1, heads * D]; this token's key and value, bf16
        [2, 1, kv_heads, 1, D].
    """
    arguments = AttentionArguments(
        hidden, update, norm, weight, scale, q_norm, k_norm, cos, sin, position, key, value, scaling, eps
    )
    if hidden.device.type == "cpu":  # opened while tracing for the CPU
        return attention_of_one_aten(arguments)
    return run_attention_of_one(arguments)


@triton_op("executorch_moe::route_one", mutates_args={})
def route_one(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    residual: Tensor,
    norm: Tensor,
    router: Tensor,
    top_k: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A projection with the residual, norm, and the routing of the result, for one token.

    Args:
        x: bf16 [1, 1, K]. residual: bf16 [1, 1, H]. norm: bf16 [H].
        weight: int8 or bf16 [H, K]. scale: fp32 [H] or None.
        router: bf16 [E, H]. top_k: experts of a token.

    Returns:
        The projection plus residual, bf16 [1, 1, H]; its norm, bf16 [1, H]; routing weights, fp32 [1, top_k], which sum
        to 1; experts, int64 [1, top_k].
    """
    arguments = RouteArguments(x, weight, scale, residual, norm, router, top_k, eps)
    return route_one_aten(arguments) if x.device.type == "cpu" else run_route_one(arguments)


@triton_op("executorch_moe::linear_of_one", mutates_args={})
def linear_of_one(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """A linear layer of one token.

    Args:
        x: bf16 [..., K], one row. weight: int8 or bf16 [N, K]. scale: fp32 [N] or None.

    Returns:
        bf16 [..., N].
    """
    return linear_of_one_aten(x, weight, scale) if x.device.type == "cpu" else run_linear_of_one(x, weight, scale)


def run_linear_of_one(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    *,
    gpu: Gpu | None = None,
    submit: Callable[[Launch], None] = Launch.run,
) -> Tensor:
    """One launch; `gpu` and `submit` as for `plan.run_fused_experts`."""
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    submit(_matvec(x, None, None, weight, scale, None, out, out, None, 0.0, _ptx(gpu or _gpu(x))))
    return out


def run_attention_of_one(
    arguments: AttentionArguments,
    *,
    gpu: Gpu | None = None,
    submit: Callable[[Launch], None] = Launch.run,
) -> tuple[Tensor, Tensor, Tensor]:
    """Two launches; `gpu` and `submit` as for `plan.run_fused_experts`."""
    hidden, update, norm, weight, scale, q_norm, k_norm, cos, sin, position, key, value, scaling, eps = arguments
    gpu = gpu or _gpu(hidden)
    ptx = _ptx(gpu)
    _, kv_heads, context, head_dim = key.shape
    heads = weight.shape[0] // head_dim - 2 * kv_heads
    groups = triton.next_power_of_2(heads // kv_heads)
    splits = splits_of(gpu, kv_heads, groups * head_dim)
    summed, qkv = torch.empty_like(hidden), hidden.new_empty(weight.shape[0])
    arrivals = torch.empty(triton.next_power_of_2(kv_heads), dtype=torch.int32, device=hidden.device)
    ahead = (position, key, value)
    submit(_matvec(hidden, update, norm, weight, scale, None, summed, qkv, arrivals, eps, ptx, ahead))
    out, new = hidden.new_empty(1, 1, heads * head_dim), hidden.new_empty(2, 1, kv_heads, 1, head_dim)
    partial = torch.empty(splits + 1, heads, head_dim, dtype=torch.float32, device=hidden.device)
    maxima = torch.empty(splits + 1, heads, dtype=torch.float32, device=hidden.device)
    attention = Launch(
        moe_row_attention,
        (kv_heads, splits + 1),
        {
            "qkv_ptr": qkv,
            "q_norm_ptr": q_norm,
            "k_norm_ptr": k_norm,
            "cos_ptr": cos,
            "sin_ptr": sin,
            "position_ptr": position,
            "key_ptr": key,
            "value_ptr": value,
            "new_ptr": new,
            "partial_ptr": partial,
            "max_ptr": maxima,
            "sum_ptr": torch.empty_like(maxima),
            "arrivals_ptr": arrivals,
            "out_ptr": out,
        },
        {
            "SCALING": scaling,
            "EPS": eps,
            "C": context,
            "KV_HEADS": kv_heads,
            "GROUPS": heads // kv_heads,
            "G_POW2": groups,
            "G_PAD": max(16, groups),
            "HALF": head_dim // 2,
            "SPLITS": splits,
            "BLOCK_T": POSITIONS,
            "PTX": ptx,
        },
        num_warps=8,
    )
    submit(attention)
    return summed, out, new


def run_route_one(
    arguments: RouteArguments, *, gpu: Gpu | None = None, submit: Callable[[Launch], None] = Launch.run
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two launches; `gpu` and `submit` as for `plan.run_fused_experts`."""
    x, weight, scale, residual, norm, router, top_k, eps = arguments
    ptx = _ptx(gpu or _gpu(x))
    (experts, hidden), device = router.shape, x.device
    out, normed = torch.empty_like(residual), residual.new_empty(1, hidden)
    arrivals = torch.empty(1, dtype=torch.int32, device=device)
    submit(_matvec(x, None, None, weight, scale, residual, out, out, arrivals, eps, ptx))
    weights = torch.empty(1, top_k, dtype=torch.float32, device=device)
    ids = torch.empty(1, top_k, dtype=torch.int64, device=device)
    steps, block_h = row_pieces(hidden, router.dtype.itemsize)
    routing = Launch(
        moe_row_router,
        (-(-experts // ROUTER_ROWS),),
        {
            "x_ptr": out,
            "norm_ptr": norm,
            "w_ptr": router,
            "normed_ptr": normed,
            "logits_ptr": torch.empty(experts, dtype=torch.float32, device=device),
            "arrivals_ptr": arrivals,
            "weights_ptr": weights,
            "ids_ptr": ids,
        },
        {
            "EPS": eps,
            "H": hidden,
            "E": experts,
            "E_POW2": triton.next_power_of_2(experts),
            "TOP_K": top_k,
            "BLOCK_E": ROUTER_ROWS,
            "STEPS": steps,
            "BLOCK_H": block_h,
            "RANK_BLOCK": min(32, triton.next_power_of_2(experts)),
            "PTX": ptx,
        },
    )
    submit(routing)
    return out, normed, weights, ids


def row_pieces(columns: int, itemsize: int) -> tuple[int, int]:
    """How many pieces a row is read in, a power of two, and columns of one: each thread of a warp reads 16 bytes."""
    piece = min(512 // itemsize, triton.next_power_of_2(columns))
    return triton.next_power_of_2(-(-columns // piece)), piece


def splits_of(gpu: Gpu, kv_heads: int, width: int) -> int:
    """Parts of the cache for each head, a power of two: programs for half of the multiprocessors.

    No more than the last program can hold, which puts `width` numbers of each part together.
    """
    most = max(1, min(MAX_CELLS // width, gpu.num_sms // (2 * kv_heads)))
    return 1 << (most.bit_length() - 1)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _ptx(gpu: Gpu) -> int:
    return 0 if _interpreted() else gpu.capability


def _gpu(x: Tensor) -> Gpu:
    return INTERPRETER_GPU if _interpreted() else gpu_of(x.device.index or 0)


def _matvec(
    x: Tensor,
    add: Tensor | None,
    norm: Tensor | None,
    weight: Tensor,
    scale: Tensor | None,
    residual: Tensor | None,
    summed: Tensor,
    out: Tensor,
    arrivals: Tensor | None,
    eps: float,
    ptx: int,
    ahead: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Launch:
    """weight @ norm(x + add) * scale + residual; absent arguments are filled with a tensor that is never read."""
    n, k = weight.shape
    # Rows of a program: enough programs to fill a large GPU at least once. Weights of a chunk: 128 a thread.
    block_n = 8 if n > 4096 else 4
    steps, block_k = row_pieces(k, weight.dtype.itemsize)
    steps = min(steps, max(1, MAX_CELLS // (block_k * block_n)))
    return Launch(
        moe_row_matvec,
        (-(-n // block_n),),
        {
            "x_ptr": x,
            "add_ptr": x if add is None else add,
            "norm_ptr": x if norm is None else norm,
            "w_ptr": weight,
            "scale_ptr": weight if scale is None else scale,
            "residual_ptr": x if residual is None else residual,
            "sum_ptr": summed,
            "out_ptr": out,
            "arrivals_ptr": out if arrivals is None else arrivals,
            **dict(zip(("position_ptr", "key_ptr", "value_ptr"), ahead or (x, x, x), strict=True)),
        },
        {
            "EPS": eps,
            "N": n,
            "K": k,
            "BLOCK_N": block_n,
            "STEPS": steps,
            "BLOCK_K": block_k,
            "NUM_ARRIVALS": 0 if arrivals is None else arrivals.shape[0],
            "HAS_ADD": add is not None,
            "HAS_NORM": norm is not None,
            "HAS_SCALE": scale is not None,
            "HAS_RESIDUAL": residual is not None,
            "HAS_AHEAD": ahead is not None,
            "PTX": ptx,
        },
    )


def attention_of_one_aten(arguments: AttentionArguments) -> tuple[Tensor, Tensor, Tensor]:
    """The operator in plain ATen: fp32, rounded where the kernels round."""
    hidden, update, norm, weight, scale, q_norm, k_norm, cos, sin, position, key, value, scaling, eps = arguments
    summed = hidden.clone() if update is None else hidden + update
    x = summed.float()
    factor = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    qkv = (x * norm.float()) @ weight.float().T * factor
    qkv = (qkv if scale is None else qkv * scale).to(hidden.dtype)
    _, kv_heads, context, head_dim = key.shape
    rows = qkv.reshape(-1, head_dim).float()
    heads = rows.shape[0] - 2 * kv_heads
    wave = cos.flatten().float(), sin.flatten().float()
    query = _normed_and_turned(rows[:heads], q_norm.flatten().float(), *wave, eps).to(hidden.dtype)
    new_key = _normed_and_turned(rows[heads : heads + kv_heads], k_norm.flatten().float(), *wave, eps).to(hidden.dtype)
    new_value = rows[heads + kv_heads :].to(hidden.dtype)
    keys = torch.cat([key[0].float(), new_key[:, None].float()], 1)  # [kv_heads, C + 1, D]
    values = torch.cat([value[0].float(), new_value[:, None].float()], 1)
    scores = query.float().unflatten(0, (kv_heads, -1)) @ keys.transpose(1, 2) * scaling
    at = torch.arange(context + 1, device=key.device)
    seen = (at < position) | (at == context)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    # What was not written may be anything, NaN as well.
    out = weights @ values.masked_fill(~seen[:, None], 0.0)
    new = torch.stack([new_key, new_value])[:, None, :, None]
    return summed, out.to(hidden.dtype).reshape(1, 1, -1), new


def _normed_and_turned(x: Tensor, norm: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * norm
    low, high = x.chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


def route_one_aten(arguments: RouteArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator in plain ATen: fp32, rounded where the kernel rounds."""
    x, weight, scale, residual, norm, router, top_k, eps = arguments
    y = x.float() @ weight.float().T
    out = (y if scale is None else y * scale).to(x.dtype) + residual
    row = out[0].float()
    normed = (row * torch.rsqrt(row.pow(2).mean(-1, keepdim=True) + eps) * norm.float()).to(x.dtype)
    logits = (normed.float() @ router.float().T).to(x.dtype).float()
    # Sorted and stable: of equal logits the lower expert comes first.
    order = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :top_k]
    return out, normed, logits.gather(-1, order).softmax(-1), order


def linear_of_one_aten(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """The operator in plain ATen: fp32, rounded at the end."""
    y = x.float() @ weight.float().T
    return (y if scale is None else y * scale).to(x.dtype)


@attention_of_one.register_kernel("cpu")
def _(*args):  # type: ignore[no-untyped-def]
    return attention_of_one_aten(AttentionArguments(*args))


@route_one.register_kernel("cpu")
def _(*args):  # type: ignore[no-untyped-def]
    return route_one_aten(RouteArguments(*args))


@linear_of_one.register_kernel("cpu")
def _(x, weight, scale):  # type: ignore[no-untyped-def]
    return linear_of_one_aten(x, weight, scale)


@linear_of_one.register_fake
def _(x, weight, scale):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@attention_of_one.register_fake
def _(hidden, update, norm, weight, scale, q_norm, k_norm, cos, sin, position, key, *_):  # type: ignore[no-untyped-def]
    _, kv_heads, _, head_dim = key.shape
    heads = weight.shape[0] // head_dim - 2 * kv_heads
    new = hidden.new_empty(2, 1, kv_heads, 1, head_dim)
    return torch.empty_like(hidden), hidden.new_empty(1, 1, heads * head_dim), new


@route_one.register_fake
def _(x, weight, scale, residual, norm, router, top_k, eps):  # type: ignore[no-untyped-def]
    return (
        torch.empty_like(residual),
        residual.new_empty(1, router.shape[1]),
        residual.new_empty(1, top_k, dtype=torch.float32),
        residual.new_empty(1, top_k, dtype=torch.int64),
    )
