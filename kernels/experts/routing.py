"""Routing on the device, without reads by the host: pairs sorted by expert, and the list of row blocks.

A pair is one (token, expert choice); pair i belongs to token i // top_k. Two launches, both deterministic:
  1. `moe_route_count`: each program counts the experts of one chunk of pairs. Skipped if there is only one chunk.
  2. `moe_route_scatter`: each program sums the counts of all chunks for the experts' offsets, and those of the chunks
     before its own for its first places. It ranks its pairs by comparing each with all earlier ones, and writes them to
     their places. The programs share the work of writing the row-block list.
The sort is stable. Pairs with an id outside [0, E) are not counted and appear in no list.

Worked example: top_k = 1, ids = [2, 0, 2, 9, 2], E = 3, BLOCK_M = 2
  sorted_pair_ids = [1, 0, 2, 4, -]   expert_offsets = [0, 1, 1, 4]
  row blocks: expert [0, 2, 2], first row [0, 1, 3], num_row_blocks = 3
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from executorch_moe.kernels._device import launches_before
from executorch_moe.kernels.launch import Launch
from executorch_moe.kernels.tuning.choose import MAX_PAIRS, Variant

from .problem import Problem, cdiv


@triton.jit
def valid_experts(ids, NUM_EXPERTS: tl.constexpr):
    """Expert ids as int32, -1 for pairs to drop. An id beyond 32 bits must not wrap into range.

    Takes ids instead of their address: torch takes a pointer for written if it is passed to a function whose result
    becomes part of the address of a store.
    """
    return tl.where((ids >= 0) & (ids < NUM_EXPERTS), ids, -1).to(tl.int32)


@triton.jit
def count_experts(ids, E_POW2: tl.constexpr):
    """int32 [E_POW2]: number of occurrences of each expert in `ids`."""
    return tl.histogram(tl.maximum(ids, 0), E_POW2, mask=ids >= 0)


@triton.jit
def moe_route_count(
    topk_ids_ptr,  # int32 or int64 [P]
    chunk_counts_ptr,  # int32 [num_chunks, E_POW2]
    num_pairs, NUM_EXPERTS: tl.constexpr, E_POW2: tl.constexpr, CHUNK: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Count the experts of chunk `program_id(0)`."""
    topk_ids_ptr += launches_before(False, PTX)
    chunk = tl.program_id(0)
    offs = chunk * CHUNK + tl.arange(0, CHUNK)
    ids = valid_experts(tl.load(topk_ids_ptr + offs, mask=offs < num_pairs, other=-1), NUM_EXPERTS)
    counts_ptr = chunk_counts_ptr + chunk.to(tl.int64) * E_POW2
    tl.store(counts_ptr + tl.arange(0, E_POW2), count_experts(ids, E_POW2))


@triton.jit
def moe_route_scatter(
    topk_ids_ptr,  # int32 or int64 [P]
    chunk_counts_ptr,  # int32 [num_chunks, E_POW2], not read if ONE_CHUNK
    sorted_pair_ids_ptr,  # int32 [P]
    expert_offsets_ptr,  # int32 [E + 1]
    block_expert_ptr,  # int32 [max row blocks]
    block_row_ptr,  # int32 [max row blocks]
    num_row_blocks_ptr,  # int32 [1]
    num_pairs, num_chunks,
    NUM_EXPERTS: tl.constexpr, E_POW2: tl.constexpr, CHUNK: tl.constexpr, ONE_CHUNK: tl.constexpr,
    COUNT_BLOCK: tl.constexpr, RANK_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, FEW: tl.constexpr, BLOCK_M_FEW: tl.constexpr, MANY: tl.constexpr, BLOCK_M_MANY: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """Place the pairs of chunk `program_id(0)` and write this program's share of the row-block list.

    A row block has BLOCK_M rows; BLOCK_M_FEW for up to FEW pairs, BLOCK_M_MANY for more than MANY. So programs that
    were exported for any number of tokens choose their tile height here.
    """
    zero = launches_before(False, PTX)
    topk_ids_ptr += zero
    chunk_counts_ptr += zero
    # With one chunk, the totals do not depend on the wait. The addresses of the stores must.
    sorted_pair_ids_ptr += zero
    expert_offsets_ptr += zero
    block_expert_ptr += zero
    block_row_ptr += zero
    num_row_blocks_ptr += zero
    chunk = tl.program_id(0)
    experts = tl.arange(0, E_POW2)
    offs = chunk * CHUNK + tl.arange(0, CHUNK)
    ids = valid_experts(tl.load(topk_ids_ptr + offs, mask=offs < num_pairs, other=-1), NUM_EXPERTS)
    if ONE_CHUNK:
        total = count_experts(ids, E_POW2)
        before = tl.zeros((E_POW2,), dtype=tl.int32)
    else:
        # A thread has the same experts in every chunk, so nothing is summed across threads.
        total = tl.zeros((E_POW2,), dtype=tl.int32)
        before = tl.zeros((E_POW2,), dtype=tl.int32)
        for first in range(0, num_chunks, COUNT_BLOCK):
            for i in tl.static_range(COUNT_BLOCK):
                other = first + i
                counts_ptr = chunk_counts_ptr + tl.cast(other, tl.int64) * E_POW2
                counts = tl.load(counts_ptr + experts, mask=other < num_chunks, other=0)
                total += counts
                before += tl.where(other < chunk, counts, 0)
    ends = tl.cumsum(total, axis=0)
    starts = ends - total

    # Rank: number of earlier pairs of the chunk with the same expert. RANK_BLOCK pairs at a time, because a comparison
    # of all with all would not fit the registers.
    rank = tl.zeros((CHUNK,), dtype=tl.int32)
    for first in tl.range(0, CHUNK, RANK_BLOCK, num_stages=4):
        earlier = chunk * CHUNK + first + tl.arange(0, RANK_BLOCK)
        others = valid_experts(tl.load(topk_ids_ptr + earlier, mask=earlier < num_pairs, other=-1), NUM_EXPERTS)
        same = (others[:, None] == ids[None, :]) & (earlier[:, None] < offs[None, :])
        rank += tl.sum(same.to(tl.int32), axis=0)
    place = tl.gather(starts + before, tl.maximum(ids, 0), axis=0)
    tl.store(sorted_pair_ids_ptr + place + rank, offs, mask=ids >= 0)

    block_m = tl.where(num_pairs <= FEW, BLOCK_M_FEW, tl.where(num_pairs > MANY, BLOCK_M_MANY, BLOCK_M))
    blocks = (total + block_m - 1) // block_m
    first_block = tl.cumsum(blocks, axis=0) - blocks
    if chunk == 0:
        tl.store(expert_offsets_ptr + experts, starts, mask=experts < NUM_EXPERTS)
        tl.store(expert_offsets_ptr + NUM_EXPERTS, tl.sum(total, axis=0))
        tl.store(num_row_blocks_ptr, tl.sum(blocks, axis=0))
    # Block b of every expert at once. The programs take turns, so that one hot expert does not make a long loop.
    for b in range(chunk, tl.max(blocks, axis=0), num_chunks):
        has = b < blocks
        tl.store(block_expert_ptr + first_block + b, experts, mask=has)
        tl.store(block_row_ptr + first_block + b, starts + b * block_m, mask=has)


@triton.jit
def leads_row_block(ids, expert, first_pair, NUM_EXPERTS: tl.constexpr, PAIRS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Routing for few pairs, which each program does for itself: whether pair `first_pair` leads a row block.

    The pairs of an expert, in order, form row blocks of BLOCK_M; the first pair of a block leads it.

    Args:
        ids: experts of all pairs, [PAIRS], padded with -1 to a power of two. expert: int64, that of `first_pair`.

    Returns:
        The number of earlier pairs with the same expert, and whether this pair leads.
    """
    same = valid_experts(ids, NUM_EXPERTS).to(tl.int64) == expert
    before = tl.sum((same & (tl.arange(0, PAIRS) < first_pair)).to(tl.int32), axis=0)
    return before, (expert >= 0) & (expert < NUM_EXPERTS) & (before % BLOCK_M == 0)


@triton.jit
def rows_of_leader(
    ids, expert, before, NUM_EXPERTS: tl.constexpr, PAIRS: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """The row block that a pair leads: its pairs, int32 [BLOCK_M], 0 where masked, and their mask."""
    same = valid_experts(ids, NUM_EXPERTS).to(tl.int64) == expert
    rank = tl.where(same, tl.cumsum(same.to(tl.int32), axis=0) - 1 - before, -1)
    chosen = rank[None, :] == tl.arange(0, BLOCK_M)[:, None]
    pair = tl.sum(tl.where(chosen, tl.arange(0, PAIRS)[None, :], 0), axis=1)
    return pair, tl.sum(chosen.to(tl.int32), axis=1) > 0


@dataclass
class Routing:
    """The lists that routing writes on the device; see routing.py."""

    sorted_pair_ids: Tensor
    expert_offsets: Tensor
    block_expert: Tensor
    block_row: Tensor
    num_row_blocks: Tensor

    def pointers(self) -> dict[str, Any]:
        """The lists by the parameter names of the kernels."""
        return {f"{name}_ptr": tensor for name, tensor in vars(self).items()}


def max_row_blocks(num_pairs: Any, num_experts: int, block_m: int) -> Any:
    """Upper bound of the number of row blocks for any routing: each expert may end in a partial block."""
    bound = num_pairs // block_m + num_experts
    return min(bound, num_pairs) if isinstance(num_pairs, int) else bound


def route_chunk(num_pairs: Any) -> int:
    """Number of pairs that one routing program ranks.

    One program for up to 256 pairs. Above, a balance between ranking a chunk, which is quadratic in its size, and
    summing the counts of all chunks, which each program does.
    """
    if not isinstance(num_pairs, int):
        return 256
    if num_pairs <= 256:
        return max(64, triton.next_power_of_2(num_pairs))
    return 256 if num_pairs <= 32768 else 512


@dataclass(frozen=True)
class Heights:
    """Rows of a row block: block_m; block_m_few for up to `few` pairs; block_m_many for more than `many` pairs."""

    block_m: int
    few: int = -1
    block_m_few: int = 8
    many: int = MAX_PAIRS
    block_m_many: int = 8

    @staticmethod
    def of(variants: tuple[Variant, ...]) -> Heights:
        """Heights for one, two or three variants."""
        heights = [v.gemm1.block_m for v in variants]
        if len(variants) == 1:
            return Heights(heights[0])
        if len(variants) == 2:
            return Heights(heights[1], variants[0].pairs_to, heights[0])
        few, middle, _ = variants
        return Heights(heights[1], few.pairs_to, heights[0], middle.pairs_to, heights[2])

    @property
    def least(self) -> int:
        """The smallest height that can occur; it gives the most row blocks."""
        found = [self.block_m]
        found += [self.block_m_few] if self.few >= 0 else []
        found += [self.block_m_many] if self.many < MAX_PAIRS else []
        return min(found)


def run_routing(p: Problem, heights: Heights) -> Routing:
    """Two launches, or one for few pairs. The row-block list is for tiles of these heights."""
    e_pow2 = max(32, triton.next_power_of_2(p.num_experts))
    chunk = route_chunk(p.num_pairs)
    num_chunks = cdiv(p.num_pairs, chunk)
    one_chunk = isinstance(num_chunks, int) and num_chunks == 1
    blocks = max_row_blocks(p.num_pairs, p.num_experts, heights.least)
    r = Routing(
        sorted_pair_ids=p.empty((p.num_pairs,), torch.int32),
        expert_offsets=p.empty((p.num_experts + 1,), torch.int32),
        block_expert=p.empty((blocks,), torch.int32),
        block_row=p.empty((blocks,), torch.int32),
        num_row_blocks=p.empty((1,), torch.int32),
    )
    shape = {"NUM_EXPERTS": p.num_experts, "E_POW2": e_pow2, "CHUNK": chunk, "PTX": p.ptx}
    counts = r.num_row_blocks
    if not one_chunk:
        counts = p.empty((num_chunks, e_pow2), torch.int32)
        p.submit(
            Launch(
                moe_route_count,
                (num_chunks,),
                {"topk_ids_ptr": p.topk_ids, "chunk_counts_ptr": counts, "num_pairs": p.num_pairs},
                shape,
            )
        )
    p.submit(
        Launch(
            moe_route_scatter,
            (num_chunks,),
            {
                "topk_ids_ptr": p.topk_ids,
                "chunk_counts_ptr": counts,
                **r.pointers(),
                "num_pairs": p.num_pairs,
                "num_chunks": num_chunks,
            },
            {
                **shape,
                "ONE_CHUNK": one_chunk,
                "COUNT_BLOCK": 16,
                "RANK_BLOCK": 32,
                "BLOCK_M": heights.block_m,
                "FEW": heights.few,
                "BLOCK_M_FEW": heights.block_m_few,
                "MANY": heights.many,
                "BLOCK_M_MANY": heights.block_m_many,
            },
            num_warps=8,
        )
    )
    return r
