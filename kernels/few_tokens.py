"""The vector mainloop for a few tokens: no routing launch, no padding, each weight byte read once a pair.

A program takes BLOCK_N weight rows of one pair (GEMM1), or of every pair of one token in turn (GEMM2, which therefore
finishes the sum over top_k in fixed order). Decoding, activation and packed layout are those of the grouped path.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._device import decode_codes, decode_int8, gated_activation, to_bf16


@triton.jit
def scaled(value, ptr, kb, offs_n, PART: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr, NUM_KB: tl.constexpr):
    """fp32 value [KB, BN, ...] times the scale (or zero) of part PART (of 32, in K order) of each K block.

    ptr: bf16 [K/GROUP, N] of one expert.
    """
    group = kb * 128 // GROUP if GROUP >= 128 else kb * (128 // GROUP) + PART * 32 // GROUP
    s = tl.load(ptr + group[:, None] * N + offs_n[None, :], mask=(kb < NUM_KB)[:, None], other=0.0)
    return value * s.to(tl.float32)[:, :, None]


@triton.jit
def load_x(x_ptr, at, K: tl.constexpr):
    """Activations at K positions `at` [KB, 32 or more] -> fp32 [KB, 1, ...]; zero from K on."""
    return tl.load(x_ptr + at, mask=at < K, other=0.0).to(tl.float32)[:, None, :]


@triton.jit
def dot_rows(
    x_ptr, w_ptr, s_ptr, z_ptr, offs_n,
    N: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, GROUP: tl.constexpr, W_BITS: tl.constexpr, INT8: tl.constexpr,
    HAS_ZERO: tl.constexpr, BLOCK_N: tl.constexpr, K_BLOCKS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """fp32 [BLOCK_N]: rows `offs_n` of one expert's matrix times one bf16 vector.

    K_BLOCKS blocks of K are loaded at once, so that enough bytes are in flight; scales multiply sums of exact products.
    """
    NUM_KB: tl.constexpr = KP // 128
    # Positions in K of the values that a row's bytes hold, in the order of the bytes (packing.py).
    i = tl.arange(0, 32)
    k_of_half = 16 * ((i >> 2) & 1) + 8 * ((i >> 1) & 1) + 2 * (i >> 3) + (i & 1)
    b = tl.arange(0, 64)
    k_of_byte = 32 * ((b >> 3) & 1) + 16 * ((b >> 2) & 1) + 4 * (b >> 4) + (b & 3)
    WIDTH: tl.constexpr = 128 if W_BITS == 16 else (64 if INT8 else 32)
    acc = tl.zeros((K_BLOCKS, BLOCK_N, WIDTH), dtype=tl.float32)
    for first in range(0, NUM_KB, K_BLOCKS):
        kb = first + tl.arange(0, K_BLOCKS)
        inside = (kb < NUM_KB)[:, None, None]
        if W_BITS == 16:
            at = kb[:, None] * 128 + tl.arange(0, 128)[None, :]
            w = tl.load(w_ptr + offs_n[None, :, None] * KP + at[:, None, :], mask=inside, other=0.0)
            acc += w.to(tl.float32) * load_x(x_ptr, at, K)
        elif INT8:
            at = kb[:, None] * 128 + k_of_byte[None, :]
            bytes_ptr = w_ptr.to(tl.pointer_type(tl.int8), bitcast=True)
            raw = tl.load(bytes_ptr + (kb[:, None, None] * N + offs_n[None, :, None]) * 64 + b, mask=inside, other=0)
            lo, hi = decode_int8(raw, PTX)
            low = lo.to(tl.float32) * load_x(x_ptr, at, K)
            high = hi.to(tl.float32) * load_x(x_ptr, at + 64, K)
            if GROUP >= 128:
                acc += scaled(low + high, s_ptr, kb, offs_n, 0, N, GROUP, NUM_KB)
            elif GROUP == 64:
                acc += scaled(low, s_ptr, kb, offs_n, 0, N, GROUP, NUM_KB)
                acc += scaled(high, s_ptr, kb, offs_n, 2, N, GROUP, NUM_KB)
            else:
                half = (k_of_byte < 32)[None, None, :]
                acc += scaled(tl.where(half, low, 0.0), s_ptr, kb, offs_n, 0, N, GROUP, NUM_KB)
                acc += scaled(tl.where(half, 0.0, low), s_ptr, kb, offs_n, 1, N, GROUP, NUM_KB)
                acc += scaled(tl.where(half, high, 0.0), s_ptr, kb, offs_n, 2, N, GROUP, NUM_KB)
                acc += scaled(tl.where(half, 0.0, high), s_ptr, kb, offs_n, 3, N, GROUP, NUM_KB)
        else:
            at = kb[:, None] * 128 + k_of_half[None, :]
            half_ptr = w_ptr.to(tl.pointer_type(tl.int16), bitcast=True)
            raw = tl.load(half_ptr + (kb[:, None, None] * N + offs_n[None, :, None]) * 32 + i, mask=inside, other=0)
            x0 = load_x(x_ptr, at, K)
            x1 = load_x(x_ptr, at + 32, K)
            x2 = load_x(x_ptr, at + 64, K)
            x3 = load_x(x_ptr, at + 96, K)
            w0, w1, w2, w3 = decode_codes(raw, PTX)
            p0 = w0.to(tl.float32) * x0
            p1 = w1.to(tl.float32) * x1
            p2 = w2.to(tl.float32) * x2
            p3 = w3.to(tl.float32) * x3
            if GROUP >= 128:
                acc += scaled((p0 + p1) + (p2 + p3), s_ptr, kb, offs_n, 0, N, GROUP, NUM_KB)
            elif GROUP == 64:
                acc += scaled(p0 + p1, s_ptr, kb, offs_n, 0, N, GROUP, NUM_KB)
                acc += scaled(p2 + p3, s_ptr, kb, offs_n, 2, N, GROUP, NUM_KB)
            else:
                acc += scaled(p0, s_ptr, kb, offs_n, 0, N, GROUP, NUM_KB)
                acc += scaled(p1, s_ptr, kb, offs_n, 1, N, GROUP, NUM_KB)
                acc += scaled(p2, s_ptr, kb, offs_n, 2, N, GROUP, NUM_KB)
                acc += scaled(p3, s_ptr, kb, offs_n, 3, N, GROUP, NUM_KB)
            if HAS_ZERO:
                acc += scaled(x0, z_ptr, kb, offs_n, 0, N, GROUP, NUM_KB)
                acc += scaled(x1, z_ptr, kb, offs_n, 1, N, GROUP, NUM_KB)
                acc += scaled(x2, z_ptr, kb, offs_n, 2, N, GROUP, NUM_KB)
                acc += scaled(x3, z_ptr, kb, offs_n, 3, N, GROUP, NUM_KB)
    total = tl.sum(tl.sum(acc, axis=2), axis=0)
    return total * 0.0625 if INT8 else total  # decode_int8 gives 16 times the weight


@triton.jit
def moe_few_tokens_gemm(
    x_ptr,  # GEMM1: bf16 [T, K]; GEMM2: bf16 [P, KP]
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
    expert_stride: tl.constexpr = N * KP if W_BITS == 16 else N * KP // 2
    if GEMM == 1:
        pair = tl.program_id(1)
        expert = tl.load(topk_ids_ptr + pair).to(tl.int64)
        if (expert >= 0) & (expert < NUM_EXPERTS):
            acc = dot_rows(
                x_ptr + (pair // TOP_K).to(tl.int64) * STRIDE_X, w_ptr + expert * expert_stride,
                w_scale_ptr + expert * (KP // GROUP * N), w_zero_ptr + expert * (KP // GROUP * N), offs_n,
                N, K, KP, GROUP, W_BITS, INT8, HAS_ZERO, BLOCK_N, K_BLOCKS, PTX,
            )  # fmt: skip
            if HAS_BIAS:
                acc += tl.load(bias_ptr + expert * N + offs_n)
            gate, up = tl.split(acc.reshape(BLOCK_N // 16, 2, 8).permute(0, 2, 1))
            value = gated_activation(gate, up, ACTIVATION).reshape(BLOCK_N // 2)
            offs_o = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            tl.store(out_ptr + pair.to(tl.int64) * OUT_COLS + offs_o, to_bf16(value, PTX))
    else:
        token = tl.program_id(1).to(tl.int64)
        total = tl.zeros((BLOCK_N,), dtype=tl.float32)
        for slot in range(TOP_K):
            pair = token * TOP_K + slot
            expert = tl.load(topk_ids_ptr + pair).to(tl.int64)
            if (expert >= 0) & (expert < NUM_EXPERTS):
                acc = dot_rows(
                    x_ptr + pair * STRIDE_X, w_ptr + expert * expert_stride,
                    w_scale_ptr + expert * (KP // GROUP * N), w_zero_ptr + expert * (KP // GROUP * N), offs_n,
                    N, K, KP, GROUP, W_BITS, INT8, HAS_ZERO, BLOCK_N, K_BLOCKS, PTX,
                )  # fmt: skip
                if HAS_BIAS:
                    acc += tl.load(bias_ptr + expert * N + offs_n)
                total += acc * tl.load(pair_weight_ptr + pair).to(tl.float32)
        tl.store(out_ptr + token * OUT_COLS + offs_n, to_bf16(total, PTX), mask=offs_n < OUT_COLS)
