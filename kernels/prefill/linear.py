"""`prompt_linear` as launches of the kernels in linear_kernels.py, with a tile that depends on the number of tokens.

A program for any number of tokens has a launch of each tile, and the grids of all but one are empty: the host code
leaves such launches out.

Letters: T tokens, N out, K in.
"""

from __future__ import annotations

import math
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


class LinearTile(NamedTuple):
    """Tile of `moe_prompt_linear`.

    Attributes:
        tokens, columns: of the result. k: of a step. stages: steps in flight. num_warps: of a program.
        waves: the tile is taken while the launch has at most so many programs for each multiprocessor.
    """

    tokens: int
    columns: int
    k: int
    stages: int
    num_warps: int
    waves: float


TILES = (
    LinearTile(64, 64, 64, 5, 4, 1.25),
    LinearTile(64, 128, 64, 4, 4, 1.5),
    LinearTile(128, 128, 64, 3, 8, math.inf),
)
"""By rising size. On an H200 they take 4.6% longer than the best of 17 tiles each time, on average over six layers of
Qwen3-30B-A3B and Qwen3.5-35B-A3B and 32 to 4,096 tokens: docs/prefill.md."""


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
    tiles = [(tile, 0, LIMIT)] if tile is not None else tiles_of(gpu, n)
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


def tiles_of(gpu: Gpu, n: int) -> list[tuple[LinearTile, int, int]]:
    """Tiles for N columns. Each takes more tokens than the second value, and up to the third."""
    found, above = [], 0
    for tile in TILES:
        rows = LIMIT if tile.waves == math.inf else int(tile.waves * gpu.num_sms / -(-n // tile.columns))
        if (up_to := min(LIMIT, rows * tile.tokens)) > above:
            found.append((tile, above, up_to))
            above = up_to
    return found


def _tokens(x: Tensor, k: int) -> Any:
    return x.numel() // k


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
