"""Kernels that run both forms of a decoder, PTX and portable."""

from __future__ import annotations

import triton
import triton.language as tl

from executorch_moe.kernels._device import decode_bf16, decode_int8
from executorch_moe.kernels.experts.microscaled import decode_e2m1, dot_e2m1


@triton.jit
def decode_both(half_ptr, scale_ptr, zero_ptr, ptx_ptr, twin_ptr, HAS_ZERO: tl.constexpr):
    """int16 [65536], bf16 scales and zeros [4, 65536] -> bf16 [4, 65536] by PTX and by the portable form."""
    i = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    half = tl.load(half_ptr + i)
    s0 = tl.load(scale_ptr + i)
    s1 = tl.load(scale_ptr + 65536 + i)
    s2 = tl.load(scale_ptr + 2 * 65536 + i)
    s3 = tl.load(scale_ptr + 3 * 65536 + i)
    z0 = tl.load(zero_ptr + i)
    z1 = tl.load(zero_ptr + 65536 + i)
    z2 = tl.load(zero_ptr + 2 * 65536 + i)
    z3 = tl.load(zero_ptr + 3 * 65536 + i)
    a0, a1, a2, a3 = decode_bf16(half, s0, s1, s2, s3, z0, z1, z2, z3, HAS_ZERO, True)
    b0, b1, b2, b3 = decode_bf16(half, s0, s1, s2, s3, z0, z1, z2, z3, HAS_ZERO, False)
    tl.store(ptx_ptr + i, a0)
    tl.store(ptx_ptr + 65536 + i, a1)
    tl.store(ptx_ptr + 2 * 65536 + i, a2)
    tl.store(ptx_ptr + 3 * 65536 + i, a3)
    tl.store(twin_ptr + i, b0)
    tl.store(twin_ptr + 65536 + i, b1)
    tl.store(twin_ptr + 2 * 65536 + i, b2)
    tl.store(twin_ptr + 3 * 65536 + i, b3)


@triton.jit
def decode_bytes_both(byte_ptr, out_ptr):
    """int8 [256] -> int8 [4, 17, 256]: low and high nibbles times 0..16 by PTX, then by the portable form."""
    multiple = tl.program_id(0)
    i = tl.arange(0, 256)
    byte = tl.load(byte_ptr + i)
    m = tl.zeros((256,), dtype=tl.int32) + multiple
    lo, hi = decode_int8(byte, m, 16 - m, True)
    twin_lo, twin_hi = decode_int8(byte, m, 16 - m, False)
    out_ptr += multiple * 256
    tl.store(out_ptr + i, lo)
    tl.store(out_ptr + 17 * 256 + i, hi)
    tl.store(out_ptr + 34 * 256 + i, twin_lo)
    tl.store(out_ptr + 51 * 256 + i, twin_hi)


@triton.jit
def decode_e2m1_both(half_ptr, factor_ptr, ptx_ptr, twin_ptr):
    """int16 [65536], bf16 factors [4, 65536] -> bf16 [4, 65536] by PTX and by the portable form."""
    i = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    half = tl.load(half_ptr + i)
    f0 = tl.load(factor_ptr + i)
    f1 = tl.load(factor_ptr + 65536 + i)
    f2 = tl.load(factor_ptr + 2 * 65536 + i)
    f3 = tl.load(factor_ptr + 3 * 65536 + i)
    a0, a1, a2, a3 = decode_e2m1(half, f0, f1, f2, f3, True)
    b0, b1, b2, b3 = decode_e2m1(half, f0, f1, f2, f3, False)
    tl.store(ptx_ptr + i, a0)
    tl.store(ptx_ptr + 65536 + i, a1)
    tl.store(ptx_ptr + 2 * 65536 + i, a2)
    tl.store(ptx_ptr + 3 * 65536 + i, a3)
    tl.store(twin_ptr + i, b0)
    tl.store(twin_ptr + 65536 + i, b1)
    tl.store(twin_ptr + 2 * 65536 + i, b2)
    tl.store(twin_ptr + 3 * 65536 + i, b3)


@triton.jit
def dot_e2m1_both(word_ptr, pair_ptr, ptx_ptr, twin_ptr):
    """int32 [65536], int32 pairs of int16 [4, 65536] -> int32 [4, 65536] by PTX and by the portable form."""
    i = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    w = tl.load(word_ptr + i)
    p0 = tl.load(pair_ptr + i)
    p1 = tl.load(pair_ptr + 65536 + i)
    p2 = tl.load(pair_ptr + 2 * 65536 + i)
    p3 = tl.load(pair_ptr + 3 * 65536 + i)
    a0, a1, a2, a3 = dot_e2m1(w, p0, p1, p2, p3, w, w, w, w, True)
    b0, b1, b2, b3 = dot_e2m1(w, p0, p1, p2, p3, w, w, w, w, False)
    tl.store(ptx_ptr + i, a0)
    tl.store(ptx_ptr + 65536 + i, a1)
    tl.store(ptx_ptr + 2 * 65536 + i, a2)
    tl.store(ptx_ptr + 3 * 65536 + i, a3)
    tl.store(twin_ptr + i, b0)
    tl.store(twin_ptr + 65536 + i, b1)
    tl.store(twin_ptr + 2 * 65536 + i, b2)
    tl.store(twin_ptr + 3 * 65536 + i, b3)
