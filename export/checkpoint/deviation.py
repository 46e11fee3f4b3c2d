"""Relative error of packed weights against those of a quantized checkpoint."""

from __future__ import annotations

import math

from torch import Tensor

from executorch_moe.kernels import Int4Codes


class Deviation:
    """Sums the squared errors of packed weights."""

    def __init__(self) -> None:
        self._error = self._norm = 0.0

    def add(self, actual: Tensor, expected: Tensor) -> None:
        """Adds a weight."""
        expected = expected.float()
        self._error += float((actual - expected).norm()) ** 2
        self._norm += float(expected.norm()) ** 2

    def add_rounded(self, actual: Int4Codes, exact: Int4Codes) -> None:
        """Adds a weight with the same codes and other scales and zero points.

        It takes sums over the codes of each group, which is faster than to compute the values.
        """
        q = exact.q.float().unflatten(-1, (-1, exact.group_size))
        first, second = q.sum(-1).double(), q.square().sum(-1).double()

        def squares(scale: Tensor, zero: Tensor | None) -> float:
            total = scale.square() * second
            if zero is not None:
                total += 2 * scale * zero * first + exact.group_size * zero.square()
            return float(total.sum())

        scale, zero = exact.scale.double(), None if exact.zero is None else exact.zero.double()
        moved = None if zero is None or actual.zero is None else actual.zero.double() - zero
        self._error += squares(actual.scale.double() - scale, moved)
        self._norm += squares(scale, zero)

    def relative(self) -> float:
        """Relative L2 error of all weights."""
        return math.sqrt(max(self._error, 0.0) / self._norm) if self._norm else 0.0
