"""Passes over activations: int8 quantization before a GEMM, and the sum over top_k after GEMM2."""

from __future__ import annotations

import triton
import triton.language as tl

from executorch_moe.kernels._device import launches_before, to_bf16


@triton.jit
def moe_quantize_rows(
    x_ptr,  # bf16 [rows, K]
    q_ptr,  # int8 [rows, KP]
    scale_ptr,  # fp32 [rows, NUM_GROUPS]
    K: tl.constexpr, KP: tl.constexpr, ACT_GROUP: tl.constexpr, NUM_GROUPS: tl.constexpr, GROUPS_POW2: tl.constexpr,
    MAX_RATIO: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Quantize one row to int8: q = round-half-even(x / scale).

    A group's scale is max |x| / 127, but at least the largest scale of its row / MAX_RATIO.
    Each token is quantized once, and the GEMM gathers its row for each of its experts. The middle two of every four
    values are swapped, as in the packed weights (packing/fragments.py).
    """
    x_ptr += launches_before(False, PTX)
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS_POW2)
    offs = group[:, None] * ACT_GROUP + tl.arange(0, ACT_GROUP)[None, :]
    x = tl.load(x_ptr + row * K + offs, mask=offs < K, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(x), axis=1)
    largest = tl.maximum(largest, tl.max(largest, axis=0) / MAX_RATIO)
    scale = tl.maximum(largest / 127.0, 1e-12)
    # Adding and subtracting 1.5 * 2^23 rounds to the nearest even integer in fp32.
    q = (x / scale[:, None] + 12582912.0) - 12582912.0
    swapped = q.reshape(GROUPS_POW2, ACT_GROUP // 4, 2, 2).permute(0, 1, 3, 2).reshape(GROUPS_POW2, ACT_GROUP)
    tl.store(q_ptr + row * KP + offs, swapped.to(tl.int8), mask=offs < KP)
    tl.store(scale_ptr + row * NUM_GROUPS + group, scale, mask=group < NUM_GROUPS)


@triton.jit
def moe_sum_pairs(
    y_ptr,  # bf16 [P, H]: weighted expert outputs; undefined for dropped pairs
    topk_ids_ptr,  # int32 or int64 [P]
    out_ptr,  # bf16 [T, H]
    H: tl.constexpr, TOP_K: tl.constexpr, NUM_EXPERTS: tl.constexpr, BLOCK_H: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Sum a token's top_k pair outputs in fp32, in the order of its choices."""
    zero = launches_before(False, PTX)
    y_ptr += zero
    topk_ids_ptr += zero
    token = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = offs < H
    acc = tl.zeros((BLOCK_H,), dtype=tl.float32)
    for slot in tl.static_range(TOP_K):
        expert = tl.load(topk_ids_ptr + token * TOP_K + slot)
        valid = (expert >= 0) & (expert < NUM_EXPERTS)
        acc += tl.load(y_ptr + (token * TOP_K + slot) * H + offs, mask=mask & valid, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * H + offs, to_bf16(acc, PTX), mask=mask)
