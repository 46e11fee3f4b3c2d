"""The vector mainloop for a few tokens: no routing launch, no padding, each weight byte read once a pair.

A program takes BLOCK_N weight rows of one pair (GEMM1), or of every pair of one token in turn (GEMM2, which therefore
finishes the sum over top_k in fixed order). Decoding, activation and packed layout are those of the grouped path.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._device import decode_bf16, decode_int8, gated_activation, load_groups, to_bf16


@triton.jit
def dot_rows(
    x_ptr, w_ptr, s_ptr, z_ptr, offs_n,
    N: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, GROUP: tl.constexpr, W_BITS: tl.constexpr, INT8: tl.constexpr,
    HAS_ZERO: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """fp32 [BLOCK_N]: rows `offs_n` of one expert's matrix times one bf16 vector."""
    # Positions in K of the values that a row's bytes hold, in the order of the bytes (packing.py).
    i = tl.arange(0, 32)
    k_of_half = 16 * ((i >> 2) & 1) + 8 * ((i >> 1) & 1) + 2 * (i >> 3) + (i & 1)
    b = tl.arange(0, 64)
    k_of_byte = 32 * ((b >> 3) & 1) + 16 * ((b >> 2) & 1) + 4 * (b >> 4) + (b & 3)
    if W_BITS == 16:
        acc = tl.zeros((BLOCK_N, 128), dtype=tl.float32)
    elif INT8:
        acc = tl.zeros((BLOCK_N, 64), dtype=tl.float32)
    else:
        acc = tl.zeros((BLOCK_N, 32), dtype=tl.float32)
    for kb in tl.range(0, KP // 128, num_stages=NUM_STAGES):
        k = kb * 128
        if W_BITS == 16:
            offs_k = k + tl.arange(0, 128)
            x = tl.load(x_ptr + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)
            acc += tl.load(w_ptr + offs_n[:, None] * KP + offs_k[None, :]).to(tl.float32) * x[None, :]
        elif INT8:
            raw = tl.load(
                w_ptr.to(tl.pointer_type(tl.int8), bitcast=True)
                + (kb * N + offs_n[:, None]) * 64
                + tl.arange(0, 64)[None, :]
            )
            s0, s1, s2, s3 = load_groups(s_ptr, kb, offs_n, N, GROUP)
            lo, hi = decode_int8(raw, PTX)
            x_lo = tl.load(x_ptr + k + k_of_byte, mask=k + k_of_byte < K, other=0.0).to(tl.float32)
            x_hi = tl.load(x_ptr + k + 64 + k_of_byte, mask=k + 64 + k_of_byte < K, other=0.0).to(tl.float32)
            first = (k_of_byte < 32)[None, :]
            s_lo = tl.where(first, s0.to(tl.float32)[:, None], s1.to(tl.float32)[:, None]) * 0.0625
            s_hi = tl.where(first, s2.to(tl.float32)[:, None], s3.to(tl.float32)[:, None]) * 0.0625
            acc += lo.to(tl.float32) * s_lo * x_lo[None, :] + hi.to(tl.float32) * s_hi * x_hi[None, :]
        else:
            raw = tl.load(
                w_ptr.to(tl.pointer_type(tl.int16), bitcast=True)
                + (kb * N + offs_n[:, None]) * 32
                + tl.arange(0, 32)[None, :]
            )
            s0, s1, s2, s3 = load_groups(s_ptr, kb, offs_n, N, GROUP)
            s0 = tl.broadcast_to(s0[:, None], (BLOCK_N, 32))
            s1 = tl.broadcast_to(s1[:, None], (BLOCK_N, 32))
            s2 = tl.broadcast_to(s2[:, None], (BLOCK_N, 32))
            s3 = tl.broadcast_to(s3[:, None], (BLOCK_N, 32))
            if HAS_ZERO:
                z0, z1, z2, z3 = load_groups(z_ptr, kb, offs_n, N, GROUP)
                z0 = tl.broadcast_to(z0[:, None], (BLOCK_N, 32))
                z1 = tl.broadcast_to(z1[:, None], (BLOCK_N, 32))
                z2 = tl.broadcast_to(z2[:, None], (BLOCK_N, 32))
                z3 = tl.broadcast_to(z3[:, None], (BLOCK_N, 32))
            else:
                z0, z1, z2, z3 = s0, s1, s2, s3
            w0, w1, w2, w3 = decode_bf16(raw, s0, s1, s2, s3, z0, z1, z2, z3, HAS_ZERO, PTX)
            at = k + k_of_half
            x0 = tl.load(x_ptr + at, mask=at < K, other=0.0).to(tl.float32)
            x1 = tl.load(x_ptr + at + 32, mask=at + 32 < K, other=0.0).to(tl.float32)
            x2 = tl.load(x_ptr + at + 64, mask=at + 64 < K, other=0.0).to(tl.float32)
            x3 = tl.load(x_ptr + at + 96, mask=at + 96 < K, other=0.0).to(tl.float32)
            acc += w0.to(tl.float32) * x0[None, :] + w1.to(tl.float32) * x1[None, :]
            acc += w2.to(tl.float32) * x2[None, :] + w3.to(tl.float32) * x3[None, :]
    return tl.sum(acc, axis=1)


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
    BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr, PTX: tl.constexpr,
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
                N, K, KP, GROUP, W_BITS, INT8, HAS_ZERO, BLOCK_N, NUM_STAGES, PTX,
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
                    N, K, KP, GROUP, W_BITS, INT8, HAS_ZERO, BLOCK_N, NUM_STAGES, PTX,
                )  # fmt: skip
                if HAS_BIAS:
                    acc += tl.load(bias_ptr + expert * N + offs_n)
                total += acc * tl.load(pair_weight_ptr + pair).to(tl.float32)
        tl.store(out_ptr + token * OUT_COLS + offs_n, to_bf16(total, PTX), mask=offs_n < OUT_COLS)
