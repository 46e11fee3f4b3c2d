"""What `make test` leaves to `make test-full`."""

from __future__ import annotations

import pytest

from .combinations import combinations


def often(params: list) -> list[str]:
    return [param.id for param in params if not param.marks]


def test_values_take_turns() -> None:
    params = combinations(["a", "b", "c"], {"one": 1, "two": 2, "three": 3}, one_of=3)
    assert len(params) == 9 and params[5].values == ("b", 3) and params[5].id == "b-three"
    assert often(params) == ["a-one", "b-three", "c-two"]
    assert {param.marks[0].name for param in params if param.marks} == {"exhaustive"}
    assert len(often(combinations("ab", "cd"))) == 4


def test_a_chooser_gets_the_values() -> None:
    assert often(combinations("ab", [1, 2], chosen=lambda letter, number: (letter == "a") == (number == 1))) == [
        "a-1",
        "b-2",
    ]


def test_no_value_is_left_out() -> None:
    with pytest.raises(AssertionError, match="all combinations are exhaustive with b, d"):
        combinations("ab", "cd", chosen=lambda *values: values == ("a", "c"))
    with pytest.raises(AssertionError, match="all combinations are exhaustive with 2"):
        combinations("ab", [1, 2, 3, 4], one_of=3, chosen=lambda _, number: number != 2)
