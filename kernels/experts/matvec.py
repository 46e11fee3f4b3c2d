"""The matrix-vector kernel: GEMM1 and GEMM2 of one token, or a few, without tensor cores.

With one row of activations, an MMA has seven empty columns, and its chain of K blocks keeps few weights in flight. Here
a program requests all its packed weights at once, into registers, and multiplies them there: one instruction (dp2a)
does two 4-bit codes and two 16-bit activations. For that, each thread turns the 32 activations of its columns into
integers in units of their largest absolute value / 32512, which is finer than bf16 for values from 1/64 of it on.

Two launches. GEMM1: a program does some rows of one pair. GEMM2: a program does some rows of all top_k experts of a
token and adds them, so nothing is summed across programs. Letters as in tile.py. t, c, h, l and n are digits of a K
block's positions in packed words, see packing/fragments.py: thread t of an MMA row has four words (c, h) of two
halfwords l, of four nibbles n each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from executorch_moe.kernels._device import gated_activation, larger, launches_before, to_bf16
from executorch_moe.kernels.decode.device import dense_rows, expert_at, expert_of_key, logit_of_key, next_key

from .microscaled import sum_e2m1
from .operands import dot_codes, dot_codes_apart


@triton.jit
def load_pair(words_ptr, valid, words, OFFSET: tl.constexpr, MASKED: tl.constexpr):
    """Two neighboring activations, fp32 each; 0 where not valid or, if MASKED, where OFFSET is not below `words`."""
    if MASKED:
        valid = valid & (words > OFFSET)
    pair = tl.load(words_ptr + OFFSET, mask=valid, other=0)
    return (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)


@triton.jit
def load_word(x_ptr, valid, words, FIRST: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, MASKED: tl.constexpr):
    """The eight activations of a packed word, and their largest absolute value, fp32.

    Args:
        FIRST: offset of the activations of nibbles 0 and 4, in pairs. N1, N2: from there to those of nibbles 1 and 2.
    """
    a0, b0 = load_pair(x_ptr, valid, words, FIRST, MASKED)
    a1, b1 = load_pair(x_ptr, valid, words, FIRST + N1, MASKED)
    a2, b2 = load_pair(x_ptr, valid, words, FIRST + N2, MASKED)
    a3, b3 = load_pair(x_ptr, valid, words, FIRST + N1 + N2, MASKED)
    most = larger(larger(tl.abs(a0), tl.abs(b0)), larger(tl.abs(a1), tl.abs(b1)))
    more = larger(larger(tl.abs(a2), tl.abs(b2)), larger(tl.abs(a3), tl.abs(b3)))
    return a0, b0, a1, b1, a2, b2, a3, b3, larger(most, more)


@triton.jit
def pack_units(x, y, per_unit):
    """fp32 [BATCH, 4] -> int32 [1, BATCH, 1, 4]: round(x * per_unit) as low int16, round(y * per_unit) as high one.

    Adding 1.5 * 2^23 rounds, and leaves the integer in the lowest bits.
    """
    low = (x * per_unit + 12582912.0).to(tl.int32, bitcast=True)
    high = (y * per_unit + 12582912.0).to(tl.int32, bitcast=True)
    return ((low & 65535) | (high << 16))[None, :, None, :]


@triton.jit
def quantize_word(a0, b0, a1, b1, a2, b2, a3, b3, per_unit, APART: tl.constexpr):
    """Words of two int16 for `dot_codes` or, if APART, for `dot_codes_apart`."""
    if APART:
        p0, p1 = pack_units(a0, b0, per_unit), pack_units(a1, b1, per_unit)
        p2, p3 = pack_units(a2, b2, per_unit), pack_units(a3, b3, per_unit)
    else:
        p0, p1 = pack_units(a0, a2, per_unit), pack_units(b0, b2, per_unit)
        p2, p3 = pack_units(a1, a3, per_unit), pack_units(b1, b3, per_unit)
    return p0, p1, p2, p3


@triton.jit
def load_quarter(
    ptr, row, block, valid, QUARTER: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr,
    REPS: tl.constexpr, BATCH: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    """Scales (or zeros) of quarter QUARTER of K blocks, bf16 [REPS, BATCH, NEAR, 1].

    Args:
        ptr: to the scales of each element's expert. row, block: int32, valid: bool, all [REPS * BATCH * NEAR].
    """
    group = (block * 128 + QUARTER * 32) // GROUP
    # Rows r and r + 8 of 16 are neighbors in memory.
    place = (row // 16) * 16 + (row % 8) * 2 + (row % 16) // 8
    return tl.load(ptr + (group * N + place), mask=valid, other=0.0).reshape(REPS, BATCH, NEAR, 1)


@triton.jit
def load_quarters(
    ptr, row, block, valid, N: tl.constexpr, GROUP: tl.constexpr,
    REPS: tl.constexpr, BATCH: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    """`load_quarter` of the quarters 0..3. Quarters of one group are the same tensor."""
    q0 = load_quarter(ptr, row, block, valid, 0, N, GROUP, REPS, BATCH, NEAR)
    if GROUP >= 128:
        return q0, q0, q0, q0
    elif GROUP == 64:
        q2 = load_quarter(ptr, row, block, valid, 2, N, GROUP, REPS, BATCH, NEAR)
        return q0, q0, q2, q2
    else:
        tl.static_assert(GROUP == 32)
        q1 = load_quarter(ptr, row, block, valid, 1, N, GROUP, REPS, BATCH, NEAR)
        q2 = load_quarter(ptr, row, block, valid, 2, N, GROUP, REPS, BATCH, NEAR)
        q3 = load_quarter(ptr, row, block, valid, 3, N, GROUP, REPS, BATCH, NEAR)
        return q0, q1, q2, q3


@triton.jit
def load_chunk(
    chunk, w_ptr, w_scale_ptr, w_zero_ptr, expert, row, block, valid,
    N: tl.constexpr, KP: tl.constexpr, GROUP: tl.constexpr, INT8_ORDER: tl.constexpr, HAS_ZERO: tl.constexpr,
    REPS: tl.constexpr, BATCH: tl.constexpr, NEAR: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Scales, zeros and packed words of chunk `chunk` of K.

    The order decides the layout: Triton gives the products that of the last large load before them, which must be the
    one of the weights, or they would be moved between threads.

    Args:
        expert: int64, row, block: int32, valid: bool, all [REPS * BATCH * NEAR]; block: within a chunk.

    Returns:
        Four scales (MXFP4: a word, four times) and four zeros, as of `load_quarters`, and int32
        [REPS, BATCH, NEAR, 4, 2, 2] (t, c, h).
    """
    block += chunk * BLOCKS
    valid = valid & (block < KP // 128)
    if w_scale_ptr.dtype.element_ty == tl.uint8:  # MXFP4: one word for the scales of a row and K block
        exponents = w_scale_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + (
            expert * (KP // 128 * N) + block * N + row
        )
        s0 = tl.load(exponents, mask=valid, other=0).reshape(REPS, BATCH, NEAR, 1)
        s1, s2, s3 = s0, s0, s0
    else:
        scales = w_scale_ptr + expert * ((KP // GROUP + INT8_ORDER) * N)
        s0, s1, s2, s3 = load_quarters(scales, row, block, valid, N, GROUP, REPS, BATCH, NEAR)
    if HAS_ZERO:
        zeros = w_zero_ptr + expert * (KP // GROUP * N)
        z0, z1, z2, z3 = load_quarters(zeros, row, block, valid, N, GROUP, REPS, BATCH, NEAR)
    else:
        z0, z1, z2, z3 = s0, s1, s2, s3
    words_ptr = w_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    words_ptr += expert * (N * KP // 8) + (block * (N * 16) + row * 16)
    word = tl.arange(0, 16)[None, :]
    # .cg: each weight is read once.
    w = tl.load(words_ptr[:, None] + word, mask=valid[:, None] & (word >= 0), other=0, cache_modifier=".cg")
    return s0, s1, s2, s3, z0, z1, z2, z3, w.reshape(REPS, BATCH, NEAR, 4, 2, 2)


@triton.jit
def multiply_chunk(
    chunk, x_ptr, x_row, block, valid, s0, s1, s2, s3, z0, z1, z2, z3, w,
    K: tl.constexpr, KP: tl.constexpr, STRIDE_X: tl.constexpr, GROUP: tl.constexpr, INT8_ORDER: tl.constexpr,
    HAS_ZERO: tl.constexpr, BLOCKS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Products of one chunk of K, one sum for each thread of a row: fp32 [REPS, BATCH, NEAR, 4].

    Args:
        x_row, block: int32, valid: bool, [BATCH]: row of x and K block within a chunk.
        s0 to w: of `load_chunk`.
    """
    # Small loads, so Triton makes them in the layout of their use, without a trip through shared memory.
    MX: tl.constexpr = s0.dtype == tl.int32
    APART: tl.constexpr = GROUP < 128
    MASKED: tl.constexpr = K != KP
    H: tl.constexpr = 8 if INT8_ORDER else 4
    C: tl.constexpr = 16 if INT8_ORDER else 8
    N1: tl.constexpr = 32 if INT8_ORDER else 16
    N2: tl.constexpr = 1 if INT8_ORDER else 32
    block += chunk * BLOCKS
    first = block[:, None] * 64 + tl.arange(0, 4)[None, :] * (2 if INT8_ORDER else 1)
    words = K // 2 - first
    ok = (valid & (block < KP // 128))[:, None] & (first >= 0)
    x_ptr = x_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + (x_row.to(tl.int64)[:, None] * (STRIDE_X // 2) + first)
    c0, d0, c1, d1, c2, d2, c3, d3, m0 = load_word(x_ptr, ok, words, 0, N1, N2, MASKED)
    e0, f0, e1, f1, e2, f2, e3, f3, m1 = load_word(x_ptr, ok, words, H, N1, N2, MASKED)
    g0, h0, g1, h1, g2, h2, g3, h3, m2 = load_word(x_ptr, ok, words, C, N1, N2, MASKED)
    i0, j0, i1, j1, i2, j2, i3, j3, m3 = load_word(x_ptr, ok, words, C + H, N1, N2, MASKED)
    largest = larger(larger(larger(m0, m1), larger(m2, m3)), 1e-30)  # NaN and infinity make the sums NaN
    per_unit = 32512.0 / largest
    unit = (largest * (1.0 / (32512.0 * (2.0 if MX else 16.0))))[None, :, None, :]
    p0, p1, p2, p3 = quantize_word(c0, d0, c1, d1, c2, d2, c3, d3, per_unit, APART)
    q0, q1, q2, q3 = quantize_word(e0, f0, e1, f1, e2, f2, e3, f3, per_unit, APART)
    r0, r1, r2, r3 = quantize_word(g0, h0, g1, h1, g2, h2, g3, h3, per_unit, APART)
    t0, t1, t2, t3 = quantize_word(i0, j0, i1, j1, i2, j2, i3, j3, per_unit, APART)
    even, odd = tl.split(w)  # by h, then by c
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    none = tl.zeros_like(w0)
    if MX:
        sums = sum_e2m1(
            w0, w1, w2, w3, p0, p1, p2, p3, q0, q1, q2, q3, r0, r1, r2, r3, t0, t1, t2, t3, s0, PTX,
        )  # fmt: skip
    elif not APART:
        acc = dot_codes(w0, p0, p1, p2, p3, none, PTX)
        acc = dot_codes(w1, q0, q1, q2, q3, acc, PTX)
        acc = dot_codes(w2, r0, r1, r2, r3, acc, PTX)
        acc = dot_codes(w3, t0, t1, t2, t3, acc, PTX)
        sums = acc.to(tl.float32) * s0.to(tl.float32)
    else:
        a0, a1, a2, a3 = dot_codes_apart(w0, p0, p1, p2, p3, none, none, none, none, PTX)
        a0, a1, a2, a3 = dot_codes_apart(w1, q0, q1, q2, q3, a0, a1, a2, a3, PTX)
        if INT8_ORDER:  # quarter 2 * (n % 2) + c
            b0, b1, b2, b3 = dot_codes_apart(w2, r0, r1, r2, r3, none, none, none, none, PTX)
            b0, b1, b2, b3 = dot_codes_apart(w3, t0, t1, t2, t3, b0, b1, b2, b3, PTX)
            a0, a1, a2, a3 = a0 + a2, b0 + b2, a1 + a3, b1 + b3
        else:
            a0, a1, a2, a3 = dot_codes_apart(w2, r0, r1, r2, r3, a0, a1, a2, a3, PTX)
            a0, a1, a2, a3 = dot_codes_apart(w3, t0, t1, t2, t3, a0, a1, a2, a3, PTX)
        if GROUP == 64:
            sums = (a0 + a1).to(tl.float32) * s0.to(tl.float32) + (a2 + a3).to(tl.float32) * s2.to(tl.float32)
        else:
            sums = a0.to(tl.float32) * s0.to(tl.float32) + a1.to(tl.float32) * s1.to(tl.float32)
            sums += a2.to(tl.float32) * s2.to(tl.float32) + a3.to(tl.float32) * s3.to(tl.float32)
    sums *= unit
    if HAS_ZERO:
        x0 = (c0 + d0 + e0 + f0 + g0 + h0 + i0 + j0)[None, :, None, :]
        x1 = (c1 + d1 + e1 + f1 + g1 + h1 + i1 + j1)[None, :, None, :]
        x2 = (c2 + d2 + e2 + f2 + g2 + h2 + i2 + j2)[None, :, None, :]
        x3 = (c3 + d3 + e3 + f3 + g3 + h3 + i3 + j3)[None, :, None, :]
        if GROUP >= 128:
            sums += z0.to(tl.float32) * (x0 + x1 + x2 + x3)
        elif GROUP == 64:
            sums += z0.to(tl.float32) * (x0 + x1) + z2.to(tl.float32) * (x2 + x3)
        else:
            sums += z0.to(tl.float32) * x0 + z1.to(tl.float32) * x1 + z2.to(tl.float32) * x2 + z3.to(tl.float32) * x3
    return sums


@triton.jit
def moe_matvec(
    x_ptr,  # GEMM1: bf16 [T, STRIDE_X]; GEMM2: bf16 [P, KP], in pair order
    w_ptr,  # uint8 [E, KP/128, N, 64] packed
    w_scale_ptr,  # bf16 [E, KP/GROUP, N]; INT8_ORDER: one group more
    w_zero_ptr,  # bf16 [E, KP/GROUP, N], HAS_ZERO only
    bias_ptr,  # fp32 [E, N], HAS_BIAS only
    pair_weight_ptr,  # float [P] routing weights, GEMM2 only
    topk_ids_ptr,  # int32 or int64 [P]; fp32 [NUM_EXPERTS]: of one token, the logits, which a program ranks itself
    shared_ptr, share_ptr,  # bf16 [S] and fp32 [1], HAS_SHARED only: input and factor of a shared expert's dense layer
    dense_ptr, dense_scale_ptr,  # int8 or bf16 [OUT_COLS, S], HAS_SHARED only; fp32 [OUT_COLS], HAS_DENSE_SCALE only
    out_ptr,  # GEMM1: bf16 [P, OUT_COLS], in pair order; GEMM2: bf16 [T, OUT_COLS]
    NUM_EXPERTS: tl.constexpr, N: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, OUT_COLS: tl.constexpr,
    STRIDE_X: tl.constexpr, TOP_K: tl.constexpr, GROUP: tl.constexpr, INT8_ORDER: tl.constexpr,
    HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, GEMM: tl.constexpr,
    ROWS: tl.constexpr, REPS: tl.constexpr, SLOTS: tl.constexpr, BLOCKS: tl.constexpr, CHUNKS: tl.constexpr,
    HAS_SHARED: tl.constexpr, HAS_DENSE_SCALE: tl.constexpr, S: tl.constexpr, S_POW2: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Program (n block, pair in GEMM1 or token in GEMM2) does ROWS weight rows of SLOTS experts.

    SLOTS: 1 in GEMM1; in GEMM2, top_k rounded up to a power of two. BLOCKS: K blocks of a chunk, a power of two.
    CHUNKS: of K; the next one is requested while one is multiplied. REPS: rows of a thread. A thread has the same 32
    columns of all its rows, so it needs few activations. Neighboring threads have neighboring rows of a K block.

    HAS_SHARED: GEMM2 adds a dense layer, which it computes while GEMM1 runs. Its input is complete then, because GEMM1
    waited for it (GEMM1 takes the tensors too, so that Inductor launches nothing that writes them between the two).
    """
    tl.static_assert(GEMM == 1 or not INT8_ORDER)
    RANKS: tl.constexpr = topk_ids_ptr.dtype.element_ty == tl.float32
    tl.static_assert(not RANKS or not HAS_BIAS)
    BATCH: tl.constexpr = SLOTS * BLOCKS
    NEAR: tl.constexpr = ROWS // REPS
    n_block, item = tl.program_id(0), tl.program_id(1)
    index = tl.arange(0, REPS * BATCH * NEAR)
    row = n_block * ROWS + (index // (BATCH * NEAR)) * NEAR + index % NEAR
    in_batch = (index // NEAR) % BATCH
    batch = tl.arange(0, BATCH)
    if GEMM == 1:
        zero = launches_before(True, PTX)
        topk_ids_ptr += zero
        if RANKS:
            one_expert = expert_at(topk_ids_ptr, item, NUM_EXPERTS, TOP_K).to(tl.int64)
        else:
            one_expert = tl.load(topk_ids_ptr + item).to(tl.int64)
        one_valid = (one_expert >= 0) & (one_expert < NUM_EXPERTS)
        expert = one_expert + in_batch * 0
        valid = one_valid & (in_batch >= 0)
        x_row = item // TOP_K + batch * 0
        x_valid = one_valid & (batch >= 0)
    elif RANKS:  # GEMM1 has waited for the logits, so they can be read while it runs
        slot = in_batch // BLOCKS
        x_slot = batch // BLOCKS
        x_row = x_slot
        chosen = slot * 0 - 1
        pair_weight = x_slot.to(tl.float32) * 0.0
        key = next_key(topk_ids_ptr, 2147483647, NUM_EXPERTS)
        highest = logit_of_key(key)
        total = 0.0
        for i in tl.static_range(TOP_K):
            share = tl.exp(logit_of_key(key) - highest)
            total += share
            chosen = tl.where(slot == i, expert_of_key(key), chosen)
            pair_weight = tl.where(x_slot == i, share, pair_weight)
            if i + 1 < TOP_K:
                key = next_key(topk_ids_ptr, key, NUM_EXPERTS)
        pair_weight /= total
        expert = chosen.to(tl.int64)
        valid = expert >= 0
        x_valid = x_slot < TOP_K
    else:  # GEMM1 has waited for ids and routing weights, so they can be read while it runs
        slot = in_batch // BLOCKS
        expert = tl.load(topk_ids_ptr + item * TOP_K + slot, mask=slot < TOP_K, other=-1).to(tl.int64)
        valid = (expert >= 0) & (expert < NUM_EXPERTS)
        x_slot = batch // BLOCKS
        x_row = item * TOP_K + x_slot
        x_expert = tl.load(topk_ids_ptr + x_row, mask=x_slot < TOP_K, other=-1).to(tl.int64)
        x_valid = (x_expert >= 0) & (x_expert < NUM_EXPERTS)
        pair_weight = tl.load(pair_weight_ptr + x_row, mask=x_valid, other=0.0).to(tl.float32)
    s0, s1, s2, s3, z0, z1, z2, z3, w = load_chunk(
        0, w_ptr, w_scale_ptr, w_zero_ptr, expert, row, in_batch % BLOCKS, valid,
        N, KP, GROUP, INT8_ORDER, HAS_ZERO, REPS, BATCH, NEAR, BLOCKS,
    )  # fmt: skip
    if GEMM == 2:
        if HAS_SHARED:
            own_rows = n_block * ROWS + tl.arange(0, ROWS)
            dense = dense_rows(
                shared_ptr, dense_ptr, dense_scale_ptr, own_rows, OUT_COLS, S, S_POW2, HAS_DENSE_SCALE, PTX
            ) * tl.load(share_ptr)  # fmt: skip
        zero = launches_before(True, PTX)
    x_ptr += zero
    out_ptr += zero
    for chunk in tl.static_range(CHUNKS):
        if chunk + 1 < CHUNKS:
            next_s0, next_s1, next_s2, next_s3, next_z0, next_z1, next_z2, next_z3, next_w = load_chunk(
                chunk + 1, w_ptr, w_scale_ptr, w_zero_ptr, expert, row, in_batch % BLOCKS, valid,
                N, KP, GROUP, INT8_ORDER, HAS_ZERO, REPS, BATCH, NEAR, BLOCKS,
            )  # fmt: skip
        products = multiply_chunk(
            chunk, x_ptr, x_row, batch % BLOCKS, x_valid, s0, s1, s2, s3, z0, z1, z2, z3, w,
            K, KP, STRIDE_X, GROUP, INT8_ORDER, HAS_ZERO, BLOCKS, PTX,
        )  # fmt: skip
        if chunk == 0:
            sums = products
        else:
            sums += products
        if chunk + 1 < CHUNKS:
            s0, s1, s2, s3 = next_s0, next_s1, next_s2, next_s3
            z0, z1, z2, z3 = next_z0, next_z1, next_z2, next_z3
            w = next_w
    if GEMM == 2:
        sums *= pair_weight[None, :, None, None]
    acc = tl.sum(tl.sum(sums, axis=3), axis=1).reshape(ROWS)  # [REPS, NEAR] is the order of the rows
    rows = n_block * ROWS + tl.arange(0, ROWS)
    if GEMM == 1:
        if INT8_ORDER:  # the rows' scales follow those of the groups
            place = (rows // 16) * 16 + (rows % 8) * 2 + (rows % 16) // 8
            row_scales = w_scale_ptr + one_expert * ((KP // GROUP + 1) * N) + KP // GROUP * N
            acc *= tl.load(row_scales + place, mask=one_valid & (rows >= 0), other=0.0).to(tl.float32)
        if HAS_BIAS:
            acc += tl.load(bias_ptr + one_expert * N + rows, mask=one_valid & (rows >= 0), other=0.0)
        # Gate and up rows alternate in runs of 8.
        gate, up = tl.split(acc.reshape(ROWS // 16, 2, 8).permute(0, 2, 1))
        value = gated_activation(gate, up, ACTIVATION).reshape(ROWS // 2)
        columns = n_block * (ROWS // 2) + tl.arange(0, ROWS // 2)
        wanted = one_valid & (columns < OUT_COLS)
        tl.store(out_ptr + item.to(tl.int64) * OUT_COLS + columns, to_bf16(value, PTX), mask=wanted)
    else:
        if HAS_BIAS:
            for i in tl.static_range(TOP_K):
                e = tl.load(topk_ids_ptr + item * TOP_K + i).to(tl.int64)
                named = (e >= 0) & (e < NUM_EXPERTS)
                weight = tl.load(pair_weight_ptr + item * TOP_K + i).to(tl.float32)
                acc += tl.load(bias_ptr + e * N + rows, mask=named & (rows >= 0), other=0.0) * weight
        if HAS_SHARED:
            acc += dense
        tl.store(out_ptr + item.to(tl.int64) * OUT_COLS + rows, to_bf16(acc, PTX), mask=rows < OUT_COLS)
