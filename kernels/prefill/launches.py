"""The operators for several tokens as launches of the kernels in kernels.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from executorch_moe.kernels.gpus import Gpu
from executorch_moe.kernels.launch import Launch, kernel_gpu, ptx_of

from .arguments import CachedAttentionArguments, HeadsArguments
from .kernels import moe_cached_attention, moe_residual_norm, moe_rotated_heads, moe_top_experts

HEADS_BLOCK = 16
"""Tokens that a program of `moe_rotated_heads` handles."""


ROUTER_BLOCK = 8
"""Tokens that a program of `moe_top_experts` handles."""


class AttentionTile(NamedTuple):
    """Tile of `moe_cached_attention`.

    Attributes:
        rows: query heads of a program. positions: of the cache at a time. stages: blocks of positions in flight.
        num_warps: of a program.
    """

    rows: int
    positions: int
    stages: int
    num_warps: int


def attention_tile(gpu: Gpu, head_dim: int) -> AttentionTile:
    """The tile for a GPU: its blocks fit shared memory, and the accumulator the registers (tests hold both).

    Measured on an H100 only, at 512 to 16,384 tokens: docs/prefill.md.
    """
    if gpu.max_shared >= 200_000:
        if head_dim == 256:
            return AttentionTile(128, 32, 3, 8)
        return AttentionTile(128, 64, 3, 8) if head_dim == 128 else AttentionTile(64, 64, 3, 4)
    if head_dim == 256:
        return AttentionTile(64, 32, 2, 8)
    return AttentionTile(128, 64, 2, 8)


def run_residual_norm(
    hidden: Tensor,
    update: Tensor,
    norm: Tensor,
    eps: float,
    *,
    gpu: Gpu | None = None,
    submit: Callable[[Launch], None] = Launch.run,
) -> tuple[Tensor, Tensor]:
    """One launch; `gpu` and `submit` as in `experts.plan.run_fused_experts`."""
    hidden, update, norm = hidden.contiguous(), update.contiguous(), norm.contiguous()
    summed, normed = torch.empty_like(hidden), torch.empty_like(hidden)
    launch = Launch(
        moe_residual_norm,
        (hidden.shape[1],),
        {"hidden_ptr": hidden, "update_ptr": update, "norm_ptr": norm, "sum_ptr": summed, "normed_ptr": normed},
        {
            "EPS": eps,
            "H": hidden.shape[2],
            "BLOCK_H": triton.next_power_of_2(hidden.shape[2]),
            "PTX": ptx_of(gpu or kernel_gpu(hidden)),
        },
    )
    submit(launch)
    return summed, normed


def run_rotated_heads(
    arguments: HeadsArguments, *, gpu: Gpu | None = None, submit: Callable[[Launch], None] = Launch.run
) -> tuple[Tensor, Tensor]:
    """One launch; `gpu` and `submit` as in `experts.plan.run_fused_experts`."""
    qkv, q_norm, k_norm, cos, sin, kv_heads, eps = arguments
    qkv, q_norm, k_norm, cos, sin = (t.contiguous() for t in (qkv, q_norm, k_norm, cos, sin))
    tokens, head_dim = qkv.shape[1], q_norm.numel()
    heads = qkv.shape[2] // head_dim - 2 * kv_heads
    query, new = qkv.new_empty(1, tokens, heads, head_dim), qkv.new_empty(2, 1, kv_heads, tokens, head_dim)
    rotation = Launch(
        moe_rotated_heads,
        (_blocks(tokens, HEADS_BLOCK), heads + 2 * kv_heads),
        {
            "qkv_ptr": qkv,
            "q_norm_ptr": q_norm,
            "k_norm_ptr": k_norm,
            "cos_ptr": cos,
            "sin_ptr": sin,
            "query_ptr": query,
            "new_ptr": new,
            "T": tokens,
        },
        {
            "EPS": eps,
            "HEADS": heads,
            "KV_HEADS": kv_heads,
            "HALF": head_dim // 2,
            "BLOCK_T": HEADS_BLOCK,
            "PTX": ptx_of(gpu or kernel_gpu(qkv)),
        },
    )
    submit(rotation)
    return query, new


def run_cached_attention(
    arguments: CachedAttentionArguments,
    *,
    tile: AttentionTile | None = None,
    gpu: Gpu | None = None,
    submit: Callable[[Launch], None] = Launch.run,
) -> Tensor:
    """One launch; `gpu` and `submit` as in `experts.plan.run_fused_experts`. tile: None for `attention_tile`'s."""
    query, key, value, visible, scaling = arguments
    query, visible = query.contiguous(), visible.contiguous()
    _, tokens, heads, head_dim = query.shape
    _, kv_heads, context, _ = key.shape
    gpu = gpu or kernel_gpu(query)
    tile = tile or attention_tile(gpu, head_dim)
    out = torch.empty_like(query)
    attention = Launch(
        moe_cached_attention,
        (kv_heads, _blocks(tokens * (heads // kv_heads), tile.rows)),
        {"query_ptr": query, "key_ptr": key, "value_ptr": value, "visible_ptr": visible, "out_ptr": out, "T": tokens},
        {
            "SCALING": scaling,
            "C": context,
            "KV_HEADS": kv_heads,
            "GROUPS": heads // kv_heads,
            "D": head_dim,
            "HAS_FIRST": visible.shape[1] == 2,
            "BLOCK_M": tile.rows,
            "BLOCK_N": tile.positions,
            "STAGES": tile.stages,
            "PTX": ptx_of(gpu),
        },
        num_warps=tile.num_warps,
    )
    submit(attention)
    return out


def run_top_experts(
    logits: Tensor, top_k: int, *, gpu: Gpu | None = None, submit: Callable[[Launch], None] = Launch.run
) -> tuple[Tensor, Tensor]:
    """One launch; `gpu` and `submit` as in `experts.plan.run_fused_experts`."""
    logits = logits.contiguous()
    tokens, experts = logits.shape
    weights = logits.new_empty(tokens, top_k, dtype=torch.float32)
    ids = logits.new_empty(tokens, top_k, dtype=torch.int64)
    choice = Launch(
        moe_top_experts,
        (_blocks(tokens, ROUTER_BLOCK),),
        {"logits_ptr": logits, "weights_ptr": weights, "ids_ptr": ids, "T": tokens},
        {
            "E": experts,
            "E_POW2": triton.next_power_of_2(experts),
            "TOP_K": top_k,
            "K_POW2": triton.next_power_of_2(top_k),
            "BLOCK_T": ROUTER_BLOCK,
            "PTX": ptx_of(gpu or kernel_gpu(logits)),
        },
    )
    submit(choice)
    return weights, ids


def _blocks(size: int, block: int) -> int:
    return (size + block - 1) // block
