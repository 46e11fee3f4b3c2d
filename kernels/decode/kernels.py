"""Kernels for decoding one token: everything in a decoder layer except the experts.

A decode step at batch 1 is a chain of short kernels, each of which costs time. So each operator fuses several steps:
    one_token_attention      norm; projection of query, key and value; their norm and rotation; attention over the
                             cache; output gate
    one_token_router         output projection plus residual; norm; router; top-k; softmax
    one_token_shared_router  the same, and the first half of a shared expert (shared_kernels.py)
    one_token_linear         a matrix-vector product
    one_token_norm_linear    the same of a norm
The first three take two launches. In the second one, the last program to finish combines the results of all programs in
a fixed order, so the same input gives the same bits. The first launch sets the counter of finished programs to zero.
Attention's second launch is in attention_kernels.py.

Letters: H hidden size, E experts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from executorch_moe.kernels._device import bf16_round, launches_before, to_bf16

from .device import choose_experts, dot_halves, load_pieces, load_router, router_logits, two_halves


@triton.jit
def moe_one_token_matvec(
    x_ptr,  # bf16 [K]
    add_ptr,  # bf16 [K], HAS_ADD only: added to x
    norm_ptr,  # bf16 [K], HAS_NORM only: weight of the RMS norm
    w_ptr,  # int8 or bf16 [N, K]
    scale_ptr,  # fp32 [N], HAS_SCALE only
    residual_ptr,  # bf16 [N], HAS_RESIDUAL only
    sum_ptr,  # bf16 [K], HAS_NORM only: x + add
    out_ptr,  # bf16 [N]
    arrivals_ptr,  # int32 [NUM_ARRIVALS], set to zero
    position_ptr, key_ptr, value_ptr,  # HAS_AHEAD only: the next launch reads them before its wait
    EPS: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, STEPS: tl.constexpr, BLOCK_K: tl.constexpr,
    NUM_ARRIVALS: tl.constexpr,
    HAS_ADD: tl.constexpr, HAS_NORM: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_AHEAD: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """out = W @ norm(x + add) * scale + residual; program i does rows [i * BLOCK_N, (i + 1) * BLOCK_N).

    The norm's factor is one number, so it is applied to the sums. A chunk of K is STEPS pieces of BLOCK_K; one warp has
    all pieces of a row, so nothing is summed across warps. int8 weights are multiplied as int8: x becomes 16-bit
    integers in units of the chunk's largest value / 32512, which is finer than bf16 for values from 1/64 of it on.
    """
    INT8: tl.constexpr = (w_ptr.dtype.element_ty == tl.int8) & (K % 4 == 0)
    CHUNK: tl.constexpr = STEPS * BLOCK_K
    # Words of four weights, if they are int8.
    WIDTH: tl.constexpr = 4 if INT8 else 1
    program = tl.program_id(0)
    offs_n = program * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = offs_n < N
    if INT8:
        words_ptr = w_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    else:
        words_ptr = w_ptr
    out = tl.zeros((BLOCK_N,), dtype=tl.float32)
    squares = 0.0
    for chunk in tl.static_range((K + CHUNK - 1) // CHUNK):
        w = load_pieces(
            words_ptr, program * BLOCK_N, chunk * (CHUNK // WIDTH), N, K // WIDTH, BLOCK_N, STEPS, BLOCK_K // WIDTH
        )
        offs_k = chunk * CHUNK + tl.arange(0, CHUNK)
        inside = offs_k < K
        if HAS_NORM:
            norm = tl.load(norm_ptr + offs_k, mask=inside, other=0.0)
        if chunk == 0:  # the loads of the first weights are in flight
            if HAS_SCALE:
                scale = tl.load(scale_ptr + offs_n, mask=rows, other=0.0)
            zero = launches_before(True, PTX)
            x_ptr += zero
            add_ptr += zero
            residual_ptr += zero
            arrivals_ptr += zero
            sum_ptr += zero
            out_ptr += zero
            if HAS_RESIDUAL:
                residual = tl.load(residual_ptr + offs_n, mask=rows, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + offs_k, mask=inside, other=0.0).to(tl.float32)
        if HAS_ADD:
            x = bf16_round(x + tl.load(add_ptr + offs_k, mask=inside, other=0.0).to(tl.float32), PTX)
        if HAS_NORM:
            tl.store(sum_ptr + offs_k, to_bf16(x, PTX), mask=inside & (program == 0))
            squares += tl.sum(x * x, axis=0)
            x *= norm.to(tl.float32)
        if INT8:
            largest = tl.maximum(tl.max(tl.abs(x), axis=0), 1e-30)
            first, second = two_halves(x, 32512.0 / largest, CHUNK)
            first = first.reshape(STEPS, BLOCK_K // 4)[:, None, :]
            second = second.reshape(STEPS, BLOCK_K // 4)[:, None, :]
            units = tl.sum(dot_halves(w, first, second, PTX), axis=0)
            out += tl.sum(units.to(tl.float32), axis=1) * (largest / 32512.0)
        else:
            out += tl.sum(tl.sum(w.to(tl.float32) * x.reshape(STEPS, BLOCK_K)[:, None, :], axis=0), axis=1)
    if HAS_NORM:
        out *= tl.rsqrt(squares / K + EPS)
    if HAS_SCALE:
        out *= scale
    if HAS_RESIDUAL:
        out = bf16_round(out, PTX) + residual
    tl.store(out_ptr + offs_n, to_bf16(out, PTX), mask=rows)
    if NUM_ARRIVALS > 0:
        arrivals = tl.arange(0, NUM_ARRIVALS)
        tl.store(arrivals_ptr + arrivals, tl.zeros_like(arrivals), mask=(arrivals >= 0) & (program == 0))
    if HAS_AHEAD and program == 0:
        # Inductor orders launches by their reads and writes: these reads keep writes to the cache before this launch.
        tl.load(position_ptr + zero, volatile=True)
        tl.load(key_ptr + zero, volatile=True)
        tl.load(value_ptr + zero, volatile=True)


@triton.jit
def moe_one_token_router(
    x_ptr,  # bf16 [H]
    norm_ptr,  # bf16 [H]
    w_ptr,  # bf16 [E, H]
    normed_ptr,  # bf16 [H]: the experts' input
    logits_ptr,  # fp32 [E]
    arrivals_ptr,  # int32 [1], zero
    weights_ptr,  # fp32 [TOP_K]
    ids_ptr,  # int64 [TOP_K]
    EPS: tl.constexpr,
    H: tl.constexpr, E: tl.constexpr, E_POW2: tl.constexpr, TOP_K: tl.constexpr, BLOCK_E: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_H: tl.constexpr, RANK_BLOCK: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """RMS norm and logits, BLOCK_E experts a program; see `choose_experts`."""
    program = tl.program_id(0)
    w, norm = load_router(w_ptr, norm_ptr, program, H, E, BLOCK_E, STEPS, BLOCK_H)
    zero = launches_before(True, PTX)
    choose_experts(
        program, w, norm, x_ptr + zero, normed_ptr + zero, logits_ptr + zero, arrivals_ptr + zero, weights_ptr + zero,
        ids_ptr + zero, EPS, H, E, E_POW2, TOP_K, BLOCK_E, STEPS, BLOCK_H, RANK_BLOCK, PTX,
    )  # fmt: skip


@triton.jit
def moe_one_token_logits(
    x_ptr,  # bf16 [H]
    norm_ptr,  # bf16 [H]
    w_ptr,  # bf16 [E, H]
    normed_ptr,  # bf16 [H]: the experts' input
    logits_ptr,  # fp32 [E]
    EPS: tl.constexpr,
    H: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_H: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """RMS norm and logits, BLOCK_E experts a program, without a choice: `moe_matvec` ranks the logits itself."""
    program = tl.program_id(0)
    w, norm = load_router(w_ptr, norm_ptr, program, H, E, BLOCK_E, STEPS, BLOCK_H)
    zero = launches_before(True, PTX)
    router_logits(
        program, w, norm, x_ptr + zero, normed_ptr + zero, logits_ptr + zero, EPS, H, E, BLOCK_E, STEPS, BLOCK_H, PTX
    )
