"""The operators for one token as launches of the kernels in kernels.py and shared_kernels.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
from torch import Tensor

from executorch_moe.kernels.gpus import Gpu
from executorch_moe.kernels.launch import Launch, kernel_gpu, ptx_of

from .arguments import AttentionArguments, RouteArguments, SharedRouteArguments
from .kernels import moe_one_token_attention, moe_one_token_matvec, moe_one_token_router
from .shared_kernels import moe_one_token_shared_router

POSITIONS = 128
"""Positions that a program of attention handles at a time."""
MAX_CELLS = 16384
"""Numbers that a program can hold in registers at a time."""
MAX_SPLITS = 32
"""Most parts of the positions. Their combination is unrolled: 32 take Triton 3 s to compile, 64 take 15 s."""
MAX_PART_CELLS = 32768
"""Numbers of all parts that the last program of attention combines."""


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
    submit(_matvec(x, None, None, weight, scale, None, out, out, None, 0.0, ptx_of(gpu or kernel_gpu(x))))
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
    submit(
        _matvec(hidden, update, norm, weight, scale, None, summed, out, None, eps, ptx_of(gpu or kernel_gpu(hidden)))
    )
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
    splits = splits_of(gpu, kv_heads, groups * head_dim)
    summed, qkv = torch.empty_like(hidden), hidden.new_empty(weight.shape[0])
    arrivals = torch.empty(triton.next_power_of_2(kv_heads), dtype=torch.int32, device=hidden.device)
    ahead = (position, key, value)
    submit(_matvec(hidden, update, norm, weight, scale, None, summed, qkv, arrivals, eps, ptx, ahead))
    out, new = hidden.new_empty(1, 1, heads * head_dim), hidden.new_empty(2, 1, kv_heads, 1, head_dim)
    partial = torch.empty(splits + 1, heads, head_dim, dtype=torch.float32, device=hidden.device)
    maxima = torch.empty(splits + 1, heads, dtype=torch.float32, device=hidden.device)
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
    gate_up, scale, width = arguments[-3:]
    routing, results = _routing(arguments.route, gpu or kernel_gpu(arguments.x), submit)
    out, weights = results[0], results[2]
    shared, share = out.new_empty(1, width), torch.empty_like(weights[:, :1])
    rows = routing.constexprs["BLOCK_E"]
    steps, block = _pieces(gate_up, 2 * rows, routing.num_warps)
    (programs,) = routing.grid
    launch = Launch(
        moe_one_token_shared_router,
        (programs + -(-width // rows) + 1,),
        {
            **routing.args,
            "gate_up_ptr": gate_up,
            "gate_up_scale_ptr": gate_up if scale is None else scale,
            "shared_ptr": shared,
            "share_ptr": share,
        },
        {
            **routing.constexprs,
            "S": width,
            "N": gate_up.shape[0],
            "BLOCK_S": rows,
            "SHARED_STEPS": steps,
            "SHARED_BLOCK": block,
            "HAS_OWN_GATE": arguments.has_own_gate,
            "HAS_SCALE": scale is not None,
        },
        num_warps=routing.num_warps,
    )
    submit(launch)
    return *results, shared, share


def _routing(
    arguments: RouteArguments, gpu: Gpu, submit: Callable[[Launch], None]
) -> tuple[Launch, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Submits the output projection; returns the router's launch, and the results of `one_token_router`."""
    x, weight, scale, residual, norm, router, top_k, eps = arguments
    x, residual = x.contiguous(), residual.contiguous()
    ptx = ptx_of(gpu)
    (experts, hidden), device = router.shape, x.device
    out, normed = torch.empty_like(residual), residual.new_empty(1, hidden)
    arrivals = torch.empty(1, dtype=torch.int32, device=device)
    submit(_matvec(x, None, None, weight, scale, residual, out, out, arrivals, eps, ptx))
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


def splits_of(gpu: Gpu, kv_heads: int, width: int) -> int:
    """Number of parts of the cache for each head, a power of two: a program for each multiprocessor.

    At most as many as the last program can combine; it reads `width` numbers of each part that has positions. So many
    parts pay off for long contexts, and cost nothing for short ones.
    """
    most = max(1, min(MAX_SPLITS, MAX_PART_CELLS // width, gpu.num_sms // kv_heads))
    return 1 << (most.bit_length() - 1)


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
    """weight @ norm(x + add) * scale + residual. For arguments that are None, a tensor that the kernel never reads."""
    n, k = weight.shape
    # Rows of a program: few enough that the programs fill a large GPU. Weights of a chunk: 128 per thread.
    block_n = 8 if n > 4096 else 4
    steps, block_k = _pieces(weight, block_n)
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
            "PTX": ptx,
        },
    )
