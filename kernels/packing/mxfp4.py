"""MXFP4 weights: 4-bit floats (e2m1) and one power of two (e8m0) for 32 weights along K.

e2m1 has a sign, two exponent bits and one mantissa bit: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives. e8m0 is an
exponent plus 127; 255 is NaN.

Source: OCP Microscaling Formats (MX) Specification 1.0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.nn.functional import pad

from executorch_moe.kernels.schemes import MX_GROUP, check_group_size

E8M0_BIAS = 127
E8M0_NAN = 255

STORED_OFFSET = 94
"""A packed scale is e8m0 + 94, the exponent bits of the factor that `decode_e2m1` multiplies with (kernels/_device.py).

The kernels compute weights / 2^32, so that the factor is a bf16 number for scales from 2^-100 to 2^33. The weights are
then exact in bf16, and the products far from the ends of fp32.
"""
LEAST, MOST = 27, 160
"""The smallest and the largest e8m0 scale that can be packed: 2^-100 and 2^33."""

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Mxfp4Codes:
    """MXFP4 weights in natural order; value = e2m1(q) * 2^(scale - 127).

    Attributes:
        q: uint8 [..., N, K] in [0, 15]: sign, two exponent bits, mantissa bit.
        scale: uint8 [..., N, K/32], e8m0.
    """

    q: Tensor
    scale: Tensor

    @property
    def group_size(self) -> int:
        """Neighbors along K that share a scale."""
        return MX_GROUP

    def __getitem__(self, index: int | slice | None) -> Mxfp4Codes:
        return self.map(lambda t: t[index])

    def map(self, function: Callable[[Tensor], Tensor]) -> Mxfp4Codes:
        """Applies a function that only reorders or selects rows to codes and scales."""
        return Mxfp4Codes(function(self.q), function(self.scale))

    def rounded(self) -> Mxfp4Codes:
        """The same: the packed layout stores the scales as they are."""
        return self

    def regrouped(self, group_size: int) -> Mxfp4Codes:
        """The same: there is one group size."""
        assert group_size == MX_GROUP
        return self

    def dequantize(self) -> Tensor:
        """Values, fp32 [..., N, K], exact."""
        values = e2m1_values(self.q).unflatten(-1, (-1, MX_GROUP))
        return torch.ldexp(values, (self.scale.int() - E8M0_BIAS)[..., None]).flatten(-2)

    def check(self, what: str) -> None:
        """Checks that the packed layout can hold the scales. Those of groups of zeros do not matter.

        Args:
            what: name of the weights, for messages.

        Raises:
            ValueError: scales that are NaN, or outside 2^-100 to 2^33.
        """
        scale = self.scale
        if scale.is_meta or is_fake(scale) or not scale.numel():
            return
        low, high = (int(t) for t in scale.aminmax())
        if low >= LEAST and high <= MOST:
            return
        if high == E8M0_NAN:
            raise ValueError(
                f"the scales of {what} hold NaN ({E8M0_NAN}): compare the file's checksum with the publisher's; if "
                "they are equal, use another checkpoint"
            )
        used = scale[(self.q & 7).unflatten(-1, (-1, MX_GROUP)).amax(-1) > 0]
        for found in used.aminmax() if used.numel() else ():
            if not LEAST <= int(found) <= MOST:
                raise ValueError(
                    f"the scales of {what} hold 2^{int(found) - E8M0_BIAS}, but scheme mxfp4 takes "
                    f"2^{LEAST - E8M0_BIAS} to 2^{MOST - E8M0_BIAS}: use scheme w4a16 or bf16"
                )


def e2m1_values(q: Tensor) -> Tensor:
    """Codes in [0, 15] -> fp32. Uses ATen operators only, so that an exported program can contain it."""
    code = q.to(torch.float32)
    negative = (code > 7.5).to(torch.float32)
    i = code - 8.0 * negative
    magnitude = torch.maximum(torch.maximum(i * 0.5, i - 2.0), i * 2.0 - 8.0)
    return magnitude * (1.0 - 2.0 * negative)


def quantize_mxfp4(weight: Tensor) -> Mxfp4Codes:
    """Round to the nearest MXFP4 values along the last dimension; ties to the even code.

    The specification's scale of a group is 2^(floor(log2(largest)) - 2), which leaves values above 6 scales that become
    6. Of this scale and twice it, that with the smaller squared error is taken. MXFP4 values stay the same.

    Args:
        weight: float [..., N, K], K a multiple of 32.

    Returns:
        Mxfp4Codes. The scale of a group with NaN or infinity is 255, NaN.
    """
    check_group_size(MX_GROUP, weight.shape[-1], "K")
    grouped = weight.float().unflatten(-1, (-1, MX_GROUP))
    largest = grouped.abs().amax(-1)
    _, exponent = torch.frexp(largest)  # largest = m * 2^exponent, m in [0.5, 1)
    first = (exponent - 3).clamp(min=LEAST - E8M0_BIAS)
    q, error = _nearest(grouped, first)
    other, other_error = _nearest(grouped, first + 1)
    better = 4 * other_error < error
    scale = torch.where(largest.isfinite(), first + better.int() + E8M0_BIAS, E8M0_NAN)
    return Mxfp4Codes(torch.where(better[..., None], other, q).flatten(-2), scale.to(torch.uint8))


def _nearest(grouped: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest codes, uint8 [..., G, 32], for scales 2^exponent [..., G], and squared errors in units of the scale."""
    x = torch.ldexp(grouped, -exponent[..., None])
    size = x.abs()
    # Codes 0 to 7 are 0, 0.5, 1, 1.5, 2, 3, 4, 6: steps of 0.5 up to 2, of 1 up to 4, then of 2.
    high = torch.where(size < 4.0, size.round() + 2, (size / 2).round() + 4)
    code = torch.where(size < 2.0, (size * 2).round(), high).clamp(max=7)
    q = (code + 8 * (x < 0)).nan_to_num(0).to(torch.uint8)
    return q, (e2m1_values(q) - x).square().sum(-1)


def pack_e8m0(scale: Tensor, n_pad: int, k_pad: int) -> Tensor:
    """Scales in the packed layout, see `fragments`.

    Args:
        scale: uint8 [E, N, K/32], e8m0, checked; what groups of zeros have becomes a scale that can be packed.

    Returns:
        uint8 [E, k_pad/128, n_pad, 4].
    """
    e, n, groups = scale.shape
    exponent = scale.int().clamp(LEAST, MOST) + STORED_OFFSET
    exponent = pad(exponent, (0, k_pad // MX_GROUP - groups, 0, n_pad - n), value=LEAST + STORED_OFFSET)
    q0, q1, q2, q3 = exponent.reshape(e, n_pad, k_pad // 128, 4).transpose(1, 2).unbind(-1)
    low, high = (lambda t: t & 1), (lambda t: t >> 1)
    words = (
        low(q0) << 7 | high(q2),
        low(q3) << 7 | high(q0),
        low(q1) << 7 | high(q3),
        low(q2) << 7 | high(q1),
    )
    return torch.stack(words, -1).to(torch.uint8)


def unpack_e8m0(packed: Tensor) -> Tensor:
    """Values of packed scales, exact. Uses ATen operators only, so that an exported program can contain it.

    Args:
        packed: uint8 [E, K/128, N, 4], see `pack_e8m0`.

    Returns:
        fp32 [E, N, K/32], powers of two.
    """
    e, blocks, n, _ = packed.shape

    def factor(mask: int, power: float) -> Tensor:  # power where the bit is set, else 1
        return (packed & mask).to(torch.float32) * ((power - 1.0) / mask) + 1.0

    # The product of powers of two for the bits of an exponent: seven in one byte, the lowest in another.
    high = factor(1, 2.0**2) * 2.0 ** (128 - STORED_OFFSET - E8M0_BIAS)
    for bit in range(1, 6):
        high = high * factor(1 << bit, 2.0 ** (2 << bit))
    # The top bit, 128, is a part of the first factor: without it, the product is less.
    for _ in range(2):
        high = high * (factor(64, 2.0**64) * 2.0**-64)
    low = factor(128, 2.0)
    q0, q1, q2, q3 = (high[..., first] * low[..., last] for first, last in ((1, 0), (3, 2), (0, 3), (2, 1)))
    scale = torch.stack((q0, q1, q2, q3), -1)  # [E, blocks, N, 4]
    return scale.transpose(1, 2).reshape(e, n, blocks * 4)
