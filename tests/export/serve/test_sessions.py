"""Who holds a state, and how much of a prompt it saves."""

from __future__ import annotations

import pytest

from executorch_moe.export.serve.sessions import Sessions, State


class Program:
    def __init__(self, can_rewind: bool = True) -> None:
        self.can_rewind = can_rewind


@pytest.mark.parametrize(
    ("resident", "prompt", "rewinds", "expected"),
    [
        ([], [1, 2], True, (0, "new")),
        ([1, 2], [1, 2, 3], True, (2, "exact_prefix")),
        ([1, 2], [1, 2, 3], False, (2, "exact_prefix")),
        ([1, 2, 3], [1, 2, 3], True, (2, "equal")),  # the last token gives the first new one
        ([1, 2, 3], [1, 2, 3], False, (0, "equal")),
        ([1, 2, 3], [1, 2, 4, 5], True, (2, "mismatch")),
        ([1, 2, 3], [1, 2, 4, 5], False, (0, "mismatch")),  # a recurrent state has no middle
        ([1, 2, 3], [1, 2], True, (1, "mismatch")),
        ([1, 2, 3], [9], True, (0, "mismatch")),
        ([1], [1], True, (0, "equal")),
    ],
)
def test_reusable_tokens(resident: list[int], prompt: list[int], rewinds: bool, expected: tuple[int, str]) -> None:
    assert State(Program(rewinds), resident).reusable(prompt) == expected


def test_states_change_hands() -> None:
    loaded: list[Program] = []

    def load() -> Program:
        loaded.append(Program())
        return loaded[-1]

    sessions = Sessions(load, names=3, states=2)
    assert len(loaded) == 1  # further ones when they are needed
    a, _ = sessions.lend("a")
    a.resident = [1]
    b, _ = sessions.lend("b")
    b.resident = [2]
    assert a is not b and len(loaded) == 2
    assert sessions.lend("a") == (a, False) and a.resident == [1]
    c, lost = sessions.lend("c")  # b was used least recently
    assert c is b and not lost and c.resident == [] and len(loaded) == 2
    again, lost = sessions.lend("b")
    assert again is a and lost and again.resident == []
    assert sessions.lend("b") == (again, False)


def test_a_further_session_closes_the_least_recently_used() -> None:
    sessions = Sessions(Program, names=2, states=2)
    assert sessions.open("a") is None and sessions.open("b") is None and sessions.open("a") is None
    sessions.lend("b")[0].resident = [1]
    sessions.lend("a")
    assert sessions.open("c") == "b"
    state, lost = sessions.lend("b")
    assert not lost and state.resident == []  # closed, so it is another session of the same name


def test_close_and_reset_forget() -> None:
    sessions = Sessions(Program, names=2, states=1)
    for forget in (sessions.close, sessions.reset):
        state, _ = sessions.lend("a")
        state.resident = [1, 2]
        forget("a")
        assert state.resident == [] and state.owner is None
    sessions.close("never opened")


def test_requests_without_a_name_share_what_no_session_holds() -> None:
    sessions = Sessions(Program, names=1, states=1)
    state, _ = sessions.lend(None)
    state.resident = [1]
    assert sessions.lend(None)[0].resident == [1]
    assert sessions.lend("a")[0].resident == []
    state.resident = [2]
    assert sessions.lend(None)[0].resident == []  # not a's


@pytest.mark.parametrize(("names", "states", "message"), [(-1, 1, "sessions=-1"), (0, 0, "states=0")])
def test_refused_numbers(names: int, states: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sessions(Program, names, states)
