"""Checks of the positions and slots of calls, which the programs themselves do not check."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BATCH_METHOD = "decode_batch"
"""Method of a language model for several texts, one token each; see `export.models.batch`."""


def check_positions(positions: Tensor, max_context: int, method: str) -> None:
    """Check positions in the cache of a language model. Nothing in the program checks them.

    Args:
        positions: int64 [T]. Positions on a GPU are not checked, because that would synchronize with it.
        max_context: number of positions in the cache. method: name for messages.

    Raises:
        ValueError: a position is negative, or not below `max_context`.
    """
    if positions.device.type != "cpu" or positions.dtype != torch.int64 or positions.dim() != 1 or not len(positions):
        return  # the second input of a method of another kind
    lowest, highest = (int(end) for end in positions.aminmax())
    if lowest < 0 or highest >= max_context:
        raise ValueError(
            f"method {method!r} got position {lowest if lowest < 0 else highest}, but its cache has positions 0 to "
            f"{max_context - 1}: count the tokens of the text from 0, or export with a larger --max-context"
        )


def check_rows(positions: Tensor, slots: Tensor, max_context: int) -> None:
    """Check positions and slots of `BATCH_METHOD`. Nothing in the program checks them.

    Args:
        positions: int64 [B]; below 0: an empty row. slots: int64 [B]. Tensors on a GPU are not checked.
        max_context: number of positions in a slot.

    Raises:
        ValueError: a position that is not below `max_context`, or rows that share a slot or name one that there is not.
    """
    if any(t.device.type != "cpu" or t.dtype != torch.int64 or t.dim() != 1 for t in (positions, slots)):
        return  # the runtime refuses inputs of another kind
    check_positions(positions.clamp(min=0), max_context, BATCH_METHOD)
    used = slots[positions >= 0]
    outside = bool(len(slots)) and not 0 <= int(slots.min()) <= int(slots.max()) < len(slots)
    if outside or len(used) != len(used.unique()):
        raise ValueError(
            f"method {BATCH_METHOD!r} got slots {slots.tolist()}, expected different ones from 0 to {len(slots) - 1} "
            "in the rows that are not empty: give each text a slot of its own"
        )


class Order:
    """Checks that the tokens of a text come in order: the state of recurrent layers cannot go back.

    Args:
        start: the position that is expected first, other than 0; None: any.
    """

    def __init__(self, start: int | None = 0) -> None:
        self._next = start

    def follow(self, positions: Tensor, method: str) -> None:
        """Check the positions of the next call.

        Args:
            positions: int64 [T].
            method: name for messages.

        Raises:
            ValueError: they neither start at 0 nor follow the last position, or have gaps.
        """
        if positions.dim() != 1 or not len(positions):
            self._next = None
            return
        first, last = int(positions[0]), int(positions[-1])
        consecutive = torch.equal(positions, torch.arange(first, first + len(positions), dtype=positions.dtype))
        if not consecutive or (first != 0 and self._next is not None and first != self._next):
            given = f"{first} to {last}" if consecutive else f"{positions.tolist()[:8]}"
            raise ValueError(
                f"method {method!r} got positions {given}, expected {self._next or 0} and the following ones: this "
                "model has recurrent layers, whose state cannot go back; run a text again from position 0"
            )
        self._next = last + 1


class Orders:
    """An `Order` for each slot of a program with recurrent layers.

    Args:
        slots: the program has slots (`export --max-batch`), which its methods name in their third input, except decode.
    """

    def __init__(self, slots: bool) -> None:
        self._has_slots = slots
        self.restart()

    def restart(self) -> None:
        """Expects new texts."""
        self._start: int | None = 0
        self._of: dict[int, Order] = {}

    def follow(self, method: str, tensors: Sequence[Tensor]) -> None:
        """Check the positions of a call, its second input. Those on a GPU are not, nor are those of the calls after it.

        Raises:
            ValueError: see `Order.follow`.
        """
        positions, slots = tensors[1], [0]
        given = tensors[2] if self._has_slots and method != "decode" and len(tensors) > 2 else None
        if any(t is not None and (t.device.type != "cpu" or t.dim() != 1) for t in (positions, given)):
            self._start, self._of = None, {}
            return
        if given is not None:
            slots = given.tolist()
        if method != BATCH_METHOD:
            self._order(slots[0]).follow(positions, method)
            return
        for position, slot in zip(positions, slots, strict=True):
            if position >= 0:
                self._order(slot).follow(position[None], method)

    def _order(self, slot: int) -> Order:
        return self._of.setdefault(slot, Order(self._start))
