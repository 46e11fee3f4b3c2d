"""Routing on the device: pairs sorted by expert, the list of row blocks and how many there are. No host read.

A pair is one (token, expert choice); pair i belongs to token i // top_k. Two launches, both deterministic:
  1. `moe_route_count`: each program counts the experts of one chunk of pairs.
  2. `moe_route_scatter`: each program sums the counts of all chunks (the total gives the experts' offsets, the chunks
     before its own its starting places), ranks its pairs in order, and writes them to their places. The programs share
     the writing of the row-block list.
The sort is stable. Pairs whose id lies outside [0, E) are counted nowhere and appear in no list.

Worked example: top_k = 1, ids = [2, 0, 2, 9, 2], E = 3, BLOCK_M = 2
  sorted_pair_ids = [1, 0, 2, 4, -]   expert_offsets = [0, 1, 1, 4]
  row blocks: expert [0, 2, 2], first row [0, 1, 3], num_row_blocks = 3
"""

from __future__ import annotations

import triton
import triton.language as tl

RANK_BLOCK = 64
"""Pairs ranked at once: a [RANK_BLOCK, E] one-hot lives in registers."""


@triton.jit
def moe_route_count(
    topk_ids_ptr,  # int32 or int64 [P]
    chunk_counts_ptr,  # int32 [num_chunks, E_POW2]
    num_pairs, NUM_EXPERTS: tl.constexpr, E_POW2: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Count the experts of chunk `program_id(0)`."""
    chunk = tl.program_id(0)
    offs = chunk * CHUNK + tl.arange(0, CHUNK)
    ids = tl.load(topk_ids_ptr + offs, mask=offs < num_pairs, other=-1)
    valid = (ids >= 0) & (ids < NUM_EXPERTS)
    counts = tl.histogram(tl.where(valid, ids, 0).to(tl.int32), E_POW2, mask=valid)
    tl.store(chunk_counts_ptr + chunk * E_POW2 + tl.arange(0, E_POW2), counts)


@triton.jit
def moe_route_scatter(
    topk_ids_ptr,  # int32 or int64 [P]
    chunk_counts_ptr,  # int32 [num_chunks, E_POW2]
    sorted_pair_ids_ptr,  # int32 [P]
    expert_offsets_ptr,  # int32 [E + 1]
    block_expert_ptr,  # int32 [max row blocks]
    block_row_ptr,  # int32 [max row blocks]
    num_row_blocks_ptr,  # int32 [1]
    num_pairs, num_chunks,
    NUM_EXPERTS: tl.constexpr, E_POW2: tl.constexpr, CHUNK: tl.constexpr, RANK_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, LIST_BLOCK: tl.constexpr,
):  # fmt: skip
    """Place the pairs of chunk `program_id(0)` and write this program's share of the row-block list."""
    chunk = tl.program_id(0)
    experts = tl.arange(0, E_POW2)
    total = tl.zeros((E_POW2,), dtype=tl.int32)
    before = tl.zeros((E_POW2,), dtype=tl.int32)
    for other in range(num_chunks):
        counts = tl.load(chunk_counts_ptr + other * E_POW2 + experts)
        total += counts
        before += tl.where(other < chunk, counts, 0)
    ends = tl.cumsum(total, axis=0)
    place = ends - total + before

    for start in range(0, CHUNK, RANK_BLOCK):
        offs = chunk * CHUNK + start + tl.arange(0, RANK_BLOCK)
        ids = tl.load(topk_ids_ptr + offs, mask=offs < num_pairs, other=-1)
        valid = (ids >= 0) & (ids < NUM_EXPERTS)
        ids = tl.where(valid, ids, -1).to(tl.int32)  # an id beyond 32 bits must not wrap into range
        hit = ids[:, None] == experts[None, :]
        one_hot = hit.to(tl.int32)
        rank = tl.cumsum(one_hot, axis=0) - 1
        row = tl.sum(one_hot * (rank + place[None, :]), axis=1)
        tl.store(sorted_pair_ids_ptr + row, offs, mask=valid)
        place += tl.sum(one_hot, axis=0)

    blocks = tl.cdiv(total, BLOCK_M)
    block_ends = tl.cumsum(blocks, axis=0)
    num_row_blocks = tl.sum(blocks, axis=0)
    if chunk == 0:
        tl.store(expert_offsets_ptr + experts, ends - total, mask=experts < NUM_EXPERTS)
        tl.store(expert_offsets_ptr + NUM_EXPERTS, tl.sum(total, axis=0))
        tl.store(num_row_blocks_ptr, num_row_blocks)
    for first in range(chunk * LIST_BLOCK, num_row_blocks, num_chunks * LIST_BLOCK):
        index = first + tl.arange(0, LIST_BLOCK)
        passed = (block_ends[None, :] <= index[:, None]).to(tl.int32)  # experts whose blocks all come before
        expert = tl.sum(passed, axis=1)
        mine = (experts[None, :] == expert[:, None]).to(tl.int32)
        first_row = tl.sum(mine * (ends - total)[None, :], axis=1)
        first_block = tl.sum(mine * (block_ends - blocks)[None, :], axis=1)
        in_list = index < num_row_blocks
        tl.store(block_expert_ptr + index, expert, mask=in_list)
        tl.store(block_row_ptr + index, first_row + (index - first_block) * BLOCK_M, mask=in_list)
