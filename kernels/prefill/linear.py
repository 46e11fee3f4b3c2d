"""`prompt_linear` as launches of the kernels in linear_kernels.py, with a tile that depends on the number of tokens.

A program for any number of tokens has a launch of each tile, and the grids of all but one are empty: the host code
leaves such launches out.

Letters: T tokens, N out, K in.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from executorch_moe.kernels.gpus import Gpu
from executorch_moe.kernels.launch import Launch, kernel_gpu, ptx_of

from .linear_kernels import moe_prompt_linear, moe_weights_to_bf16

CONVERTED = 8192
"""Weights that a program of `moe_weights_to_bf16` converts."""
GROUP = 8
"""Row blocks whose tiles run one after the other, so that their weights stay in the L2 cache."""
LIMIT = 1 << 31
"""More tokens than any prompt has."""
STEP, ESTIMATED = 64, 4096
"""Numbers of tokens for which times are estimated: multiples of STEP up to ESTIMATED."""


class LinearTile(NamedTuple):
    """Tile of `moe_prompt_linear`.

    Attributes:
        tokens, columns: of the result. k: of a step. stages: steps in flight. num_warps: of a program.
        cost: time of a step, with as many programs as a multiprocessor has room for; relative to the other tiles.
    """

    tokens: int
    columns: int
    k: int
    stages: int
    num_warps: int
    cost: float


TILES = (
    LinearTile(64, 128, 64, 4, 4, 0.33),
    LinearTile(128, 128, 64, 4, 8, 0.44),
    LinearTile(128, 256, 64, 4, 8, 0.66),
)
"""By rising size. The costs are microseconds of a step on an H200, from o_proj of Qwen3-30B-A3B: docs/prefill.md."""
OTHER_TILES = (LinearTile(64, 64, 64, 3, 4, 0.3), LinearTile(128, 128, 64, 3, 8, 0.6))
"""For other GPUs than sm_90: not measured, and small enough for their shared memory."""


def run_prompt_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    *,
    tile: LinearTile | None = None,
    gpu: Gpu | None = None,
    submit: Callable[[Launch], None] = Launch.run,
) -> Tensor:
    """Launches for the conversion of int8 weights and the product; `gpu` and `submit` as in `run_fused_experts`.

    Args:
        x, weight, scale: see `op.prompt_linear`. tile: None for the best one of each number of tokens.
    """
    x = x.contiguous()
    gpu, (n, k) = gpu or kernel_gpu(x), weight.shape
    tokens = _tokens(x, k)
    out = x.new_empty(*x.shape[:-1], n)
    if weight.dtype == torch.int8:
        converted = torch.empty(n, k, dtype=torch.bfloat16, device=x.device)
        submit(_conversion(weight, converted, gpu))
        weight = converted
    tiles = ((tile, 0, LIMIT),) if tile is not None else tiles_of(gpu, n)
    for each, above, up_to in tiles:
        blocks = -(-tokens // each.tokens) * -(-n // each.columns)
        if isinstance(tokens, int):
            if not above < tokens <= up_to:
                continue
        else:  # 0 unless above < tokens <= up_to
            if above:
                blocks *= torch.sym_min(1, torch.sym_max(0, tokens - above))
            if up_to < LIMIT:
                blocks *= torch.sym_min(1, torch.sym_max(0, up_to + 1 - tokens))
        submit(_product(x, weight, scale, out, tokens, each, blocks, gpu))
    return out


@functools.lru_cache
def tiles_of(gpu: Gpu, n: int) -> tuple[tuple[LinearTile, int, int], ...]:
    """Tiles for N columns, each with the numbers of tokens that it takes: more than the second value, up to the third.

    Larger tiles take more tokens. Of all such divisions, the one is taken whose estimated times are nearest to those of
    the best tile, on average over numbers of tokens up to `ESTIMATED`.
    """
    tiles = TILES if gpu.capability == 90 else OTHER_TILES
    tokens = range(STEP, ESTIMATED + 1, STEP)
    times = [[_time(gpu, tile, n, t) for t in tokens] for tile in tiles]
    best = [min(row) for row in zip(*times, strict=True)]
    # losses[tile][i]: sum over the first i numbers of tokens
    losses = [[0.0, *itertools.accumulate(t / b for t, b in zip(row, best, strict=True))] for row in times]

    def loss(ends: tuple[int, ...]) -> float:
        return sum(loss[end] - loss[start] for loss, start, end in zip(losses, (0, *ends), (*ends, -1), strict=True))

    ends = min(itertools.combinations_with_replacement(range(len(tokens) + 1), len(tiles) - 1), key=loss)
    limits = (0, *(STEP * end for end in ends), LIMIT)
    return tuple(
        (tile, above, up_to) for tile, above, up_to in zip(tiles, limits, limits[1:], strict=False) if above < up_to
    )


def _tokens(x: Tensor, k: int) -> Any:
    return x.numel() // k


def _time(gpu: Gpu, tile: LinearTile, n: int, tokens: int) -> float:
    shared = tile.stages * tile.k * (tile.tokens + tile.columns) * 2
    together = max(1, min(2, gpu.max_shared // shared))  # programs of a multiprocessor
    programs = -(-tokens // tile.tokens) * -(-n // tile.columns)
    full, rest = divmod(programs, gpu.num_sms * together)
    # A second program on a multiprocessor takes two thirds of the time of the first.
    last = 0.0 if rest == 0 else 1.0 if rest <= gpu.num_sms else 5 / 3
    return tile.cost * (full * (5 / 3 if together == 2 else 1.0) + last)


def _conversion(weight: Tensor, out: Tensor, gpu: Gpu) -> Launch:
    return Launch(
        moe_weights_to_bf16,
        (-(-weight.numel() // CONVERTED),),
        {"w_ptr": weight, "out_ptr": out},
        {"SIZE": weight.numel(), "BLOCK": CONVERTED, "PTX": ptx_of(gpu)},
        num_warps=8,
    )


def _product(
    x: Tensor, weight: Tensor, scale: Tensor | None, out: Tensor, tokens: Any, tile: LinearTile, blocks: Any, gpu: Gpu
) -> Launch:
    n, k = weight.shape
    return Launch(
        moe_prompt_linear,
        (blocks,),
        {"x_ptr": x, "w_ptr": weight, "scale_ptr": weight if scale is None else scale, "out_ptr": out, "T": tokens},
        {
            "N": n,
            "K": k,
            "HAS_SCALE": scale is not None,
            "BLOCK_T": tile.tokens,
            "BLOCK_N": tile.columns,
            "BLOCK_K": tile.k,
            "GROUP": GROUP,
            "STAGES": tile.stages,
            "PTX": ptx_of(gpu),
        },
        num_warps=tile.num_warps,
    )
