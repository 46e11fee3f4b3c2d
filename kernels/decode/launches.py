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
"""Most parts of the positions. Their combination is unrolled: 32 take Triton 3 s to compile, 64 take 15 s."""
MAX_PART_CELLS = 32768
"""Numbers of all parts that the last program of attention combines."""


class MatvecTile(NamedTuple):
    """Rows of a program of `moe_one_token_matvec`, its warps, and most numbers of a row that it loads at once.

    halves: int8 weights are multiplied by 16-bit activations, and not by each of their bytes.
    first_wave: programs that start early, and ask L2 for the weights of the others too; 0: they do not.
    """

    rows: int
    num_warps: int
    columns: int
    halves: bool = False
    first_wave: int = 0


class AttentionTile(NamedTuple):
    """Positions of a block of attention, warps, most parts, and parts that are combined at once (0: all).

    early: a block is loaded before the one before it is used.
    """

    positions: int = POSITIONS
    num_warps: int = 8
    max_splits: int = MAX_SPLITS
    combined: int = 0
    early: bool = False
    programs_per_sm: int = 1
    stages: int = 0


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
    tile = attention_tile(context)
    splits = splits_of(gpu, kv_heads, groups * head_dim, tile)
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
            "BLOCK_T": tile.positions,
            "COMBINED": tile.combined,
            "EARLY": tile.early,
            "STAGES": tile.stages,
            "GATED": gated,
            "PTX": ptx,
        },
        num_warps=tile.num_warps,
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


def run_one_token_logits(
    arguments: RouteArguments, *, gpu: Gpu, submit: Callable[[Launch], None] = Launch.run
) -> tuple[Tensor, Tensor, Tensor]:
    """Two launches. The first two results of `one_token_router`, and the logits of its choice, fp32 [E]."""
    norm, router, _, eps = arguments[4:]
    ptx = ptx_of(gpu)
    experts, hidden = router.shape
    out, normed = _project(arguments, None, ptx, submit)
    logits = torch.empty(experts, dtype=torch.float32, device=out.device)
    rows, num_warps = logits_tile(experts)
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
        num_warps=num_warps,
    )
    submit(launch)
    return out, normed, logits


def logits_tile(experts: int) -> tuple[int, int]:
    """Experts of a program of `moe_one_token_logits`, and its warps."""
    rows = 4 if experts <= 128 else 8
    return rows, rows


def _project(
    arguments: RouteArguments, arrivals: Tensor | None, ptx: int, submit: Callable[[Launch], None]
) -> tuple[Tensor, Tensor]:
    """Submits the output projection; returns its result plus the residual, and room for the norm, bf16 [1, H]."""
    x, weight, scale, residual, *_, eps = arguments
    x, residual = x.contiguous(), residual.contiguous()
    out, normed = torch.empty_like(residual), residual.new_empty(1, residual.shape[-1])
    submit(_matvec(x, None, None, weight, scale, residual, out, out, arrivals, eps, ptx))
    return out, normed


def _routing(
    arguments: RouteArguments, gpu: Gpu, submit: Callable[[Launch], None]
) -> tuple[Launch, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Submits the output projection; returns the router's launch, and the results of `one_token_router`."""
    norm, router, top_k, eps = arguments[4:]
    ptx = ptx_of(gpu)
    (experts, hidden), device = router.shape, arguments.x.device
    arrivals = torch.empty(1, dtype=torch.int32, device=device)
    out, normed = _project(arguments, arrivals, ptx, submit)
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


def attention_tile(context: int) -> AttentionTile:
    """Sizes of attention over a cache of `context` positions."""
    return AttentionTile()


def splits_of(gpu: Gpu, kv_heads: int, width: int, tile: AttentionTile = AttentionTile()) -> int:
    """Number of parts of the cache for each head, a power of two: a program for each multiprocessor.

    At most as many as the last program can combine; it reads `width` numbers of each part that has positions. So many
    parts pay off for long contexts, and cost nothing for short ones.
    """
    most = max(
        1,
        min(
            tile.max_splits,
            MAX_PART_CELLS * (1 if not tile.combined else 4) // width,
            gpu.num_sms * tile.programs_per_sm // kv_heads,
        ),
    )
    return 1 << (most.bit_length() - 1)


def matvec_tile(n: int, itemsize: int) -> MatvecTile:
    """Sizes of `moe_one_token_matvec` for a matrix of n rows: programs that fill a large GPU, 128 weights a thread."""
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
    ptx: int,
    ahead: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Launch:
    """weight @ norm(x + add) * scale + residual. For arguments that are None, a tensor that the kernel never reads."""
    n, k = weight.shape
    tile = matvec_tile(n, weight.dtype.itemsize)
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
            "HALVES": tile.halves,
            "FIRST_WAVE": tile.first_wave,
            "PTX": ptx,
        },
        num_warps=tile.num_warps,
    )
