"""The few-token GEMM kernel: GEMM1 and GEMM2 without routing lists.

Each program finds the rows of its tile itself from the expert ids, which are one or two cache lines. That saves the
launch of routing. tile.py explains the letters.
"""

from __future__ import annotations

import triton
import triton.language as tl

from executorch_moe.kernels._device import launches_before, to_bf16

from .operands import fetch_weights
from .routing import leads_row_block, rows_of_leader
from .tile import gemm_tile


@triton.jit
def chosen_experts(
    topk_ids_ptr, num_tokens, TOP_K: tl.constexpr, NUM_EXPERTS: tl.constexpr, TOKENS: tl.constexpr
):  # fmt: skip
    """int32 [TOKENS]: bit i of a token is set if its choice i is a valid expert, in [0, E)."""
    token = tl.arange(0, TOKENS)
    chosen = tl.zeros((TOKENS,), dtype=tl.int32)
    for slot in tl.static_range(TOP_K):
        expert = tl.load(topk_ids_ptr + token * TOP_K + slot, mask=token < num_tokens, other=-1)
        chosen |= ((expert >= 0) & (expert < NUM_EXPERTS)).to(tl.int32) << slot
    return chosen


@triton.jit
def sum_pairs_of_block(
    y_ptr, chosen, out_ptr, num_tokens, num_pairs, n_block,
    H: tl.constexpr, TOP_K: tl.constexpr, SPLIT_K: tl.constexpr, BLOCK_N: tl.constexpr,
    TOKENS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Sum over top_k (and the parts of K) for BLOCK_N columns of all tokens, in a fixed order.

    y: fp32 [SPLIT_K, P, H]. chosen: int32 [TOKENS] of `chosen_experts`.
    """
    token = tl.arange(0, TOKENS)
    offs = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((TOKENS, BLOCK_N), dtype=tl.float32)
    for slot in tl.static_range(TOP_K):
        pair = token * TOP_K + slot
        valid = (((chosen >> slot) & 1) != 0)[:, None] & (offs < H)[None, :]
        for split in tl.static_range(SPLIT_K):
            row = split * num_pairs + pair
            # .cg: other multiprocessors wrote this; L1 may be stale, L2 is not.
            acc += tl.load(y_ptr + row[:, None] * H + offs[None, :], mask=valid, other=0.0, cache_modifier=".cg")
    wanted = (token < num_tokens)[:, None] & (offs < H)[None, :]
    tl.store(out_ptr + token[:, None] * H + offs[None, :], to_bf16(acc, PTX), mask=wanted)


@triton.jit
def moe_few_tokens_gemm(
    x_ptr,  # GEMM1: bf16 [T, STRIDE_X] or int8 [T, KP]; GEMM2: [P, KP], in pair order
    x_scale_ptr,  # fp32 [rows of x, KP/ACT_GROUP], int8 activations only
    w_ptr,  # uint8 [E, KP/128, N, 64] packed, or bf16 [E, N, KP]
    w_scale_ptr,  # bf16 [E, KP/GROUP, N]
    w_zero_ptr,  # bf16 [E, KP/GROUP, N], HAS_ZERO only
    bias_ptr,  # fp32 [E, N], HAS_BIAS only
    y_ptr,  # GEMM1: bf16 [P, OUT_COLS]; GEMM2: fp32 [SPLIT_K, P, OUT_COLS]. In pair order
    pair_weight_ptr,  # float [P] routing weights, GEMM2 only
    topk_ids_ptr,  # int32 or int64 [P]
    arrivals_ptr,  # int32 [N/BLOCK_N of GEMM2]: finished programs of each n block; GEMM1 sets them to zero
    out_ptr,  # bf16 [T, OUT_COLS], GEMM2 only
    num_tokens,
    NUM_ARRIVALS: tl.constexpr, NUM_EXPERTS: tl.constexpr, PAIRS: tl.constexpr, TOKENS: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, OUT_COLS: tl.constexpr, STRIDE_X: tl.constexpr,
    TOP_K: tl.constexpr, GROUP: tl.constexpr, W_BITS: tl.constexpr, INT8_ORDER: tl.constexpr, ACT_GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, GEMM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT_K: tl.constexpr, NUM_STAGES: tl.constexpr,
    UNROLL: tl.constexpr, SCALE_AFTER: tl.constexpr, SHORT: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """GEMM1 or GEMM2 without routing lists: program (n block, pair, part of K) does the row block that its pair leads.

    PAIRS and TOKENS: the next powers of two of P and T. SHORT: the launch has so few programs that most of the GPU is
    idle. GEMM2 also sums over top_k: the last program of an n block to finish adds the results of all of them in a
    fixed order, so the bits do not depend on which program is last.
    """
    n_block, first_pair, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_pairs = num_tokens * TOP_K
    if GEMM == 1:
        zero = launches_before(SHORT, PTX)
        topk_ids_ptr += zero
    expert = tl.load(topk_ids_ptr + first_pair).to(tl.int64)
    all_pairs = tl.arange(0, PAIRS)
    if TOKENS == 1:  # a token's experts differ, so each pair leads; one that is named twice is only read twice
        before = 0
        leads = (expert >= 0) & (expert < NUM_EXPERTS)
    else:
        ids = tl.load(topk_ids_ptr + all_pairs, mask=all_pairs < num_pairs, other=-1)
        before, leads = leads_row_block(ids, expert, first_pair, NUM_EXPERTS, PAIRS, BLOCK_M)
    if GEMM == 2:  # GEMM1 has waited for the expert ids, so they can be read and weights prefetched while it runs
        if SHORT and W_BITS == 4 and leads:
            fetch_weights(w_ptr, expert, n_block, split, N, KP, BLOCK_N, SPLIT_K)
        if SHORT:
            chosen = chosen_experts(topk_ids_ptr, num_tokens, TOP_K, NUM_EXPERTS, TOKENS)
        zero = launches_before(SHORT, PTX)
    x_ptr += zero
    arrivals_ptr += zero
    # A part of K without blocks stores constant zeros: only the address keeps that store after the wait.
    y_ptr += zero
    out_ptr += zero
    if GEMM == 1:
        block = tl.arange(0, NUM_ARRIVALS)
        first_program = (n_block == 0) & (first_pair == 0)
        tl.store(arrivals_ptr + block, tl.zeros_like(block), mask=first_program & (block < NUM_ARRIVALS))
    if leads:
        if TOKENS == 1:
            row = tl.arange(0, BLOCK_M)
            mask_m = row == 0
            pair = tl.where(mask_m, first_pair, 0)
        else:
            again = tl.load(topk_ids_ptr + all_pairs, mask=all_pairs < num_pairs, other=-1)
            pair, mask_m = rows_of_leader(again, expert, before, NUM_EXPERTS, PAIRS, BLOCK_M)
        x_row = pair // TOP_K if GEMM == 1 else pair
        out_row = pair + split * num_pairs
        gemm_tile(
            x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, w_zero_ptr, bias_ptr, y_ptr, pair_weight_ptr,
            expert, pair, x_row, out_row, mask_m, n_block, split,
            N, K, KP, OUT_COLS, STRIDE_X, False, GROUP, W_BITS, INT8_ORDER, ACT_GROUP, HAS_ZERO, HAS_BIAS, ACTIVATION,
            GEMM, BLOCK_M, BLOCK_N, SPLIT_K, NUM_STAGES, UNROLL, SCALE_AFTER, True, PTX,
        )  # fmt: skip
    if GEMM == 2:
        tl.debug_barrier()  # the stores of all threads must precede the release by one thread
        arrived = tl.atomic_add(arrivals_ptr + n_block, 1, sem="acq_rel", scope="gpu")
        if arrived == num_pairs * SPLIT_K - 1:
            if not SHORT:
                chosen = chosen_experts(topk_ids_ptr, num_tokens, TOP_K, NUM_EXPERTS, TOKENS)
            sum_pairs_of_block(
                y_ptr, chosen, out_ptr, num_tokens, num_pairs, n_block,
                OUT_COLS, TOP_K, SPLIT_K, BLOCK_N, TOKENS, PTX,
            )  # fmt: skip
