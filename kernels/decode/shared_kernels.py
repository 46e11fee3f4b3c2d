"""The router's kernel of a layer that has a shared expert: its programs compute that expert's first half too.

A shared expert takes every token, so its weights need not wait for the router. Its gate and up projections, the gated
activation and its own gate are computed by further programs of the router's launch, on multiprocessors that the router
leaves idle. The down projection is part of the experts' GEMM2 (`fused_experts`). So a shared expert costs no launch.

Letters: H hidden size, E experts, S width of the shared expert.
"""

from __future__ import annotations

import triton
import triton.language as tl

from executorch_moe.kernels._device import bf16_round, launches_before, to_bf16

from .device import choose_experts, dot_halves, load_router, router_logits, two_halves


@triton.jit
def shared_rows(program, S: tl.constexpr, BLOCK_S: tl.constexpr, STEPS: tl.constexpr):
    """Rows of the shared expert's first matrix that a program multiplies, int32 [STEPS * 2 * BLOCK_S]; -1 for none.

    For each of STEPS pieces: BLOCK_S rows of the gate projection, and those of the up projection for the same elements.
    The last program has the expert's own gate, row 2 * S. Negative programs have no rows.
    """
    near = tl.arange(0, STEPS * 2 * BLOCK_S) % (2 * BLOCK_S)
    element = program * BLOCK_S + near % BLOCK_S
    row = tl.where(element < S, element + near // BLOCK_S * S, -1)
    row = tl.where(program == (S + BLOCK_S - 1) // BLOCK_S, tl.where(near == 0, 2 * S, -1), row)
    return tl.where(program >= 0, row, -1)


@triton.jit
def load_shared(
    words_ptr, row, first, K: tl.constexpr, N: tl.constexpr, STEPS: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """STEPS pieces of BLOCK_K columns, from `first` on, of the rows of `shared_rows`: [STEPS, 2 * BLOCK_S, BLOCK_K]."""
    ROWS: tl.constexpr = row.shape[0] // STEPS
    piece = tl.arange(0, STEPS * ROWS) // ROWS
    columns = first + piece[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    inside = ((row >= 0) & (row < N))[:, None] & (columns < K)
    return tl.load(words_ptr + (row[:, None] * K + columns), mask=inside, other=0).reshape(STEPS, ROWS, BLOCK_K)


@triton.jit
def moe_one_token_shared_router(
    x_ptr,  # bf16 [H]
    norm_ptr,  # float [H]
    w_ptr,  # bf16 [E, H]
    gate_up_ptr,  # int8 or bf16 [N, H]: gate, up, and with HAS_OWN_GATE the expert's own gate
    gate_up_scale_ptr,  # fp32 [N], HAS_SCALE only
    normed_ptr,  # bf16 [H]: the experts' input
    logits_ptr,  # fp32 [E]
    arrivals_ptr,  # int32 [1], zero, CHOOSES only
    weights_ptr,  # fp32 [TOP_K], CHOOSES only
    ids_ptr,  # int64 [TOP_K], CHOOSES only
    shared_ptr,  # bf16 [S]: silu(gate) * up
    share_ptr,  # fp32 [1]: the sigmoid of the expert's own gate, or 1
    EPS: tl.constexpr,
    H: tl.constexpr, E: tl.constexpr, E_POW2: tl.constexpr, TOP_K: tl.constexpr, BLOCK_E: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_H: tl.constexpr, RANK_BLOCK: tl.constexpr,
    S: tl.constexpr, N: tl.constexpr, BLOCK_S: tl.constexpr, SHARED_STEPS: tl.constexpr, SHARED_BLOCK: tl.constexpr,
    HAS_OWN_GATE: tl.constexpr, HAS_SCALE: tl.constexpr, CHOOSES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Programs below ceil(E / BLOCK_E): `choose_experts`, or, without CHOOSES, `router_logits`. The others: BLOCK_S
    elements of the shared expert each.

    All weights are requested before the wait; a program masks those that are not its own. The arithmetic of the shared
    expert is that of `moe_one_token_matvec` with a norm.
    """
    ROUTERS: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    INT8: tl.constexpr = (gate_up_ptr.dtype.element_ty == tl.int8) & (H % 4 == 0)
    WIDTH: tl.constexpr = 4 if INT8 else 1
    CHUNK: tl.constexpr = SHARED_STEPS * SHARED_BLOCK
    program = tl.program_id(0)
    if INT8:
        words_ptr = gate_up_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    else:
        words_ptr = gate_up_ptr
    row = shared_rows(program - ROUTERS, S, BLOCK_S, SHARED_STEPS)
    shared = load_shared(words_ptr, row, 0, H // WIDTH, N, SHARED_STEPS, SHARED_BLOCK // WIDTH)
    w, norm = load_router(w_ptr, norm_ptr, program, H, E, BLOCK_E, STEPS, BLOCK_H)
    zero = launches_before(True, PTX)
    if program < ROUTERS:
        if CHOOSES:
            choose_experts(
                program, w, norm, x_ptr + zero, normed_ptr + zero, logits_ptr + zero, arrivals_ptr + zero,
                weights_ptr + zero, ids_ptr + zero, EPS, H, E, E_POW2, TOP_K, BLOCK_E, STEPS, BLOCK_H, RANK_BLOCK, PTX,
            )  # fmt: skip
        else:
            router_logits(
                program, w, norm, x_ptr + zero, normed_ptr + zero, logits_ptr + zero, EPS, H, E, BLOCK_E, STEPS,
                BLOCK_H, PTX,
            )  # fmt: skip
    else:
        part = program - ROUTERS
        sums = tl.zeros((2 * BLOCK_S,), dtype=tl.float32)
        squares = 0.0
        for chunk in tl.static_range((H + CHUNK - 1) // CHUNK):
            if chunk > 0:
                shared = load_shared(
                    words_ptr, row, chunk * (CHUNK // WIDTH), H // WIDTH, N, SHARED_STEPS, SHARED_BLOCK // WIDTH
                )
            offs_h = chunk * CHUNK + tl.arange(0, CHUNK)
            x = tl.load(x_ptr + zero + offs_h, mask=offs_h < H, other=0.0).to(tl.float32)
            squares += tl.sum(x * x, axis=0)
            x *= tl.load(norm_ptr + offs_h, mask=offs_h < H, other=0.0).to(tl.float32)
            if INT8:
                largest = tl.maximum(tl.max(tl.abs(x), axis=0), 1e-30)
                first, second = two_halves(x, 32512.0 / largest, CHUNK)
                first = first.reshape(SHARED_STEPS, SHARED_BLOCK // 4)[:, None, :]
                second = second.reshape(SHARED_STEPS, SHARED_BLOCK // 4)[:, None, :]
                units = tl.sum(dot_halves(shared, first, second, PTX), axis=0)
                sums += tl.sum(units.to(tl.float32), axis=1) * (largest / 32512.0)
            else:
                products = shared.to(tl.float32) * x.reshape(SHARED_STEPS, SHARED_BLOCK)[:, None, :]
                sums += tl.sum(tl.sum(products, axis=0), axis=1)
        sums *= tl.rsqrt(squares / H + EPS)
        near = tl.arange(0, 2 * BLOCK_S)
        element = part * BLOCK_S + near % BLOCK_S
        own = part == (S + BLOCK_S - 1) // BLOCK_S
        if HAS_SCALE:
            place = tl.where(own, 2 * S + near * 0, element + near // BLOCK_S * S)
            sums *= tl.load(gate_up_scale_ptr + place, mask=place < N, other=0.0)
        sums = bf16_round(sums, PTX)
        gate, up = tl.split(sums.reshape(2, BLOCK_S).permute(1, 0))
        elements = part * BLOCK_S + tl.arange(0, BLOCK_S)
        value = gate / (1.0 + tl.exp(-gate)) * up
        tl.store(shared_ptr + zero + elements, to_bf16(value, PTX), mask=elements < S)
        share = 1.0
        if HAS_OWN_GATE:
            share = 1.0 / (1.0 + tl.exp(-tl.sum(tl.where(near == 0, sums, 0.0), axis=0)))
        tl.store(share_ptr + zero, share, mask=own)
