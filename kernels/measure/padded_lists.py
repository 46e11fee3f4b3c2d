"""Our routing for grouped GEMMs of other libraries, which take lists padded to whole row blocks and do not sum pairs.

Times of a layer are then comparable with ours: the same tokens, routing and weights, and no unneeded launches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from executorch_moe.kernels._device import launches_before, to_bf16
from executorch_moe.kernels.arguments import ExpertArguments
from executorch_moe.kernels.experts.problem import Problem
from executorch_moe.kernels.experts.routing import Heights, max_row_blocks, run_routing
from executorch_moe.kernels.gpus import Gpu
from executorch_moe.kernels.launch import Launch


class PaddedLists(NamedTuple):
    """Pairs by expert, in blocks of `block_m` rows.

    Attributes:
        pair_ids: int32 [blocks * block_m]; the number of pairs in padded rows.
        block_expert: int32 [blocks]. num_rows: int32 [1], rows of all blocks in use, padding included.
    """

    pair_ids: Tensor
    block_expert: Tensor
    num_rows: Tensor


@triton.jit
def pad_row_blocks(
    sorted_pair_ids_ptr,  # int32 [P]
    expert_offsets_ptr,  # int32 [E + 1]
    block_expert_ptr,  # int32 [max row blocks]
    block_row_ptr,  # int32 [max row blocks]
    num_row_blocks_ptr,  # int32 [1]
    padded_ptr,  # int32 [max row blocks * BLOCK_M]
    num_rows_ptr,  # int32 [1]
    num_pairs, BLOCK_M: tl.constexpr, LANES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Program b copies the pairs of row block b; LANES is BLOCK_M rounded up to a power of two."""
    zero = launches_before(False, PTX)
    sorted_pair_ids_ptr += zero
    expert_offsets_ptr += zero
    block_expert_ptr += zero
    block_row_ptr += zero
    num_row_blocks_ptr += zero
    block = tl.program_id(0)
    num_row_blocks = tl.load(num_row_blocks_ptr)
    if block == 0:
        tl.store(num_rows_ptr + zero, num_row_blocks * BLOCK_M)
    if block < num_row_blocks:
        end = tl.load(expert_offsets_ptr + tl.load(block_expert_ptr + block) + 1)
        lane = tl.arange(0, LANES)
        row = tl.load(block_row_ptr + block) + lane
        pair = tl.load(sorted_pair_ids_ptr + row, mask=(row < end) & (lane < BLOCK_M), other=num_pairs)
        tl.store(padded_ptr + zero + block * BLOCK_M + lane, pair, mask=lane < BLOCK_M)


@triton.jit
def sum_weighted_pairs(
    y_ptr,  # bf16 [P, H]
    weights_ptr,  # fp32 [P]
    out_ptr,  # bf16 [T, H]
    H: tl.constexpr, TOP_K: tl.constexpr, BLOCK_H: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Weighted sum of a token's top_k pairs, in fp32."""
    zero = launches_before(False, PTX)
    y_ptr += zero
    weights_ptr += zero
    token = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = offs < H
    acc = tl.zeros((BLOCK_H,), dtype=tl.float32)
    for slot in tl.static_range(TOP_K):
        weight = tl.load(weights_ptr + token * TOP_K + slot)
        acc += weight * tl.load(y_ptr + (token * TOP_K + slot) * H + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + zero + token * H + offs, to_bf16(acc, PTX), mask=mask)


def padded_lists(
    arguments: ExpertArguments, block_m: int, gpu: Gpu, ptx: int, submit: Callable[[Launch], None] = Launch.run_now
) -> PaddedLists:
    """Routes tokens: two launches for few pairs, else three.

    Args:
        arguments: of the layer; all ids must be in [0, E).
        block_m: rows of a block.
        gpu, ptx: as for `Problem`. submit: called with each launch.
    """
    p = Problem(arguments, gpu, ptx, submit=submit)
    routing = run_routing(p, Heights(block_m))
    blocks = max_row_blocks(p.num_pairs, p.num_experts, block_m)
    lists = PaddedLists(p.empty((blocks * block_m,), torch.int32), routing.block_expert, p.empty((1,), torch.int32))
    submit(
        Launch(
            pad_row_blocks,
            (blocks,),
            {
                **routing.pointers(),
                "padded_ptr": lists.pair_ids,
                "num_rows_ptr": lists.num_rows,
                "num_pairs": p.num_pairs,
            },
            {"BLOCK_M": block_m, "LANES": triton.next_power_of_2(block_m), "PTX": ptx},
        )
    )
    return lists


def weighted_sum(y: Tensor, weights: Tensor, ptx: int, submit: Callable[[Launch], None] = Launch.run_now) -> Tensor:
    """One launch: y bf16 [T * top_k, H] and weights fp32 [T, top_k] -> bf16 [T, H]."""
    (tokens, top_k), h = weights.shape, y.shape[1]
    out = y.new_empty(tokens, h)
    block_h = min(1024, triton.next_power_of_2(h))
    submit(
        Launch(
            sum_weighted_pairs,
            (tokens, triton.cdiv(h, block_h)),
            {"y_ptr": y, "weights_ptr": weights, "out_ptr": out},
            {"H": h, "TOP_K": top_k, "BLOCK_H": block_h, "PTX": ptx},
        )
    )
    return out
