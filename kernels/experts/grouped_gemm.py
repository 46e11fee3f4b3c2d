"""The grouped GEMM kernel: GEMM1 and GEMM2 over the row blocks that routing wrote to memory.

tile.py explains the letters.
"""

from __future__ import annotations

import triton
import triton.language as tl

from executorch_moe.kernels._device import grouped_tile, launches_before

from .tile import gemm_tile


@triton.jit
def moe_grouped_gemm(
    x_ptr,  # GEMM1: bf16 [T, STRIDE_X] or int8 [T, KP]; GEMM2: [P, KP], rows sorted by expert
    x_scale_ptr,  # fp32 [rows of x, KP/ACT_GROUP], int8 activations only
    w_ptr,  # uint8 [E, KP/128, N, 64] packed, or bf16 [E, N, KP]
    w_scale_ptr,  # bf16 [E, KP/GROUP, N]
    w_zero_ptr,  # bf16 [E, KP/GROUP, N], HAS_ZERO only
    bias_ptr,  # fp32 [E, N], HAS_BIAS only
    out_ptr,  # GEMM1: bf16 [P, OUT_COLS] sorted by expert; GEMM2: bf16 [P, OUT_COLS] in pair order
    pair_weight_ptr,  # float [P] routing weights, GEMM2 only
    sorted_pair_ids_ptr,  # int32 [P]
    expert_offsets_ptr,  # int32 [E + 1], first row of each expert
    block_expert_ptr,  # int32 [max row blocks]
    block_row_ptr,  # int32 [max row blocks], first row of the block
    num_row_blocks_ptr,  # int32 [1]: how many row blocks routing wrote
    num_pairs,
    PAIRS_FROM: tl.constexpr, PAIRS_TO: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, OUT_COLS: tl.constexpr, STRIDE_X: tl.constexpr,
    WIDE_X: tl.constexpr,
    TOP_K: tl.constexpr, GROUP: tl.constexpr, W_BITS: tl.constexpr, INT8_ORDER: tl.constexpr, ACT_GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, GEMM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_SIZE_M: tl.constexpr, NUM_STAGES: tl.constexpr,
    UNROLL: tl.constexpr, SCALE_AFTER: tl.constexpr, PERSISTENT: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """GEMM1 (gate+up with the activation) or GEMM2 (down with the routing weight) over the row blocks of routing.

    PERSISTENT: any number of programs step through the tile list, whose length is read from memory. Otherwise program i
    does tile i, and the grid must cover all tiles. Both compute a tile the same way, so the results are bit-identical.

    WIDE_X: x has more elements than 32-bit offsets can address.
    With fewer than PAIRS_FROM or more than PAIRS_TO pairs the kernel does nothing: another launch, with tiles of
    another height, is for that number of pairs.
    """
    wanted = (num_pairs >= PAIRS_FROM) & (num_pairs <= PAIRS_TO)
    # Everything below depends on the number of tiles, which is read after the wait.
    num_row_blocks = tl.load(num_row_blocks_ptr + launches_before(False, PTX), mask=wanted, other=0)
    num_tiles = num_row_blocks * (N // BLOCK_N)
    start = tl.program_id(0)
    # Without PERSISTENT, this step ends the loop after one tile.
    step = tl.num_programs(0) if PERSISTENT else tl.maximum(num_tiles, 1)
    for tile in tl.range(start, num_tiles, step):
        row_block, n_block = grouped_tile(tile, num_row_blocks, N // BLOCK_N, GROUP_SIZE_M)
        expert = tl.load(block_expert_ptr + row_block).to(tl.int64)
        row = tl.load(block_row_ptr + row_block) + tl.arange(0, BLOCK_M)
        mask_m = row < tl.load(expert_offsets_ptr + expert + 1)
        row = tl.where(mask_m, row, 0)
        pair = tl.load(sorted_pair_ids_ptr + row, mask=mask_m, other=0)
        x_row = pair // TOP_K if GEMM == 1 else row
        out_row = row if GEMM == 1 else pair
        gemm_tile(
            x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, w_zero_ptr, bias_ptr, out_ptr, pair_weight_ptr,
            expert, pair, x_row, out_row, mask_m, n_block, 0,
            N, K, KP, OUT_COLS, STRIDE_X, WIDE_X, GROUP, W_BITS, INT8_ORDER, ACT_GROUP, HAS_ZERO, HAS_BIAS, ACTIVATION,
            GEMM, BLOCK_M, BLOCK_N, 1, NUM_STAGES, UNROLL, SCALE_AFTER, False, PTX,
        )  # fmt: skip
