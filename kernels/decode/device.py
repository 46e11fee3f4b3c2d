"""Device functions of the kernels for one token.

PTX: see `executorch_moe.kernels._device`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from executorch_moe.kernels._device import bf16_round, dot_two, to_bf16


@triton.jit
def dot_halves(w, first, second, PTX: tl.constexpr):
    """int32 words of four int8 times four int16 -> the sum of the products, int32.

    first, second: words of two int16 each, for the lower and the upper two bytes of `w`.
    """
    if PTX:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 sum; dp2a.lo.s32.s32 sum, $2, $1, 0; dp2a.hi.s32.s32 $0, $3, $1, sum; }",
            "=r,r,r,r",
            [w, first, second],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        return dot_two(first, w, 0, 1) + dot_two(second, w, 2, 3)


@triton.jit
def two_halves(x, per_unit, SIZE: tl.constexpr):
    """fp32 [SIZE] in units as int16: words of elements 4i and 4i + 1, and of 4i + 2 and 4i + 3, int32 [SIZE/4] each."""
    # Adding 1.5 * 2^23 puts the nearest integer into the lowest bits.
    units = (x * per_unit + 12582912.0).to(tl.int32, bitcast=True)
    # A sum: after a split, Triton would move the change of layouts that follows to before `x`, and each warp repeat it.
    pairs = tl.sum((units & 65535).reshape(SIZE // 2, 2) << (16 * tl.arange(0, 2))[None, :], axis=1)
    return tl.split(pairs.reshape(SIZE // 4, 2))


@triton.jit
def load_pieces(
    w_ptr, row, first,
    N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, STEPS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """STEPS * BLOCK_K columns, from `first` on, of BLOCK_N rows, from `row` on, of a matrix [N, K].

    Returns [STEPS, BLOCK_N, BLOCK_K]. Loaded as a matrix of STEPS * BLOCK_N rows, which Triton distributes over warps:
    one warp gets all pieces of a row, so nothing is summed across warps. With a load of three dimensions, Triton 3.7
    distributes the pieces over warps.
    """
    index = tl.arange(0, STEPS * BLOCK_N)
    near = index % BLOCK_N
    columns = first + (index // BLOCK_N)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    inside = (row + near < N)[:, None] & (columns < K)
    # 64 bits for the first row only: the matrix of a vocabulary may have more elements than 32 bits can address.
    w = tl.load(w_ptr + row.to(tl.int64) * K + (near[:, None] * K + columns), mask=inside, other=0)
    return w.reshape(STEPS, BLOCK_N, BLOCK_K)


@triton.jit
def load_router(
    w_ptr, norm_ptr, program,
    H: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, STEPS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """A program's rows of the router, [STEPS, BLOCK_E, BLOCK_H], and the norm, fp32 [STEPS, BLOCK_H].

    Programs from ceil(E / BLOCK_E) on load no rows.
    """
    offs_h = tl.arange(0, STEPS)[:, None] * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]
    w = load_pieces(w_ptr, program * BLOCK_E, 0, E, H, BLOCK_E, STEPS, BLOCK_H)
    return w, tl.load(norm_ptr + offs_h, mask=offs_h < H, other=0.0).to(tl.float32)


@triton.jit
def router_logits(
    program, w, norm, x_ptr, normed_ptr, logits_ptr,
    EPS: tl.constexpr,
    H: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, STEPS: tl.constexpr, BLOCK_H: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """Norm and logits of program `program` of the router. Logits are rounded to bf16, as a linear layer does.

    Args:
        w, norm: of `load_router`. The pointers are those of `moe_one_token_router`, after its wait.
    """
    offs_h = tl.arange(0, STEPS)[:, None] * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]  # as in moe_one_token_matvec
    inside = offs_h < H
    offs_e = program * BLOCK_E + tl.arange(0, BLOCK_E)
    x = tl.load(x_ptr + offs_h, mask=inside, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(tl.sum(x * x, axis=0), axis=0) / H + EPS)
    x = bf16_round(x * factor * norm, PTX)
    tl.store(normed_ptr + offs_h, to_bf16(x, PTX), mask=inside & (program == 0))
    logits = tl.sum(tl.sum(w.to(tl.float32) * x[:, None, :], axis=0), axis=1)
    tl.store(logits_ptr + offs_e, bf16_round(logits, PTX), mask=offs_e < E)


@triton.jit
def choose_experts(
    program, w, norm, x_ptr, normed_ptr, logits_ptr, arrivals_ptr, weights_ptr, ids_ptr,
    EPS: tl.constexpr,
    H: tl.constexpr, E: tl.constexpr, E_POW2: tl.constexpr, TOP_K: tl.constexpr, BLOCK_E: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_H: tl.constexpr, RANK_BLOCK: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """`router_logits`; the last program does top-k and the softmax over the chosen experts.

    Of experts with equal logits, the lower one comes first. NaN ranks as infinity: TOP_K different experts are chosen
    for any logits, and the weights are NaN.

    Args:
        w, norm: of `load_router`. The pointers are those of `moe_one_token_router`, after its wait.
    """
    PROGRAMS: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    router_logits(program, w, norm, x_ptr, normed_ptr, logits_ptr, EPS, H, E, BLOCK_E, STEPS, BLOCK_H, PTX)
    tl.debug_barrier()
    arrived = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel", scope="gpu")
    if arrived == PROGRAMS - 1:
        expert = tl.arange(0, E_POW2)
        mine = tl.load(logits_ptr + expert, mask=expert < E, other=-float("inf"), cache_modifier=".cg")
        # An expert's place is the number of experts before it: one comparison with all, no chain of top_k maxima.
        rank = tl.where(mine == mine, mine, float("inf"))
        earlier = tl.zeros((RANK_BLOCK, E_POW2), dtype=tl.int32)
        for first in tl.static_range(0, E_POW2, RANK_BLOCK):
            other = first + tl.arange(0, RANK_BLOCK)
            theirs = tl.load(logits_ptr + other, mask=other < E, other=-float("inf"), cache_modifier=".cg")
            theirs = tl.where(theirs == theirs, theirs, float("inf"))
            before = theirs[:, None] > rank[None, :]
            before = before | ((theirs[:, None] == rank[None, :]) & (other[:, None] < expert[None, :]))
            earlier += before.to(tl.int32)
        place = tl.sum(earlier, axis=0)
        chosen = (place < TOP_K) & (expert < E)
        share = tl.where(chosen, tl.exp(mine - tl.max(mine, axis=0)), 0.0)
        tl.store(weights_ptr + place, share / tl.sum(share, axis=0), mask=chosen)
        tl.store(ids_ptr + place, expert.to(tl.int64), mask=chosen)


@triton.jit
def next_key(logits_ptr, below, E: tl.constexpr):
    """The largest of the experts' keys that are below `below`, int32; each warp computes it without the others.

    Keys are in the order of the logits, and of experts with equal logits the lower one has the larger key. The upper
    half of a key is the logit, a bf16, made an integer of the same order, with NaN as infinity and -0 as 0. The lower
    half is 65535 - expert.

    Args:
        logits_ptr: fp32 [E], each a bf16. below: int32; 2147483647 for the first.
    """
    LOWEST: tl.constexpr = -2147483648
    most = tl.full((32,), LOWEST, dtype=tl.int32)
    for first in tl.static_range(0, E, 32):
        expert = first + tl.arange(0, 32)
        logit = tl.load(logits_ptr + expert, mask=expert < E, other=0.0)
        logit = tl.where(logit == logit, logit, float("inf"))
        bits = tl.where(logit == 0.0, 0.0, logit).to(tl.int32, bitcast=True)
        key = (tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) & -65536) | (65535 - expert)
        most = tl.maximum(most, tl.where((expert < E) & (key < below), key, LOWEST))
    return tl.max(most, axis=0)


@triton.jit
def expert_of_key(key):
    """The expert of a key of `next_key`, int32."""
    return 65535 - (key & 65535)


@triton.jit
def logit_of_key(key):
    """The logit of a key of `next_key`, fp32."""
    upper = key & -65536
    return tl.where(upper < 0, upper ^ 0x7FFF0000, upper).to(tl.float32, bitcast=True)


@triton.jit
def expert_at(logits_ptr, place, E: tl.constexpr, TOP_K: tl.constexpr):
    """The expert at `place` of the TOP_K with the largest logits, int32."""
    key = next_key(logits_ptr, 2147483647, E)
    for i in tl.static_range(1, TOP_K):
        if place >= i:
            key = next_key(logits_ptr, key, E)
    return expert_of_key(key)


@triton.jit
def dense_rows(
    x_ptr, w_ptr, scale_ptr, row,
    N: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, HAS_SCALE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Rows `row`, int32 [R], of W @ x * scale, fp32 [R]; see `moe_one_token_matvec` for the arithmetic of int8.

    Args:
        x_ptr: bf16 [K]. w_ptr: int8 or bf16 [N, K]. scale_ptr: fp32 [N], HAS_SCALE only.
        BLOCK_K: K rounded up to a power of two.
    """
    INT8: tl.constexpr = (w_ptr.dtype.element_ty == tl.int8) & (K % 4 == 0)
    WIDTH: tl.constexpr = 4 if INT8 else 1
    if INT8:
        words_ptr = w_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    else:
        words_ptr = w_ptr
    columns = tl.arange(0, BLOCK_K // WIDTH)
    inside = (row < N)[:, None] & (columns < K // WIDTH)[None, :]
    w = tl.load(words_ptr + (row[:, None] * (K // WIDTH) + columns[None, :]), mask=inside, other=0)
    offs_k = tl.arange(0, BLOCK_K)
    x = tl.load(x_ptr + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)
    if INT8:
        largest = tl.maximum(tl.max(tl.abs(x), axis=0), 1e-30)
        first, second = two_halves(x, 32512.0 / largest, BLOCK_K)
        units = dot_halves(w, first[None, :], second[None, :], PTX)
        out = tl.sum(units.to(tl.float32), axis=1) * (largest / 32512.0)
    else:
        out = tl.sum(w.to(tl.float32) * x[None, :], axis=1)
    if HAS_SCALE:
        out *= tl.load(scale_ptr + row, mask=row < N, other=0.0)
    return out
