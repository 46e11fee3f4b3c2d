"""The layout of packed expert weights (version 3): the order of values in memory, and conversions both ways.

Each expert has two matrices: `w13`, gate and up projections, N = 2I rows and K = H columns; `w2`, the down projection,
N = H rows and K = I columns. I and H are padded with zeros to multiples of 128; the padded sizes are written Ip and Hp.

Rows of `w13`: gate and up rows alternate in runs of 8. Packed row 16b + j is gate row 8b + j for j < 8, else up row
8b + j - 8. A thread holds rows r and r + 8 of an MMA accumulator, so it has gate and up of the same element.

4-bit schemes, uint8 [E, K/128, N, 64]: the 128 values of one row in one K block are 64 consecutive bytes, and the rows
of a block are consecutive. Codes q are signed nibbles in [-8, 7]; value = q * scale (+ zero). Four threads share an MMA
row; thread t of them reads the 16 bytes from 16t on, which are exactly the values of its operand fragments.
    w4a16 (bf16 fragments, m16k16):  k = 32s + 16c + 8h + 2t + l  ->  byte 16t + 8c + 4h + 2l + s // 2, nibble s % 2
    w4a8  (int8 fragments, m16k32):  k = 64s + 32c + 16h + 4t + 2m + l ->  byte 16t + 8c + 4h + 2l + m, nibble s
    mxfp4 (bf16 fragments): as w4a16, but the nibbles of a halfword are quarters s = 3, 1, 2, 0 (see `decode_e2m1`)
    (s, c, h, t, m, l are the digits of k; nibble 0 is the low one)
In int8 order, the middle two of every four values are swapped, in weights and in quantized activations. The product
is the same, and the bf16 decoder finds neighboring values where it expects them, so that few tokens can be
multiplied in bf16 with the same weights.
Scales and optional zeros are bf16 [E, K/group_size, N], n contiguous, because a tile reads a run of rows of one group.
Within runs of 16 rows the order is 0, 8, 1, 9, ... 7, 15: rows r and r + 8, whose sums are in one thread, share a
32-bit word.
For int8 fragments, a group's scale is an integer multiple, 1 to 16 (0 in padding), of its row's scale. The rows' scales
follow those of the groups: bf16 [E, K/group_size + 1, N]. A code times its multiple fits int8.

mxfp4: codes are e2m1 floats (sign, two exponent bits, mantissa bit).
Scales are powers of two, uint8 [E, K/128, N, 4]: a 32-bit word has the exponents of the four groups of a row in a K
block, plus an offset (`mxfp4.STORED_OFFSET`), where bf16 numbers have theirs. Groups 0 and 1: bits 14..7 and 30..23.
Groups 2 and 3: the same bits of the word rotated left by 8.

bf16 scheme, bf16 [E, N, K]: rows as above, K contiguous.

Source: the fragment orders of mma.m16n8k16 (bf16) and mma.m16n8k32 (s8), PTX ISA, section "Matrix fragments".
"""

from __future__ import annotations

import torch
from torch import Tensor

from executorch_moe.kernels.schemes import GATE_UP_GRANULE, K_BLOCK, Scheme, get_scheme

from .mxfp4 import e2m1_values, unpack_e8m0


def interleave_gate_up(rows: Tensor) -> Tensor:
    """Reorder [E, 2*Ip, ...] from gate rows then up rows to alternating runs of 8 rows."""
    e, n = rows.shape[:2]
    tail = rows.shape[2:]
    return rows.reshape(e, 2, n // (2 * GATE_UP_GRANULE), GATE_UP_GRANULE, *tail).transpose(1, 2).reshape(e, n, *tail)


def deinterleave_gate_up(rows: Tensor) -> Tensor:
    """Inverse of `interleave_gate_up`."""
    e, n = rows.shape[:2]
    tail = rows.shape[2:]
    return rows.reshape(e, n // (2 * GATE_UP_GRANULE), 2, GATE_UP_GRANULE, *tail).transpose(1, 2).reshape(e, n, *tail)


def _fragments(values: Tensor, scheme: str) -> Tensor:
    """The values of K blocks, [..., 128], in the order of nibbles: [..., 64, 2], low nibble first."""
    lead, first = values.shape[:-1], values.dim() - 1
    if scheme == "w4a8":  # k = (s, c, h, t, m, l) -> byte (t, c, h, l, m), nibble s
        digits, order = (2, 2, 2, 4, 2, 2), (3, 1, 2, 5, 4, 0)
    elif scheme == "mxfp4":  # k = (3 - (s1, s0), c, h, t, l) -> byte (t, c, h, l, s0), nibble s1
        digits, order = (2, 2, 2, 2, 4, 2), (4, 2, 3, 5, 1, 0)
        values = values.reshape(*lead, 4, 32).flip(-2)
    else:  # k = (s1, s0, c, h, t, l) -> byte (t, c, h, l, s1), nibble s0
        digits, order = (2, 2, 2, 2, 4, 2), (4, 2, 3, 5, 0, 1)
    parts = values.reshape(*lead, *digits).permute(*range(first), *(first + digit for digit in order))
    return parts.reshape(*lead, K_BLOCK // 2, 2)


def pack_int4(q: Tensor, scheme: str) -> Tensor:
    """Pack 4-bit codes into layout version 3.

    Args:
        q: int8 [E, N, K] in [-8, 7], or uint8 for mxfp4, K a multiple of 128.
        scheme: "w4a16", "w4a8" or "mxfp4": decides the fragment order.

    Returns:
        uint8 [E, K/128, N, 64].
    """
    e, n, k = q.shape
    nibbles = q.view(torch.uint8).bitwise_and(0xF).reshape(e, n, k // K_BLOCK, K_BLOCK).transpose(1, 2)
    frag = _fragments(nibbles, scheme)
    return (frag[..., 0] | (frag[..., 1] << 4)).contiguous()


def unpack_int4(packed: Tensor, scheme: str) -> Tensor:
    """Codes of a packed matrix as fp32. Uses ATen operators only, so that an exported program can contain it.

    Args:
        packed: uint8 [E, K/128, N, 64].
        scheme: "w4a16", "w4a8" or "mxfp4".

    Returns:
        fp32 [E, N, K] with integers in [-8, 7]; for mxfp4 the e2m1 codes, in [0, 15].
    """
    e, kb, n, _ = packed.shape
    byte = packed.to(torch.int32)
    low, high = byte & 0xF, (byte >> 4) & 0xF
    if scheme != "mxfp4":  # two's complement nibble -> integer without a branch: (x ^ 8) - 8
        low, high = low ^ 8, high ^ 8
    nibble = torch.stack((low, high), dim=-1)
    if scheme == "w4a8":  # (t, c, h, l, m, s) -> (s, c, h, t, m, l)
        natural = nibble.reshape(e, kb, n, 4, 2, 2, 2, 2, 2).permute(0, 2, 1, 8, 4, 5, 3, 7, 6)
    elif scheme == "mxfp4":  # (t, c, h, l, s0, s1) -> (3 - (s1, s0), c, h, t, l)
        natural = nibble.reshape(e, kb, n, 4, 2, 2, 2, 2, 2).permute(0, 2, 1, 8, 7, 4, 5, 3, 6)
        natural = natural.reshape(e, n, kb, 4, 32).flip(3)
    else:  # (t, c, h, l, s1, s0) -> (s1, s0, c, h, t, l)
        natural = nibble.reshape(e, kb, n, 4, 2, 2, 2, 2, 2).permute(0, 2, 1, 7, 8, 4, 5, 3, 6)
    codes = natural.reshape(e, n, kb * K_BLOCK).to(torch.float32)
    return codes if scheme == "mxfp4" else codes - 8.0


def nibble_order(scheme: str, device: torch.device | None = None) -> Tensor:
    """Position within its K block of the value in the low and in the high nibble of each of the 64 bytes.

    Args:
        scheme: fragment order, "w4a16", "w4a8" or "mxfp4".

    Returns:
        int64 [2, 64].
    """
    return _fragments(torch.arange(K_BLOCK, device=device), scheme).transpose(0, 1)


def _by_row(t: Tensor) -> Tensor:
    """Scales or zeros [E, groups, N] in pairs of rows -> fp32 [E, N, groups]."""
    e, groups, n = t.shape
    return t.to(torch.float32).reshape(e, groups, n // 16, 8, 2).permute(0, 2, 4, 3, 1).reshape(e, n, groups)


def unpack_scales(scale: Tensor, scheme: str) -> Tensor:
    """Scales of a packed matrix in the order of its rows; traceable.

    Args:
        scale: as for `dequantize`.
        scheme: "w4a16", "w4a8" or "mxfp4".

    Returns:
        fp32 [E, N, K/group_size].
    """
    if scheme == "mxfp4":
        return unpack_e8m0(scale)
    scales = _by_row(scale)
    return scales[:, :, :-1] * scales[:, :, -1:] if scheme == "w4a8" else scales


def dequantize_in_place(packed: Tensor, scale: Tensor, zero: Tensor | None, scheme: str) -> list[tuple[Tensor, Tensor]]:
    """Dequantize one packed 4-bit matrix without moving its values; for exports to the CPU.

    It gives the values of `dequantize`, but the low and the high nibbles as two matrices with columns in the order of
    the bytes. The product with activations in the same order needs no permuted weights: ExecuTorch's `permute_copy`
    takes about 9 ns per element, which would be most of a decode step.

    Args:
        packed, scale, zero, scheme: as for `dequantize`; scale is not None.

    Returns:
        For low and high nibbles: values fp32 [E, N, K/2], and int64 [64], the positions of columns within a K block.
    """
    e, blocks, n, width = packed.shape
    bytes_ = torch.cat([packed[:, block] for block in range(blocks)], -1)  # [E, N, K/2]
    if scheme == "mxfp4":
        nibbles = [e2m1_values(bytes_ & 0xF), e2m1_values((bytes_ & 0xF0).to(torch.float32) * 0.0625)]
        unit = 1.0
    else:  # 16 * code as a signed byte: the multiplication wraps
        nibbles = [part.to(torch.int8).to(torch.float32) for part in (bytes_ * 16, bytes_ & 0xF0)]
        unit = 0.0625
    order = nibble_order(scheme, packed.device)

    def spread(groups: Tensor) -> list[Tensor]:  # fp32 [E, N, groups] -> for both nibbles [E, N, K/2]
        each = max(1, groups.shape[2] // blocks)  # groups of a block
        if groups.shape[2] < blocks:
            groups = groups.unsqueeze(-1).expand(*groups.shape, blocks // groups.shape[2])
        mine = (order // (K_BLOCK // each)).unsqueeze(1) == torch.arange(each, device=packed.device).unsqueeze(-1)
        rows, hits = groups.reshape(-1, each), mine.to(torch.float32)
        return [torch.mm(rows, hits[nibble]).reshape(e, n, blocks * width) for nibble in (0, 1)]

    weights = [
        codes * scales for codes, scales in zip(nibbles, spread(unpack_scales(scale, scheme) * unit), strict=True)
    ]
    if zero is not None:
        weights = [weight + zeros for weight, zeros in zip(weights, spread(_by_row(zero)), strict=True)]
    return [(weight, order[nibble]) for nibble, weight in enumerate(weights)]


def dequantize(packed: Tensor, scale: Tensor | None, zero: Tensor | None, scheme: str) -> Tensor:
    """Dequantize one packed matrix; traceable.

    Args:
        packed: w13 or w2 of `PackedExperts`.
        scale, zero: bf16 [E, K/group_size, N] or None. For "w4a8", scale ends with the rows' scales as one more group;
            for "mxfp4", it is uint8 [E, K/128, N, 4].
        scheme: fragment order of the packed matrix, "w4a16", "w4a8" or "mxfp4".

    Returns:
        fp32 [E, N, K] (padded sizes, rows in packed order).
    """
    if scale is None:
        return packed.to(torch.float32)
    codes = unpack_int4(packed, scheme)
    if scheme == "mxfp4":
        codes = e2m1_values(codes)
    e, n, k = codes.shape
    scales = unpack_scales(scale, scheme)
    groups = scales.shape[2]
    weight = codes.reshape(e, n, groups, k // groups) * scales.unsqueeze(-1)
    if zero is not None:
        weight = weight + _by_row(zero).unsqueeze(-1)
    return weight.reshape(e, n, k)


def fragment_order(scheme: Scheme | str, gemm: int) -> str:
    """Fragment order of a matrix: "w4a8" if GEMM `gemm` (1 or 2) multiplies in int8, "mxfp4", else "w4a16"."""
    kind = get_scheme(scheme) if isinstance(scheme, str) else scheme
    if kind.microscaled:
        return "mxfp4"
    return "w4a8" if kind.act_group(gemm) else "w4a16"
