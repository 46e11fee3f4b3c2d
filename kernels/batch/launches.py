"""`rows_linear`, `rows_attention` and `rows_router` as launches of the kernels in kernels.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from executorch_moe.kernels.gpus import Gpu
from executorch_moe.kernels.launch import Launch, kernel_gpu, ptx_of

from .arguments import RowsAttentionArguments
from .kernels import moe_rows_attention, moe_rows_linear, moe_rows_router

ROUTER_ROWS = 2
"""Rows that a program of the router handles."""
ROUTER_SPLITS = 16
"""Most parts of the router's product: its few columns alone would leave a GPU idle."""
POSITIONS = 64
"""Positions that a program of attention handles at a time."""
MAX_SPLITS = 32
"""Most parts of the positions. Their combination is unrolled: 32 take Triton 3 s to compile, 64 take 15 s."""
MAX_PART_CELLS = 32768
"""Numbers of all parts that the last program of attention combines."""
FEW_SPLITS = 8
"""Parts of the positions with which few rows of long texts fill a GPU, if many rows are possible."""
SHORT_WAVE = 3
"""A launch with at most this many programs a multiprocessor lets the next one start early."""


def run_rows_linear(
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
    submit(_linear(x, weight, scale, out, None, 1, gpu or kernel_gpu(x)))
    return out


def run_rows_attention(
    arguments: RowsAttentionArguments, *, gpu: Gpu | None = None, submit: Callable[[Launch], None] = Launch.run
) -> tuple[Tensor, Tensor]:
    """Two launches; `gpu` and `submit` as in `experts.plan.run_fused_experts`."""
    x, weight, scale, q_norm, k_norm, cos, sin, positions, slots, key, value, scaling, eps = arguments
    x, q_norm, k_norm, cos, sin, positions, slots = (
        t.contiguous() for t in (x, q_norm, k_norm, cos, sin, positions, slots)
    )
    gpu, rows = gpu or kernel_gpu(x), x.shape[1]
    num_slots, kv_heads, context, head_dim = key.shape
    heads = weight.shape[0] // head_dim - 2 * kv_heads
    groups = triton.next_power_of_2(heads // kv_heads)
    splits = splits_of(gpu, rows, kv_heads, groups * head_dim)
    arrivals = torch.empty(triton.next_power_of_2(rows * kv_heads), dtype=torch.int32, device=x.device)
    qkv = x.new_empty(rows, weight.shape[0])
    submit(_linear(x, weight, scale, qkv, arrivals, 1, gpu))
    out, new = x.new_empty(1, rows, heads * head_dim), x.new_empty(2, rows, kv_heads, 1, head_dim)
    partial = torch.empty(splits, rows, heads, head_dim, dtype=torch.float32, device=x.device)
    maxima = torch.empty(splits, rows, heads, dtype=torch.float32, device=x.device)
    attention = Launch(
        moe_rows_attention,
        (kv_heads, splits, rows),
        {
            "qkv_ptr": qkv,
            "q_norm_ptr": q_norm,
            "k_norm_ptr": k_norm,
            "cos_ptr": cos,
            "sin_ptr": sin,
            "position_ptr": positions,
            "slot_ptr": slots,
            "key_ptr": key,
            "value_ptr": value,
            "new_ptr": new,
            "partial_ptr": partial,
            "max_ptr": maxima,
            "sum_ptr": torch.empty_like(maxima),
            "arrivals_ptr": arrivals,
            "out_ptr": out,
            "T": rows,
            "S": num_slots,
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
            "BLOCK_N": POSITIONS if head_dim < 256 else POSITIONS // 2,
            "STAGES": 3 if gpu.max_shared >= 200_000 else 2,
            "PTX": ptx_of(gpu),
        },
    )
    submit(attention)
    return out, new


def run_rows_router(
    x: Tensor,
    router: Tensor,
    positions: Tensor,
    top_k: int,
    *,
    gpu: Gpu | None = None,
    submit: Callable[[Launch], None] = Launch.run,
) -> tuple[Tensor, Tensor]:
    """Two launches; `gpu` and `submit` as in `experts.plan.run_fused_experts`."""
    x, positions, gpu = x.contiguous(), positions.contiguous(), gpu or kernel_gpu(x)
    rows, (experts, hidden) = x.shape[1], router.shape
    splits = max(2, min(ROUTER_SPLITS, hidden // BLOCK_K))
    partial = torch.empty(splits, rows, experts, dtype=torch.float32, device=x.device)
    submit(_linear(x, router, None, partial, None, splits, gpu))
    weights = torch.empty(rows, top_k, dtype=torch.float32, device=x.device)
    ids = torch.empty(rows, top_k, dtype=torch.int64, device=x.device)
    choice = Launch(
        moe_rows_router,
        (-(-rows // ROUTER_ROWS),),
        {"partial_ptr": partial, "position_ptr": positions, "weights_ptr": weights, "ids_ptr": ids, "T": rows},
        {
            "SPLITS": splits,
            "E": experts,
            "E_POW2": triton.next_power_of_2(experts),
            "TOP_K": top_k,
            "K_POW2": triton.next_power_of_2(top_k),
            "BLOCK_T": ROUTER_ROWS,
            "PTX": ptx_of(gpu),
        },
    )
    submit(choice)
    return weights, ids


def splits_of(gpu: Gpu, rows: int, kv_heads: int, width: int) -> int:
    """Number of parts of a row's positions for each head, a power of two.

    Four programs for each multiprocessor with all rows, and at least `FEW_SPLITS` parts, because most rows may be
    empty; at most as many as the last program can combine, which reads `width` numbers of each part that has positions.
    """
    wanted = max(FEW_SPLITS, 4 * gpu.num_sms // (kv_heads * rows))
    return 1 << (max(1, min(wanted, MAX_SPLITS, MAX_PART_CELLS // width)).bit_length() - 1)


BLOCK_K = 128
"""Columns of a weight that a program multiplies at a time."""


def _linear(
    x: Tensor, weight: Tensor, scale: Tensor | None, out: Tensor, arrivals: Tensor | None, splits: int, gpu: Gpu
) -> Launch:
    """x @ weight.T * scale, or with several `splits` the parts of it."""
    n, k = weight.shape
    rows = x.numel() // k
    # Columns of a program: few enough that the programs fill the GPU, because each of them reads all of x.
    block_n = next((block for block in (64, 32) if -(-n // block) * splits >= gpu.num_sms), 16)
    constants: dict[str, Any] = {
        "N": n,
        "K": k,
        "NUM_ARRIVALS": 0 if arrivals is None else arrivals.shape[0],
        "HAS_SCALE": scale is not None,
        "SPLITS": splits,
        "BLOCK_T": max(16, triton.next_power_of_2(rows)),
        "BLOCK_N": block_n,
        "BLOCK_K": BLOCK_K,
        "STAGES": 4 if gpu.max_shared >= 160_000 else 3,
        "SHORT": -(-n // block_n) * splits <= SHORT_WAVE * gpu.num_sms,
        "PTX": ptx_of(gpu),
    }
    return Launch(
        moe_rows_linear,
        (-(-n // block_n), splits),
        {
            "x_ptr": x,
            "w_ptr": weight,
            "scale_ptr": weight if scale is None else scale,
            "out_ptr": out,
            "arrivals_ptr": out if arrivals is None else arrivals,
            "T": rows,
        },
        constants,
    )
