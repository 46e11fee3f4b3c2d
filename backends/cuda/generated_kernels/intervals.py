"""Integer intervals, elementwise over numpy arrays: the possible values of an index or a mask of a kernel.

A mask is an interval inside [0, 1]: (0, 0) is false, (1, 1) true, (0, 1) unknown. `None` means any value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Interval:
    """All integers from `low` to `high`, both inclusive; int64 arrays that broadcast, or ints."""

    low: Any
    high: Any

    @property
    def exact(self) -> Any:
        """True where the interval has one value."""
        return np.equal(self.low, self.high)


UNKNOWN_MASK = Interval(0, 1)
Value = Interval | None


def constant(value: int) -> Interval:
    """The interval of one number."""
    return Interval(int(value), int(value))


def _truncated(a: Any, b: Any) -> Any:
    """Integer division as in Triton: toward zero."""
    return np.sign(a) * (np.abs(a) // b)


def add(a: Interval, b: Interval) -> Interval:
    return Interval(a.low + b.low, a.high + b.high)


def subtract(a: Interval, b: Interval) -> Interval:
    return Interval(a.low - b.high, a.high - b.low)


def multiply(a: Interval, b: Interval) -> Interval:
    ends = [a.low * b.low, a.low * b.high, a.high * b.low, a.high * b.high]
    return Interval(_reduce(np.minimum, ends), _reduce(np.maximum, ends))


def divide(a: Interval, b: Interval) -> Value:
    """Integer division toward zero; None unless all divisors are positive."""
    if np.any(np.less(b.low, 1)):
        return None
    ends = [_truncated(a.low, b.low), _truncated(a.low, b.high), _truncated(a.high, b.low), _truncated(a.high, b.high)]
    return Interval(_reduce(np.minimum, ends), _reduce(np.maximum, ends))


def remainder(a: Interval, b: Interval) -> Value:
    """Remainder with the sign of `a`, as in Triton; None unless all divisors are positive."""
    if np.any(np.less(b.low, 1)):
        return None
    # Where `a` does not cross a multiple of one divisor, the remainder grows with it.
    same = (
        b.exact
        & np.equal(_truncated(a.low, b.low), _truncated(a.high, b.low))
        & (np.greater_equal(a.low, 0) | np.less(a.high, 0) | a.exact)
    )
    least = np.where(np.less(a.low, 0), np.maximum(a.low, 1 - b.high), 0)
    most = np.where(np.greater(a.high, 0), np.minimum(a.high, b.high - 1), 0)
    return Interval(np.where(same, np.fmod(a.low, b.low), least), np.where(same, np.fmod(a.high, b.low), most))


def minimum(a: Interval, b: Interval) -> Interval:
    return Interval(np.minimum(a.low, b.low), np.minimum(a.high, b.high))


def maximum(a: Interval, b: Interval) -> Interval:
    return Interval(np.maximum(a.low, b.low), np.maximum(a.high, b.high))


def union(a: Interval, b: Interval) -> Interval:
    return Interval(np.minimum(a.low, b.low), np.maximum(a.high, b.high))


def intersect(a: Value, b: Interval) -> Interval:
    return b if a is None else Interval(np.maximum(a.low, b.low), np.minimum(a.high, b.high))


def choose(mask: Value, a: Value, b: Value) -> Value:
    """`tl.where`."""
    mask = as_mask(mask)
    if a is None or b is None:
        if np.all(np.equal(mask.low, 1)):
            return a
        return b if np.all(np.equal(mask.high, 0)) else None
    both, yes = union(a, b), np.equal(mask.low, 1)
    no = np.equal(mask.high, 0)
    return Interval(
        np.where(yes, a.low, np.where(no, b.low, both.low)), np.where(yes, a.high, np.where(no, b.high, both.high))
    )


def may_be_mask(value: Value) -> bool:
    """False for numbers other than 0 and 1, for which `&`, `|` and `~` are not logical; True for unknown values."""
    return value is None or bool(np.all(np.greater_equal(value.low, 0)) and np.all(np.less_equal(value.high, 1)))


def as_mask(value: Value) -> Interval:
    """The interval of a truth value."""
    return value if value is not None and may_be_mask(value) else UNKNOWN_MASK


def compare(operator: str, a: Value, b: Value) -> Interval:
    """A mask; `operator` is the name of one of Python's `ast` comparisons."""
    if a is None or b is None:
        return UNKNOWN_MASK
    if operator in ("Gt", "GtE"):
        return compare({"Gt": "Lt", "GtE": "LtE"}[operator], b, a)
    if operator == "Lt":
        sure, possible = np.less(a.high, b.low), np.less(a.low, b.high)
    elif operator == "LtE":
        sure, possible = np.less_equal(a.high, b.low), np.less_equal(a.low, b.high)
    else:
        apart = np.less(a.high, b.low) | np.less(b.high, a.low)
        sure = a.exact & b.exact & np.equal(a.low, b.low)
        possible = ~apart
        if operator == "NotEq":
            sure, possible = ~possible, ~sure
        elif operator != "Eq":
            return UNKNOWN_MASK
    return Interval(np.asarray(sure).astype(np.int64), np.asarray(possible).astype(np.int64))


def both(a: Value, b: Value) -> Interval:
    """`&` of two masks."""
    a, b = as_mask(a), as_mask(b)
    return Interval(np.minimum(a.low, b.low), np.minimum(a.high, b.high))


def either(a: Value, b: Value) -> Interval:
    """`|` of two masks."""
    a, b = as_mask(a), as_mask(b)
    return Interval(np.maximum(a.low, b.low), np.maximum(a.high, b.high))


def opposite(a: Value) -> Interval:
    """`~` of a mask."""
    a = as_mask(a)
    return Interval(1 - a.high, 1 - a.low)


def _reduce(function: Any, values: list[Any]) -> Any:
    first, *rest = values
    for value in rest:
        first = function(first, value)
    return first
