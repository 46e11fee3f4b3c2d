"""The operators for one token as launches of the kernels in kernels.py and shared_kernels.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from executorch_moe.kernels.gpus import Gpu
from executorch_moe.kernels.launch import Launch, kernel_gpu, ptx_of

from .arguments import AttentionArguments, RouteArguments, SharedRouteArguments
from .attention_kernels import moe_one_token_attention
from .kernels import moe_one_token_logits, moe_one_token_matvec, moe_one_token_router
from .shared_kernels import moe_one_token_shared_router

POSITIONS = 128
"""Positions that a program of attention handles at a time."""
MAX_CELLS = 16384
"""Numbers that a program can hold in registers at a time."""
MAX_SPLITS = 32
"""Most parts of the positions."""
MAX_AT_ONCE = 16
"""Parts that the last program of attention combines at a time. It is unrolled: 16 take Triton 3 s to compile."""
EARLY_CELLS = 16384
"""Most numbers of a block of keys for which a program of attention holds two blocks."""


class MatvecTile(NamedTuple):
    """Rows of a program of `moe_one_token_matvec`, its warps, and most numbers of a row that it loads at once."""

    rows: int
    num_warps: int
    columns: int


def run_one_token_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    *,
    gpu: Gpu | None = None,
    submit: Callable[[Launch], None] = Launch.run,
) -> Tensor:
    """One launch; `gpu` and `submit` as in `experts.plan.run_fused_experts`."""
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    submit(_matvec(x, None, None, weight, scale, None, out, out, None, 0.0, gpu or kernel_gpu(x)))
    return out


def run_one_token_norm_linear(
    hidden: Tensor,
    update: Tensor | None,
    norm: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    eps: float,
    *,
    gpu: Gpu | None = None,
    submit: Callable[[Launch], None] = Launch.run,
) -> tuple[Tensor, Tensor]:
    """One launch; `gpu` and `submit` as in `experts.plan.run_fused_experts`."""
    hidden, update = hidden.contiguous(), None if update is None else update.contiguous()
    summed, out = torch.empty_like(hidden), hidden.new_empty(1, 1, weight.shape[0])
    submit(_matvec(hidden, update, norm, weight, scale, None, summed, out, None, eps, gpu or kernel_gpu(hidden)))
    return summed, out


def run_one_token_attention(
    arguments: AttentionArguments,
    *,
    gpu: Gpu | None = None,
    submit: Callable[[Launch], None] = Launch.run,
) -> tuple[Tensor, Tensor, Tensor]:
    """Two launches; `gpu` and `submit` as in `experts.plan.run_fused_experts`."""
    hidden, update, norm, weight, scale, q_norm, k_norm, cos, sin, position, key, value, scaling, eps, gated = arguments
    hidden, update = hidden.contiguous(), None if update is None else update.contiguous()
    q_norm, k_norm, cos, sin = (t.contiguous() for t in (q_norm, k_norm, cos, sin))
    gpu = gpu or kernel_gpu(hidden)
    ptx = ptx_of(gpu)
    _, kv_heads, context, head_dim = key.shape
    heads = arguments.heads
    groups = triton.next_power_of_2(heads // kv_heads)
    splits = splits_of(gpu, kv_heads)
    summed, qkv = torch.empty_like(hidden), hidden.new_empty(weight.shape[0])
    arrivals = torch.empty(triton.next_power_of_2(kv_heads), dtype=torch.int32, device=hidden.device)
    ahead = (position, key, value)
    submit(_matvec(hidden, update, norm, weight, scale, None, summed, qkv, arrivals, eps, gpu, ahead))
    out, new = hidden.new_empty(1, 1, heads * head_dim), hidden.new_empty(2, 1, kv_heads, 1, head_dim)
    partial = torch.empty(splits + 1, heads, head_dim, dtype=torch.float32, device=hidden.device)
    logs = torch.empty(splits + 1, heads, dtype=torch.float32, device=hidden.device)
    attention = Launch(
        moe_one_token_attention,
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
            "log_ptr": logs,
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
            "AT_ONCE": max(1, min(MAX_AT_ONCE, MAX_CELLS // (groups * head_dim))),
            "EARLY": context > splits * POSITIONS and POSITIONS * head_dim <= EARLY_CELLS,
            "GATED": gated,
            "PTX": ptx,
        },
        num_warps=8,
    )
    submit(attention)
    return summed, out, new


def run_one_token_router(
    arguments: RouteArguments, *, gpu: Gpu | None = None, submit: Callable[[Launch], None] = Launch.run
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two launches; `gpu` and `submit` as in `experts.plan.run_fused_experts`."""
    gpu = gpu or kernel_gpu(arguments.x)
    routing, results = _routing(arguments, gpu, submit)
    submit(routing)
    return results


def run_one_token_shared_router(
    arguments: SharedRouteArguments, *, gpu: Gpu | None = None, submit: Callable[[Launch], None] = Launch.run
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Two launches; `gpu` and `submit` as in `experts.plan.run_fused_experts`."""
    gpu = gpu or kernel_gpu(arguments.x)
    routing, results = _routing(arguments.route, gpu, submit)
    return *results, *_submit_shared(arguments, routing, True, submit)


def run_one_token_shared_logits(
    arguments: SharedRouteArguments, *, gpu: Gpu, submit: Callable[[Launch], None] = Launch.run
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Two launches. The results of `run_one_token_logits`, and the last two of `one_token_shared_router`."""
    logits, results = _logits(arguments.route, gpu, submit)
    return *results, *_submit_shared(arguments, logits, False, submit)


def _submit_shared(
    arguments: SharedRouteArguments, routing: Launch, chooses: bool, submit: Callable[[Launch], None]
) -> tuple[Tensor, Tensor]:
    """Submits a launch of the router with the first half of the shared expert; returns the results of that half."""
    gate_up, scale, width = arguments[-3:]
    residual = arguments.residual
    shared, share = residual.new_empty(1, width), residual.new_empty(1, 1, dtype=torch.float32)
    rows = routing.constexprs["BLOCK_E"]
    steps, block = _pieces(gate_up, 2 * rows, routing.num_warps)
    (programs,) = routing.grid
    unused = routing.args["logits_ptr"]
    launch = Launch(
        moe_one_token_shared_router,
        (programs + -(-width // rows) + 1,),
        {
            **({} if chooses else {"arrivals_ptr": unused, "weights_ptr": unused, "ids_ptr": unused}),
            **routing.args,
            "gate_up_ptr": gate_up,
            "gate_up_scale_ptr": gate_up if scale is None else scale,
            "shared_ptr": shared,
            "share_ptr": share,
        },
        {
            **({} if chooses else {"E_POW2": 1, "TOP_K": 1, "RANK_BLOCK": 1}),
            **routing.constexprs,
            "S": width,
            "N": gate_up.shape[0],
            "BLOCK_S": rows,
            "SHARED_STEPS": steps,
            "SHARED_BLOCK": block,
            "HAS_OWN_GATE": arguments.has_own_gate,
            "HAS_SCALE": scale is not None,
            "CHOOSES": chooses,
        },
        num_warps=routing.num_warps,
    )
    submit(launch)
    return shared, share


def run_one_token_logits(
    arguments: RouteArguments, *, gpu: Gpu, submit: Callable[[Launch], None] = Launch.run
) -> tuple[Tensor, Tensor, Tensor]:
    """Two launches. The first two results of `one_token_router`, and the logits of its choice, fp32 [E]."""
    launch, results = _logits(arguments, gpu, submit)
    submit(launch)
    return results


def _logits(
    arguments: RouteArguments, gpu: Gpu, submit: Callable[[Launch], None]
) -> tuple[Launch, tuple[Tensor, Tensor, Tensor]]:
    """Submits the output projection; returns the launch of the logits, and the results of `run_one_token_logits`."""
    norm, router, _, eps = arguments[4:]
    ptx = ptx_of(gpu)
    experts, hidden = router.shape
    out, normed = _project(arguments, None, gpu, submit)
    logits = torch.empty(experts, dtype=torch.float32, device=out.device)
    rows = logits_tile(experts, hidden)
    steps, block_h = row_pieces(hidden, router.dtype.itemsize)
    launch = Launch(
        moe_one_token_logits,
        (-(-experts // rows),),
        {"x_ptr": out, "norm_ptr": norm, "w_ptr": router, "normed_ptr": normed, "logits_ptr": logits},
        {
            "EPS": eps,
            "H": hidden,
            "E": experts,
            "BLOCK_E": rows,
            "STEPS": steps,
            "BLOCK_H": block_h,
            "PTX": ptx,
        },
        num_warps=rows,
    )
    return launch, (out, normed, logits)


def logits_tile(experts: int, hidden: int) -> int:
    """Experts of a program of `moe_one_token_logits`, and its warps: a row for each warp, and few warps to wait for."""
    return 2 if hidden <= 2048 else 4 if experts <= 128 else 8


def _project(
    arguments: RouteArguments, arrivals: Tensor | None, gpu: Gpu, submit: Callable[[Launch], None]
) -> tuple[Tensor, Tensor]:
    """Submits the output projection; returns its result plus the residual, and room for the norm, bf16 [1, H]."""
    x, weight, scale, residual, *_, eps = arguments
    x, residual = x.contiguous(), residual.contiguous()
    out, normed = torch.empty_like(residual), residual.new_empty(1, residual.shape[-1])
    submit(_matvec(x, None, None, weight, scale, residual, out, out, arrivals, eps, gpu))
    return out, normed


def _routing(
    arguments: RouteArguments, gpu: Gpu, submit: Callable[[Launch], None]
) -> tuple[Launch, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Submits the output projection; returns the router's launch, and the results of `one_token_router`."""
    norm, router, top_k, eps = arguments[4:]
    ptx = ptx_of(gpu)
    (experts, hidden), device = router.shape, arguments.x.device
    arrivals = torch.empty(1, dtype=torch.int32, device=device)
    out, normed = _project(arguments, arrivals, gpu, submit)
    weights = torch.empty(1, top_k, dtype=torch.float32, device=device)
    ids = torch.empty(1, top_k, dtype=torch.int64, device=device)
    steps, block_h = row_pieces(hidden, router.dtype.itemsize)
    # A row for each warp. In the last program, a thread compares its experts with all others: with two of 256 experts,
    # it takes all registers, and the program cannot start beside the launch before.
    rows = 4 if experts <= 128 else 8
    routing = Launch(
        moe_one_token_router,
        (-(-experts // rows),),
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
            "BLOCK_E": rows,
            "STEPS": steps,
            "BLOCK_H": block_h,
            "RANK_BLOCK": min(32, triton.next_power_of_2(experts)),
            "PTX": ptx,
        },
        num_warps=rows,
    )
    return routing, (out, normed, weights, ids)


def _pieces(weight: Tensor, rows: int, num_warps: int = 4) -> tuple[int, int]:
    """`row_pieces` of a matrix, at most as many as a program of so many rows holds in registers."""
    steps, piece = row_pieces(weight.shape[1], weight.dtype.itemsize)
    return min(steps, max(1, MAX_CELLS // 4 * num_warps // (piece * rows))), piece


def row_pieces(columns: int, itemsize: int) -> tuple[int, int]:
    """Number of pieces of a row, a power of two, and columns of a piece: 16 bytes for each thread of a warp."""
    piece = min(512 // itemsize, triton.next_power_of_2(columns))
    return triton.next_power_of_2(-(-columns // piece)), piece


def splits_of(gpu: Gpu, kv_heads: int) -> int:
    """Number of parts of the cache for each head, a power of two: a program for each multiprocessor.

    So many parts pay off for long contexts, and cost nothing for short ones, because programs without positions end.
    """
    most = max(1, min(MAX_SPLITS, gpu.num_sms // kv_heads))
    return 1 << (most.bit_length() - 1)


def matvec_tile(n: int, itemsize: int, gpu: Gpu) -> MatvecTile:
    """Sizes of `moe_one_token_matvec` for n rows: few programs, each of which prepares the input, that fill a GPU."""
    if itemsize == 1 and gpu.num_sms // 2 < -(-n // 16) <= gpu.num_sms:
        return MatvecTile(16, 8, 4096)
    rows = 8 if n > 4096 else 4
    return MatvecTile(rows, 4, MAX_CELLS // rows)


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
    gpu: Gpu,
    ahead: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Launch:
    """weight @ norm(x + add) * scale + residual. For arguments that are None, a tensor that the kernel never reads."""
    n, k = weight.shape
    tile = matvec_tile(n, weight.dtype.itemsize, gpu)
    block_n = tile.rows
    steps, block_k = row_pieces(k, weight.dtype.itemsize)
    steps = min(steps, max(1, tile.columns // block_k))
    return Launch(
        moe_one_token_matvec,
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
            "PTX": ptx_of(gpu),
        },
        num_warps=tile.num_warps,
    )
