"""Sessions by name on one set of weights: who holds which state, and how much of it a prompt can use again.

A state is a loaded program with its KV cache, and the tokens that are in it. A session's text is in the requests, so a
session that lost its state is as right as before; its next prompt is computed from the start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Protocol


class Rewinds(Protocol):
    """What sessions need of a `TextGenerator`."""

    can_rewind: bool


@dataclass(eq=False)
class State:
    """A loaded program and what is in its cache.

    Attributes:
        generator: the program.
        resident: tokens whose state is in the cache; emptied while a call runs.
        owner: the session that it belongs to; None: no session.
        number: of the state, from 0: its slot, if all states are in one program (`batch_worker`).
        busy: a request runs on it.
    """

    generator: Rewinds
    resident: list[int] = field(default_factory=list)
    owner: str | None = None
    number: int = 0
    busy: bool = False

    def reusable(self, prompt_ids: Sequence[int]) -> tuple[int, str]:
        """Number of a prompt's first tokens that need not be computed, less than all of them, and the reason.

        The reason is one of ExecuTorch's worker protocol: "new" (nothing is in the cache), "exact_prefix" (the prompt
        continues it), "equal" (it is the prompt), "mismatch" (it is another text from some token on).
        """
        if not self.resident:
            return 0, "new"
        pairs = zip(self.resident, prompt_ids, strict=False)
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if common == len(self.resident):
            reason = "equal" if common == len(prompt_ids) else "exact_prefix"
        else:
            reason = "mismatch"
        # The last token of the prompt is always computed, because its output is the first new token.
        usable = min(common, len(prompt_ids) - 1)
        if usable != len(self.resident) and not self.generator.can_rewind:
            usable = 0
        return usable, reason


class Sessions:
    """Named sessions, and the states that they share.

    Requests without a name share one session that has no name. With fewer states than sessions, the least recently used
    state changes hands.

    Args:
        load: loads the program once more.
        names: most named sessions; opening a further one closes the one that was used least recently. 0: none.
        states: most states, at least 1.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(self, load: Callable[[], Rewinds], names: int, states: int) -> None:
        if names < 0:
            raise ValueError(f"sessions={names} must be at least 0")
        if states < 1:
            raise ValueError(f"states={states} must be at least 1")
        self.names, self._limit, self._load = names, states, load
        self._states = [State(load())]  # the least recently used first
        self._open: dict[str, bool] = {}
        """Open sessions, the least recently used first -> True if it lost its state since its last request."""

    @property
    def first(self) -> State:
        """A state, to read the properties of the program from."""
        return self._states[0]

    def open(self, name: str) -> str | None:
        """Admits a session, if it is not yet; returns the name of the session that was closed for it, if any."""
        closed = None
        if name not in self._open and len(self._open) >= self.names:
            closed = next(iter(self._open))
            self.close(closed)
        self._open[name] = self._open.pop(name, False)
        return closed

    def close(self, name: str) -> None:
        """Forgets a session and what is in its state; does nothing if it is not open."""
        self._open.pop(name, None)
        self._release(name)

    def reset(self, name: str) -> None:
        """Forgets what is in a session's state; the session stays open."""
        self._release(name)

    def lend(self, name: str | None) -> tuple[State, bool]:
        """A state for one request, and True if the session had one before and lost it to another.

        A state that another session held is empty. Where states can be busy, only if `can_lend`.
        """
        state = next((state for state in self._states if name is not None and state.owner == name), None)
        lost = False
        if name is not None:
            lost = state is None and self._open.get(name, False)
            self.open(name)
            self._open[name] = False
        if state is None:
            state = self._free_state()
            if state.owner is not None:
                self._open[state.owner] = True
            if name is not None or state.owner is not None:
                state.resident = []
            state.owner = name
        self._states.remove(state)
        self._states.append(state)
        return state, lost

    def can_lend(self, name: str | None) -> bool:
        """True if `lend` finds a state that is not busy: a session has its own, or takes any."""
        own = next((state for state in self._states if name is not None and state.owner == name), None)
        if own is not None:
            return not own.busy
        return len(self._states) < self._limit or not all(state.busy for state in self._states)

    def _free_state(self) -> State:
        idle = [state for state in self._states if not state.busy]
        for state in idle:
            if state.owner is None:
                return state
        if len(self._states) < self._limit:
            self._states.append(State(self._load(), number=len(self._states)))
            return self._states[-1]
        return idle[0]

    def _release(self, name: str) -> None:
        for state in self._states:
            if state.owner == name:
                state.owner, state.resident = None, []
