"""Rounding weights to 4 bits: the nearest code under a min-max scale, and half-quadratic quantization (HQQ).

Both give codes q in [-8, 7]. Each group of `group_size` consecutive weights in a row has one scale, and in some schemes
one zero point: value = q * scale (+ zero). Scales and zero points are rounded to bf16 before the codes are chosen, so
that each code is the nearest one for the stored scale and zero point.

For int8 products, a group's scale is a multiple, 1 to 16, of its row's scale.

    minmax  scale = largest absolute value / 7, no zero point
    hqq     starts from minmax, or with zero points from each group's minimum and maximum. Each round separates
            outliers, fits scale and zero point to the rest, and chooses codes. A group keeps its best round.

Source: H. Badri and A. Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023. Two differences:
the paper fits only the zero point, under a fixed scale; here the scale is fitted too, or alone if the scheme has no
zero points. And residuals are measured in units of the group's first scale, so that the result does not depend on the
magnitude of the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from executorch_moe.kernels.schemes import MAX_MULTIPLE, check_group_size

ALGORITHMS = ("minmax", "hqq")

Q_MIN, Q_MAX = -8, 7

# HQQ minimizes the l_p norm of the residuals, p < 1. BETA weighs the separation of outliers and grows by KAPPA. p and
# KAPPA are the paper's. Residuals are at most half a code: BETA = 1 and 10 gave larger errors than 3, and 20 rounds
# gain less than 1% over 10 (normal and Student-t weights, groups of 64).
HQQ_NORM = 0.7
HQQ_BETA = 3.0
HQQ_KAPPA = 1.01
HQQ_ROUNDS = 10

# Weights that are rounded at a time: fp32 temporaries of 1 MB fit the cache and are enough work for torch's threads.
_CHUNK_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class Int4Codes:
    """4-bit weights in natural order; value = q * scale (* row_scale) (+ zero).

    Attributes:
        q: int8 [..., N, K] in [-8, 7].
        scale: bf16 [..., N, K/group_size]. With row_scale, integers from 1 to 16.
        zero: bf16, shaped like scale; None without zero points.
        row_scale: bf16 [..., N, 1]; None means 1.
    """

    q: Tensor
    scale: Tensor
    zero: Tensor | None = None
    row_scale: Tensor | None = None

    @property
    def group_size(self) -> int:
        """Neighbors along K that share a scale."""
        return self.q.shape[-1] // self.scale.shape[-1]

    def __getitem__(self, index: int | slice | None) -> Int4Codes:
        return self.map(lambda t: t[index])

    def map(self, function: Callable[[Tensor], Tensor]) -> Int4Codes:
        """Applies a function that only reorders or selects rows to codes, scales and zero points."""
        zero = None if self.zero is None else function(self.zero)
        row_scale = None if self.row_scale is None else function(self.row_scale)
        return Int4Codes(function(self.q), function(self.scale), zero, row_scale)

    def rounded(self) -> Int4Codes:
        """The same codes with scales and zero points rounded to bf16, as the packed layout stores them."""
        zero = None if self.zero is None else self.zero.bfloat16()
        return Int4Codes(self.q, self.scale.bfloat16(), zero, self.row_scale)

    def regrouped(self, group_size: int) -> Int4Codes:
        """The same values with a smaller group size, which must divide the current one."""
        times = self.group_size // group_size
        if times == 1:
            return self
        zero = None if self.zero is None else self.zero.repeat_interleave(times, -1)
        return Int4Codes(self.q, self.scale.repeat_interleave(times, -1), zero, self.row_scale)

    def row_scaled(self) -> Int4Codes:
        """The same values with scales that are multiples of one scale per row.

        Raises:
            ValueError: the scales are not such multiples.
        """
        if self.row_scale is not None:
            return self
        scale = self.scale.float()
        largest = scale.amax(-1, keepdim=True)
        row_scale, found = torch.ones_like(largest), largest == 0
        for multiple in range(1, MAX_MULTIPLE + 1):
            unit = (largest / multiple).bfloat16().float()
            multiples = scale / torch.where(unit == 0, 1.0, unit)
            fits = (multiples == multiples.round()) & (multiples >= 0) & (multiples <= MAX_MULTIPLE)
            exact = fits.all(-1, keepdim=True)
            row_scale = torch.where(exact & ~found, unit, row_scale)
            found |= exact
        if not found.all():
            raise ValueError(
                f"int8 products need group scales that are 1 to {MAX_MULTIPLE} times one scale of the row, and "
                f"{int((~found).sum())} of {found.numel()} rows have others: use w4a16, or the original weights"
            )
        return Int4Codes(self.q, (scale / row_scale).bfloat16(), self.zero, row_scale.bfloat16())

    def dequantize(self) -> Tensor:
        """Values, fp32 [..., N, K]."""
        scale = self.scale.float() if self.row_scale is None else self.scale.float() * self.row_scale.float()
        grouped = self.q.float().unflatten(-1, (-1, self.group_size)) * scale[..., None]
        if self.zero is not None:
            grouped = grouped + self.zero.float()[..., None]
        return grouped.flatten(-2)


def check_algorithm(algorithm: str) -> None:
    """Check the name of a rounding algorithm.

    Raises:
        ValueError: it is unknown.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm={algorithm!r} is unknown: use one of {', '.join(ALGORITHMS)}")


def round_weights(
    weight: Tensor, group_size: int, algorithm: str = "minmax", zeros: bool = False, row_scaled: bool = False
) -> Int4Codes:
    """Round weights to 4 bits, a block of rows at a time.

    Args:
        weight: float [..., N, K].
        group_size: consecutive K values that share a scale; divides K.
        algorithm: "minmax" or "hqq". The same weights give the same codes.
        zeros: whether hqq chooses zero points; minmax never does.
        row_scaled: make scales multiples of one scale per row; no zero points.

    Returns:
        Int4Codes with q [..., N, K].

    Raises:
        ValueError: unknown algorithm, unsupported group size, or one that does not divide K.
    """
    check_algorithm(algorithm)
    *rows, k = weight.shape
    check_group_size(group_size, k, "K")

    def block(part: Tensor) -> Int4Codes:
        if algorithm == "hqq":
            codes = quantize_hqq(part, group_size, zeros and not row_scaled)
        else:
            codes = Int4Codes(*quantize_int4(part, group_size))
        return _round_scales(part, codes) if row_scaled else codes

    parts = [block(part) for part in weight.reshape(-1, k).split(max(1, _CHUNK_ELEMENTS // k))]

    def whole(tensors: list[Tensor | None]) -> Tensor | None:
        there = [t for t in tensors if t is not None]
        return torch.cat(there).reshape(*rows, -1) if there else None

    q, scale = whole([part.q for part in parts]), whole([part.scale for part in parts])
    assert q is not None and scale is not None
    return Int4Codes(q, scale, whole([part.zero for part in parts]), whole([part.row_scale for part in parts]))


def _round_scales(weight: Tensor, codes: Int4Codes) -> Int4Codes:
    """Rounds the scales of codes for weights [N, K] to multiples of one scale per row, and chooses the codes again.

    The row's scale makes its largest group scale MAX_MULTIPLE. Of the multiples next to a group's scale, the one with
    the smallest squared error is taken.
    """
    grouped, scale = weight.float().unflatten(-1, (-1, codes.group_size)), codes.scale.float()
    row_scale = (scale.amax(-1, keepdim=True) / MAX_MULTIPLE).bfloat16()
    row_scale = torch.where(row_scale == 0, torch.ones_like(row_scale), row_scale)
    row = row_scale.float()
    below = (scale / row).floor()
    best, best_error = below, torch.full_like(scale, float("inf"))
    for step in (-1, 0, 1):
        multiple = (below + step).clamp(1, MAX_MULTIPLE)
        rounded = _values(_codes(grouped, multiple * row, None), multiple * row, None)
        error = (rounded - grouped).square().sum(-1)
        better = error < best_error
        best, best_error = torch.where(better, multiple, best), torch.where(better, error, best_error)
    q = _codes(grouped, best * row, None).flatten(-2).to(torch.int8)
    return Int4Codes(q, best.bfloat16(), None, row_scale)


def quantize_int4(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Symmetric round-to-nearest 4-bit quantization along the last dimension (`minmax`).

    Args:
        weight: float [..., N, K].
        group_size: consecutive K values that share a scale; divides K.

    Returns:
        q int8 [..., N, K] in [-8, 7], scale bf16 [..., N, K/group_size]; weight ~ q * scale.
    """
    check_group_size(group_size, weight.shape[-1], "K")
    grouped = weight.float().unflatten(-1, (-1, group_size))
    scale = (grouped.abs().amax(-1) / 7.0).bfloat16()
    return _codes(grouped, scale, None).flatten(-2).to(torch.int8), scale


def quantize_hqq(weight: Tensor, group_size: int, zeros: bool) -> Int4Codes:
    """Half-quadratic quantization along the last dimension.

    Minimizes sum(|weight - q * scale - zero| ** p) of each group over codes, scale and, with `zeros`, zero point.

    Args:
        weight: float [..., N, K].
        group_size: consecutive K values that share a scale; divides K.
        zeros: whether to fit zero points.

    Returns:
        Int4Codes. The norm of no group is larger than with the min-max codes that it starts from.
    """
    grouped = weight.float().unflatten(-1, (-1, group_size))
    scale, zero = _min_max(grouped, zeros)
    unit = torch.where(scale == 0, torch.ones_like(scale), scale)[..., None]
    best: tuple[Tensor, Tensor, Tensor | None] | None = None
    best_loss = torch.zeros_like(scale)
    beta = HQQ_BETA
    for _ in range(HQQ_ROUNDS):
        stored = scale.bfloat16(), None if zero is None else zero.bfloat16()
        q = _codes(grouped, *stored)
        residual = (grouped - _values(q, *stored)) / unit
        size = residual.abs().clamp(min=1e-8)
        power = size.pow(HQQ_NORM)
        loss = power.sum(-1)
        if best is None:
            best, best_loss = (q, *stored), loss
        else:
            better = loss < best_loss
            best_q, best_scale, best_zero = best
            best = (
                torch.where(better[..., None], q, best_q),
                torch.where(better, stored[0], best_scale),
                None if best_zero is None or stored[1] is None else torch.where(better, stored[1], best_zero),
            )
            best_loss = torch.where(better, loss, best_loss)
        # The paper's soft threshold for the l_p norm: the part of a residual that counts as an outlier.
        outliers = residual.sign() * (size - power / size / beta).clamp(min=0)
        scale, zero = _fit(q, grouped - outliers * unit, scale, zeros)
        beta *= HQQ_KAPPA
    assert best is not None
    return Int4Codes(best[0].flatten(-2).to(torch.int8), best[1], best[2])


def _min_max(grouped: Tensor, zeros: bool) -> tuple[Tensor, Tensor | None]:
    """Scale, and zero point or None, for which the codes exactly span each group [..., G, group_size]."""
    if not zeros:
        return grouped.abs().amax(-1) / Q_MAX, None
    low, high = grouped.aminmax(dim=-1)
    scale = (high - low) / (Q_MAX - Q_MIN)
    return scale, low - Q_MIN * scale


def _codes(grouped: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Nearest codes, fp32 [..., G, group_size]; 0 in a group whose scale is 0."""
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale).float()[..., None]
    shifted = grouped if zero is None else torch.where((scale == 0)[..., None], 0.0, grouped - zero.float()[..., None])
    return (shifted / divisor).round().clamp(Q_MIN, Q_MAX)


def _values(q: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    values = q * scale.float()[..., None]
    return values if zero is None else values + zero.float()[..., None]


def _fit(q: Tensor, target: Tensor, scale: Tensor, zeros: bool) -> tuple[Tensor, Tensor | None]:
    """Least-squares scale (and zero point) for given codes; keeps `scale` where the codes do not determine one."""
    middle = q.mean(-1, keepdim=True) if zeros else torch.zeros_like(scale)[..., None]
    centered = q - middle
    power = centered.square().sum(-1)
    fitted = (centered * target).sum(-1) / torch.where(power == 0, torch.ones_like(power), power)
    scale = torch.where((power == 0) | (fitted <= 0), scale, fitted)
    return scale, target.mean(-1) - scale * middle[..., 0] if zeros else None
