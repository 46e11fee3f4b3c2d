"""The grouped GEMM kernel for sm_90: four warps load, four or eight multiply.

experts/tile.py explains the letters. Four warps bring packed weights, scales and tokens, a K block after another, into
a ring of NUM_STAGES places in shared memory, also those of the next tile while the sums of a tile are stored. The other
warps decode a piece of a K block, half or a quarter, into registers while the tensor cores multiply the piece before.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .layouts import (
    copy_layout,
    packed_layout,
    rows_in_order,
    store_layout,
    sums_layout,
    tokens_layout,
    words_layout,
)
from .operands import natural_halfwords, operand_piece, scales_of_rows

LOADING_WARPS = gl.constexpr(4)


@gluon.jit
def wait_for_launches():
    """0, a multiple of 16, after the previous launches have ended; see `launches_before`."""
    zero = gl.inline_asm_elementwise(
        "griddepcontrol.wait; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=True, pack=1
    )
    return zero * 16


@gluon.jit
def place_of_tile(tile, num_row_blocks, NUM_N_BLOCKS: gl.constexpr, GROUP_SIZE_M: gl.constexpr):
    """Tile index -> (row block, n block), as `grouped_tile`."""
    group_tiles = GROUP_SIZE_M * NUM_N_BLOCKS
    first = (tile // group_tiles) * GROUP_SIZE_M
    rows = gl.minimum(num_row_blocks - first, GROUP_SIZE_M)
    within = tile % group_tiles
    return first + within % rows, within // rows


@gluon.jit
def rows_of_tile(
    sorted_pair_ids_ptr, expert_offsets_ptr, block_row_ptr, expert, row_block,
    BLOCK_M: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Rows of a row block in the order of experts, their pairs, and which of them exist: int32 and int1 [BLOCK_M]."""
    row = gl.load(block_row_ptr + row_block) + gl.arange(0, BLOCK_M, LAYOUT)
    inside = row < gl.load(expert_offsets_ptr + expert + 1)
    row = gl.where(inside, row, 0)
    return row, gl.load(sorted_pair_ids_ptr + row, mask=inside, other=0), inside


@gluon.jit
def load_tiles(
    sources,
    N: gl.constexpr, K: gl.constexpr, KP: gl.constexpr, STRIDE_X: gl.constexpr, TOP_K: gl.constexpr,
    GROUP: gl.constexpr, GEMM: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    GROUP_SIZE_M: gl.constexpr, NUM_STAGES: gl.constexpr, PIECES: gl.constexpr,
):  # fmt: skip
    """The warps that load: all K blocks of all tiles of this program, in order."""
    # fmt: off
    (
        x_ptr, w_ptr, w_scale_ptr, sorted_pair_ids_ptr, expert_offsets_ptr, block_expert_ptr, block_row_ptr,
        num_row_blocks, x_smem, w_smem, scale_smem, ready, empty,
    ) = sources
    # fmt: on
    PARTS: gl.constexpr = 1 if GROUP >= 128 else 128 // GROUP  # groups of a K block
    W_COPY: gl.constexpr = copy_layout(4, LOADING_WARPS)
    X_COPY: gl.constexpr = copy_layout(16 // PIECES, LOADING_WARPS)
    WORDS: gl.constexpr = words_layout(LOADING_WARPS)
    w_offs = (
        gl.arange(0, BLOCK_N, gl.SliceLayout(1, W_COPY))[:, None] * 32
        + gl.arange(0, 32, gl.SliceLayout(0, W_COPY))[None, :]
    )
    scale_offs = gl.arange(0, BLOCK_N // 2, WORDS)
    columns = gl.arange(0, 128 // PIECES, gl.SliceLayout(0, X_COPY))
    step = 0
    for tile in range(gl.program_id(0), num_row_blocks * (N // BLOCK_N), gl.num_programs(0)):
        row_block, n_block = place_of_tile(tile, num_row_blocks, N // BLOCK_N, GROUP_SIZE_M)
        expert = gl.load(block_expert_ptr + row_block).to(gl.int64)
        row, pair, inside = rows_of_tile(
            sorted_pair_ids_ptr,
            expert_offsets_ptr,
            block_row_ptr,
            expert,
            row_block,
            BLOCK_M,
            gl.SliceLayout(1, X_COPY),
        )
        x_row = pair // TOP_K if GEMM == 1 else row
        x_rows = x_ptr + x_row.to(gl.int64)[:, None] * STRIDE_X + columns[None, :]
        tile_w = w_ptr + expert * (N * KP // 4) + n_block * (BLOCK_N * 32)
        tile_scale = w_scale_ptr + expert * (KP // GROUP * N // 2) + n_block * (BLOCK_N // 2)
        for kb in range(KP // 128):
            stage = step % NUM_STAGES
            mbarrier.wait(empty.index(stage), ((step // NUM_STAGES) & 1) ^ 1)
            async_copy.async_copy_global_to_shared(w_smem.index(stage), tile_w + kb * (N * 32) + w_offs)
            for part in gl.static_range(PARTS):
                words = tile_scale + ((kb * 128) // GROUP + part) * (N // 2)
                async_copy.async_copy_global_to_shared(scale_smem.index(stage * PARTS + part), words + scale_offs)
            for piece in gl.static_range(PIECES):
                first = kb * 128 + piece * (128 // PIECES)
                if K == KP:
                    mask = inside[:, None]
                else:  # padded weights are zero, but memory after the row may hold NaN
                    mask = inside[:, None] & (first + columns < K)[None, :]
                async_copy.async_copy_global_to_shared(x_smem.index(stage * PIECES + piece), x_rows + first, mask=mask)
            async_copy.mbarrier_arrive(ready.index(stage), increment_count=False)
            step += 1


@gluon.jit
def activated(gate, up, ACTIVATION: gl.constexpr):
    """As `gated_activation`: 0 is silu, 1 is swiglu_oai."""
    if ACTIVATION == 0:
        return gate / (1.0 + gl.exp(-gate)) * up
    else:
        gl.static_assert(ACTIVATION == 1)
        limited = gl.minimum(gate, 7.0)
        return limited / (1.0 + gl.exp(-1.702 * limited)) * (gl.minimum(gl.maximum(up, -7.0), 7.0) + 1.0)


@gluon.jit
def targets_of_tile(
    pair_weight_ptr, sorted_pair_ids_ptr, expert_offsets_ptr, block_row_ptr, expert, row_block,
    GEMM: gl.constexpr, BLOCK_M: gl.constexpr, STORE: gl.constexpr, SUMS: gl.constexpr,
):  # fmt: skip
    """Rows of a row block's results, which of them exist, and (GEMM2) the weight of each, in the layout of the sums."""
    row, pair, inside = rows_of_tile(
        sorted_pair_ids_ptr, expert_offsets_ptr, block_row_ptr, expert, row_block, BLOCK_M, gl.SliceLayout(0, STORE)
    )
    if GEMM == 1:
        return row, inside, 0.0
    else:
        _, weight_pair, weighted = rows_of_tile(
            sorted_pair_ids_ptr, expert_offsets_ptr, block_row_ptr, expert, row_block, BLOCK_M, gl.SliceLayout(0, SUMS)
        )
        return pair, inside, gl.load(pair_weight_ptr + weight_pair, mask=weighted, other=0.0).to(gl.float32)


@gluon.jit
def multiply_tiles(
    targets,
    N: gl.constexpr, KP: gl.constexpr, OUT_COLS: gl.constexpr, GROUP: gl.constexpr, HAS_BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr, GEMM: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    GROUP_SIZE_M: gl.constexpr, NUM_STAGES: gl.constexpr, PIECES: gl.constexpr, FENCE: gl.constexpr,
):  # fmt: skip
    """The warps that multiply: all tiles of this program, in the order of `load_tiles`."""
    WARPS: gl.constexpr = gl.num_warps()
    # fmt: off
    (
        bias_ptr, out_ptr, pair_weight_ptr, sorted_pair_ids_ptr, expert_offsets_ptr, block_expert_ptr, block_row_ptr,
        num_row_blocks, x_smem, w_smem, scale_smem, ready, empty,
    ) = targets
    # fmt: on
    PARTS: gl.constexpr = 1 if GROUP >= 128 else 128 // GROUP
    SUMS: gl.constexpr = sums_layout(BLOCK_M, WARPS)
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    OUT_ROWS: gl.constexpr = BLOCK_N // 2 if GEMM == 1 else BLOCK_N
    STORE: gl.constexpr = store_layout(OUT_ROWS, WARPS)
    # Before the K loop, so that storing does not wait for them, unless they take too many registers.
    EARLY: gl.constexpr = BLOCK_M <= 64
    step = 0
    for tile in range(gl.program_id(0), num_row_blocks * (N // BLOCK_N), gl.num_programs(0)):
        row_block, n_block = place_of_tile(tile, num_row_blocks, N // BLOCK_N, GROUP_SIZE_M)
        expert = gl.load(block_expert_ptr + row_block).to(gl.int64)
        if EARLY:
            out_row, inside, pair_weight = targets_of_tile(
                pair_weight_ptr, sorted_pair_ids_ptr, expert_offsets_ptr, block_row_ptr, expert, row_block,
                GEMM, BLOCK_M, STORE, SUMS,
            )  # fmt: skip
        acc = gl.full((BLOCK_N, BLOCK_M), 0.0, gl.float32, SUMS)
        for kb in range(KP // 128):
            stage = step % NUM_STAGES
            mbarrier.wait(ready.index(stage), (step // NUM_STAGES) & 1)
            if FENCE:
                fence_async_shared()
            half = natural_halfwords(w_smem.index(stage).load(packed_layout(BLOCK_N, WARPS)), BLOCK_N)
            s0 = scales_of_rows(scale_smem.index(stage * PARTS), half, BLOCK_N, WARPS)
            s1, s2, s3 = s0, s0, s0
            if PARTS > 1:
                s2 = scales_of_rows(scale_smem.index(stage * PARTS + PARTS // 2), half, BLOCK_N, WARPS)
                s3 = s2
            if PARTS == 4:
                s1 = scales_of_rows(scale_smem.index(stage * PARTS + 1), half, BLOCK_N, WARPS)
                s3 = scales_of_rows(scale_smem.index(stage * PARTS + 3), half, BLOCK_N, WARPS)
            for piece in gl.static_range(PIECES):
                operand = operand_piece(half, s0, s1, s2, s3, piece, PIECES, BLOCK_N, OPERAND)
                tokens = x_smem.index(stage * PIECES + piece).permute((1, 0))
                acc = warpgroup_mma(operand, tokens, acc, is_async=True)
                # The piece before is done, and its registers are free.
                acc = warpgroup_mma_wait(1, deps=[acc])
                if piece == 0:  # so is the place of the K block before
                    mbarrier.arrive(empty.index((step + NUM_STAGES - 1) % NUM_STAGES), count=1, pred=kb > 0)
            step += 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index((step + NUM_STAGES - 1) % NUM_STAGES), count=1)

        if not EARLY:
            out_row, inside, pair_weight = targets_of_tile(
                pair_weight_ptr, sorted_pair_ids_ptr, expert_offsets_ptr, block_row_ptr, expert, row_block,
                GEMM, BLOCK_M, STORE, SUMS,
            )  # fmt: skip
        if HAS_BIAS:
            bias_rows = gl.arange(0, BLOCK_N, gl.SliceLayout(1, SUMS))
            bias = gl.load(bias_ptr + expert * N + n_block * BLOCK_N + bias_rows)
            acc += bias[:, None]
        if GEMM == 1:
            # Gate and up rows alternate in runs of 8: one thread has rows r and r + 8 of its sums.
            gate, up = gl.split(acc.reshape(BLOCK_N // 16, 2, 8, BLOCK_M).permute(0, 2, 3, 1))
            value = activated(gate, up, ACTIVATION).reshape(OUT_ROWS, BLOCK_M)
        else:
            value = acc * pair_weight[None, :]
        result = gl.convert_layout(value.to(gl.bfloat16), STORE)
        column = n_block * OUT_ROWS + gl.arange(0, OUT_ROWS, gl.SliceLayout(1, STORE))
        pointers = out_ptr + out_row.to(gl.int64)[None, :] * OUT_COLS + column[:, None]
        wanted = inside[None, :]
        if OUT_COLS % 128 != 0:
            wanted = wanted & (column < OUT_COLS)[:, None]
        gl.store(pointers, result, mask=wanted)


@gluon.jit
def moe_gluon_grouped_gemm(
    x_ptr,  # GEMM1: bf16 [T, STRIDE_X]; GEMM2: bf16 [P, KP], rows sorted by expert
    w_ptr,  # uint8 [E, KP/128, N, 64] packed
    w_scale_ptr,  # bf16 [E, KP/GROUP, N]
    bias_ptr,  # fp32 [E, N], HAS_BIAS only
    out_ptr,  # GEMM1: bf16 [P, OUT_COLS] sorted by expert; GEMM2: bf16 [P, OUT_COLS] in pair order
    pair_weight_ptr,  # float [P] routing weights, GEMM2 only
    sorted_pair_ids_ptr,  # int32 [P]
    expert_offsets_ptr,  # int32 [E + 1], first row of each expert
    block_expert_ptr,  # int32 [max row blocks]
    block_row_ptr,  # int32 [max row blocks], first row of the block
    num_row_blocks_ptr,  # int32 [1]: how many row blocks routing wrote
    N: gl.constexpr, K: gl.constexpr, KP: gl.constexpr, OUT_COLS: gl.constexpr, STRIDE_X: gl.constexpr,
    TOP_K: gl.constexpr, GROUP: gl.constexpr, HAS_BIAS: gl.constexpr, ACTIVATION: gl.constexpr, GEMM: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP_SIZE_M: gl.constexpr, NUM_STAGES: gl.constexpr,
    PIECES: gl.constexpr, LOADING_REGISTERS: gl.constexpr, FENCE: gl.constexpr, PTX: gl.constexpr,
):  # fmt: skip
    """GEMM1 (gate+up with the activation) or GEMM2 (down with the routing weight), as `moe_grouped_gemm`.

    Any number of programs step through the tile list, whose length is read from memory. The kernel is launched with the
    warps that multiply; four more load, with LOADING_REGISTERS registers to a thread.
    """
    gl.static_assert(PTX >= 90)
    PARTS: gl.constexpr = 1 if GROUP >= 128 else 128 // GROUP
    zero = wait_for_launches()
    num_row_blocks = gl.load(num_row_blocks_ptr + zero)
    # 16-bit and 32-bit words of the packed weights and of the scales.
    w_half_ptr = w_ptr.to(gl.pointer_type(gl.int16), bitcast=True)
    scale_word_ptr = w_scale_ptr.to(gl.pointer_type(gl.int32), bitcast=True)
    x_smem = gl.allocate_shared_memory(
        gl.bfloat16, [NUM_STAGES * PIECES, BLOCK_M, 128 // PIECES], tokens_layout(128 // PIECES)
    )
    w_smem = gl.allocate_shared_memory(gl.int16, [NUM_STAGES, BLOCK_N, 32], rows_in_order(2))
    scale_smem = gl.allocate_shared_memory(gl.int32, [NUM_STAGES * PARTS, BLOCK_N // 2], rows_in_order(1))
    ready = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(NUM_STAGES):
        mbarrier.init(ready.index(stage), count=32 * LOADING_WARPS)
        mbarrier.init(empty.index(stage), count=1)
    targets = (
        bias_ptr, out_ptr + zero, pair_weight_ptr + zero, sorted_pair_ids_ptr + zero, expert_offsets_ptr + zero,
        block_expert_ptr + zero, block_row_ptr + zero, num_row_blocks, x_smem, w_smem, scale_smem, ready, empty,
    )  # fmt: skip
    sources = (
        x_ptr + zero, w_half_ptr, scale_word_ptr, sorted_pair_ids_ptr + zero, expert_offsets_ptr + zero,
        block_expert_ptr + zero, block_row_ptr + zero, num_row_blocks, x_smem, w_smem, scale_smem, ready, empty,
    )  # fmt: skip
    # Constants are written out where they are passed: a variable would make values of the program of them.
    gl.warp_specialize(
        [
            (
                multiply_tiles,
                (
                    targets, N, KP, OUT_COLS, GROUP, HAS_BIAS, ACTIVATION, GEMM, BLOCK_M, BLOCK_N,
                    GROUP_SIZE_M, NUM_STAGES, PIECES, FENCE,
                ),
            ),
            (
                load_tiles,
                (
                    sources, N, K, KP, STRIDE_X, TOP_K, GROUP, GEMM, BLOCK_M, BLOCK_N,
                    GROUP_SIZE_M, NUM_STAGES, PIECES,
                ),
            ),
        ],
        [LOADING_WARPS],
        [LOADING_REGISTERS],
    )  # fmt: skip
