"""The vector mainloop for a few tokens: no routing launch, no padding, each weight byte read once a pair.

A program takes BLOCK_N weight rows of one pair (GEMM1), or of all pairs of one token (GEMM2, which therefore finishes
the sum over top_k, in fixed order). Its work is a list of K blocks, in GEMM2 those of one pair after those of another,
and it loads K_BLOCKS of them at once, because here latency and bytes in flight are everything. Decoding, activation and
packed layout are those of the grouped path.

Letters: J the K blocks taken at once, BN weight rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._device import decode_codes, decode_int8, gated_activation, to_bf16


@triton.jit
def scaled_sum(value, group_ptr, PART: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr, mask):
    """fp32 value [J, BN, W] summed over W, times the scale (or zero) of part PART (of 32 values, in K order): [J, BN].

    group_ptr: bf16 pointers [J, BN] to the first group of each K block.
    """
    OFFSET: tl.constexpr = 0 if GROUP >= 128 else PART * 32 // GROUP * N
    s = tl.load(group_ptr + OFFSET, mask=mask, other=0.0)
    return tl.sum(value, axis=2) * s.to(tl.float32)


@triton.jit
def load_x(x_rows, k, K: tl.constexpr, mask):
    """Activations at positions k [J, W] of rows x_rows [J] -> fp32 [J, 1, W]; zero from K on and where masked."""
    x = tl.load(x_rows[:, None] + k, mask=(k < K) & mask[:, None], other=0.0)
    return x.to(tl.float32)[:, None, :]


@triton.jit
def dot_blocks(
    x_rows, w_ptr, s_ptr, z_ptr, expert, kb, offs_n, mask,
    N: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, GROUP: tl.constexpr, W_BITS: tl.constexpr, INT8: tl.constexpr,
    HAS_ZERO: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """fp32 [J, BN]: rows offs_n of matrix expert[j], K block kb[j], times that block of the vector at x_rows[j]."""
    wanted = mask[:, None, None]
    # Positions in K of the values that a row's bytes hold, in the order of the bytes (packing.py).
    i = tl.arange(0, 32)
    k_of_half = kb[:, None] * 128 + (16 * ((i >> 2) & 1) + 8 * ((i >> 1) & 1) + 2 * (i >> 3) + (i & 1))[None, :]
    b = tl.arange(0, 64)
    k_in_half_block = 32 * ((b >> 3) & 1) + 16 * ((b >> 2) & 1) + 4 * (b >> 4) + (b & 3)
    k_of_byte = kb[:, None] * 128 + k_in_half_block[None, :]
    if W_BITS == 16:
        k = kb[:, None] * 128 + tl.arange(0, 128)[None, :]
        w = tl.load(
            w_ptr + expert[:, None, None] * (N * KP) + offs_n[None, :, None] * KP + k[:, None, :],
            mask=wanted,
            other=0.0,
        )
        return tl.sum(w.to(tl.float32) * load_x(x_rows, k, K, mask), axis=2)

    packed_row = expert[:, None] * (N * KP // 128) + kb[:, None] * N + offs_n[None, :]  # [J, BN], rows of 64 bytes
    first_group = kb * 128 // GROUP if GROUP >= 128 else kb * (128 // GROUP)
    group = expert[:, None] * (KP // GROUP * N) + first_group[:, None] * N + offs_n[None, :]
    groups = s_ptr + group
    known = mask[:, None]
    if INT8:
        raw = tl.load(
            w_ptr.to(tl.pointer_type(tl.int8), bitcast=True) + packed_row[:, :, None] * 64 + b, mask=wanted, other=0
        )
        lo, hi = decode_int8(raw, PTX)
        low = lo.to(tl.float32) * load_x(x_rows, k_of_byte, K, mask)
        high = hi.to(tl.float32) * load_x(x_rows, k_of_byte + 64, K, mask)
        if GROUP >= 128:
            acc = scaled_sum(low + high, groups, 0, N, GROUP, known)
        elif GROUP == 64:
            acc = scaled_sum(low, groups, 0, N, GROUP, known) + scaled_sum(high, groups, 2, N, GROUP, known)
        else:
            first = (k_in_half_block < 32)[None, None, :]
            acc = scaled_sum(tl.where(first, low, 0.0), groups, 0, N, GROUP, known)
            acc += scaled_sum(tl.where(first, 0.0, low), groups, 1, N, GROUP, known)
            acc += scaled_sum(tl.where(first, high, 0.0), groups, 2, N, GROUP, known)
            acc += scaled_sum(tl.where(first, 0.0, high), groups, 3, N, GROUP, known)
        return acc * 0.0625  # decode_int8 gives 16 times the weight

    raw = tl.load(
        w_ptr.to(tl.pointer_type(tl.int16), bitcast=True) + packed_row[:, :, None] * 32 + i, mask=wanted, other=0
    )
    x0 = load_x(x_rows, k_of_half, K, mask)
    x1 = load_x(x_rows, k_of_half + 32, K, mask)
    x2 = load_x(x_rows, k_of_half + 64, K, mask)
    x3 = load_x(x_rows, k_of_half + 96, K, mask)
    w0, w1, w2, w3 = decode_codes(raw, PTX)
    p0 = w0.to(tl.float32) * x0
    p1 = w1.to(tl.float32) * x1
    p2 = w2.to(tl.float32) * x2
    p3 = w3.to(tl.float32) * x3
    if GROUP >= 128:
        acc = scaled_sum((p0 + p1) + (p2 + p3), groups, 0, N, GROUP, known)
    elif GROUP == 64:
        acc = scaled_sum(p0 + p1, groups, 0, N, GROUP, known) + scaled_sum(p2 + p3, groups, 2, N, GROUP, known)
    else:
        acc = scaled_sum(p0, groups, 0, N, GROUP, known)
        acc += scaled_sum(p1, groups, 1, N, GROUP, known)
        acc += scaled_sum(p2, groups, 2, N, GROUP, known)
        acc += scaled_sum(p3, groups, 3, N, GROUP, known)
    if HAS_ZERO:
        zeros = z_ptr + group
        acc += scaled_sum(x0, zeros, 0, N, GROUP, known)
        acc += scaled_sum(x1, zeros, 1, N, GROUP, known)
        acc += scaled_sum(x2, zeros, 2, N, GROUP, known)
        acc += scaled_sum(x3, zeros, 3, N, GROUP, known)
    return acc


@triton.jit
def moe_few_tokens_gemm(
    x_ptr,  # GEMM1: bf16 [T, STRIDE_X]; GEMM2: bf16 [P, STRIDE_X]
    w_ptr,  # uint8 [E, KP/128, N, 64] packed, or bf16 [E, N, KP]
    w_scale_ptr,  # bf16 [E, KP/GROUP, N]
    w_zero_ptr,  # bf16 [E, KP/GROUP, N], HAS_ZERO only
    bias_ptr,  # fp32 [E, N], HAS_BIAS only
    out_ptr,  # GEMM1: bf16 [P, OUT_COLS]; GEMM2: bf16 [T, OUT_COLS]
    topk_ids_ptr,  # int32 or int64 [P]
    pair_weight_ptr,  # float [P], GEMM2 only
    N: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, OUT_COLS: tl.constexpr, STRIDE_X: tl.constexpr,
    TOP_K: tl.constexpr, NUM_EXPERTS: tl.constexpr, GROUP: tl.constexpr, W_BITS: tl.constexpr, INT8: tl.constexpr,
    HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, GEMM: tl.constexpr,
    BLOCK_N: tl.constexpr, K_BLOCKS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """GEMM1: program (n block, pair). GEMM2: program (n block, token), summing over the token's pairs."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1).to(tl.int64)
    NUM_KB: tl.constexpr = KP // 128
    PAIRS: tl.constexpr = 1 if GEMM == 1 else TOP_K
    acc = tl.zeros((K_BLOCKS, BLOCK_N), dtype=tl.float32)
    for first in range(0, PAIRS * NUM_KB, K_BLOCKS):
        index = first + tl.arange(0, K_BLOCKS)
        inside = index < PAIRS * NUM_KB
        pair = row * PAIRS + index // NUM_KB
        expert = tl.load(topk_ids_ptr + pair, mask=inside, other=-1).to(tl.int64)
        valid = (expert >= 0) & (expert < NUM_EXPERTS)
        expert = tl.where(valid, expert, 0)
        x_row = pair // TOP_K if GEMM == 1 else pair
        part = dot_blocks(
            x_ptr + x_row * STRIDE_X, w_ptr, w_scale_ptr, w_zero_ptr, expert, index % NUM_KB, offs_n, valid,
            N, K, KP, GROUP, W_BITS, INT8, HAS_ZERO, PTX,
        )  # fmt: skip
        if HAS_BIAS:
            # Once a pair: with its first K block.
            has = (valid & (index % NUM_KB == 0))[:, None]
            part += tl.load(bias_ptr + expert[:, None] * N + offs_n[None, :], mask=has, other=0.0)
        if GEMM == 2:
            part *= tl.load(pair_weight_ptr + pair, mask=valid, other=0.0).to(tl.float32)[:, None]
        acc += part
    total = tl.sum(acc, axis=0)
    if GEMM == 1:  # of a dropped pair this writes act(0) * 0
        gate, up = tl.split(total.reshape(BLOCK_N // 16, 2, 8).permute(0, 2, 1))
        value = gated_activation(gate, up, ACTIVATION).reshape(BLOCK_N // 2)
        offs_o = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        tl.store(out_ptr + row * OUT_COLS + offs_o, to_bf16(value, PTX))
    else:
        tl.store(out_ptr + row * OUT_COLS + offs_n, to_bf16(total, PTX), mask=offs_n < OUT_COLS)
