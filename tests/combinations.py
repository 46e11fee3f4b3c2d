"""Combinations of test parameters: `make test` runs some of them, `make test-full` all."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest

EXHAUSTIVE = pytest.mark.exhaustive


def combinations(
    *axes: Iterable[Any] | Mapping[str, Any], one_of: int = 1, chosen: Callable[..., bool] | None = None
) -> list[Any]:
    """The product of `axes` for `pytest.mark.parametrize`, most of it with the marker `exhaustive`.

    Args:
        axes: for each parameter its values, or a mapping from the name in the test's id to the value.
        one_of: one in `one_of` combinations is not marked, chosen so that values take turns.
        chosen: used instead of `one_of`; gets one value per axis and returns True if the combination is not marked.

    Raises:
        AssertionError: all combinations of a value are marked, so that `make test` would leave it out.
    """
    named = [axis if isinstance(axis, Mapping) else {str(value): value for value in axis} for axis in axes]
    params, left = [], {(position, name) for position, axis in enumerate(named) for name in axis}
    for combination in itertools.product(*(enumerate(axis.items()) for axis in named)):
        places, items = zip(*combination, strict=True)
        names, values = zip(*items, strict=True)
        often = chosen(*values) if chosen else sum(places) % one_of == 0
        if often:
            left -= set(enumerate(names))
        params.append(pytest.param(*values, id="-".join(names), marks=() if often else EXHAUSTIVE))
    assert not left, f"all combinations are exhaustive with {', '.join(sorted(name for _, name in left))}"
    return params
