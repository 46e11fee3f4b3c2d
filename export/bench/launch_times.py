"""Times of single launches in a chain of dependent launches, from a profile of the replays of a CUDA graph."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from .breakdown import Kernel


@dataclass(frozen=True)
class LaunchTime:
    """One launch of a chain, microseconds.

    A launch may start, and wait, before the previous one has ended. Durations therefore overlap. Times in the chain do
    not: they add up to the time from the end of the first launch to the end of the last.

    Attributes:
        kernel: name.
        in_chain: from the end of all previous launches to its own end; 0 if it ends before them.
        duration: from its start to its end.
        start: its start, relative to the end of all previous launches; negative if it overlaps with them.
    """

    kernel: str
    in_chain: float
    duration: float
    start: float


def in_order(kernels: Sequence[Kernel]) -> list[LaunchTime]:
    """Times of launches in a row; the first one counts from its own start.

    Args:
        kernels: sorted by start.
    """
    times: list[LaunchTime] = []
    before = kernels[0].start if kernels else 0.0
    for kernel in kernels:
        end = kernel.start + kernel.duration
        times.append(LaunchTime(kernel.name, max(0.0, end - before), kernel.duration, kernel.start - before))
        before = max(before, end)
    return times


def is_copy(name: str) -> bool:
    """Whether a record of a profile is a memory copy, which has another name inside a graph."""
    return name.lower().startswith("memcpy")


def of_replays(kernels: Sequence[Kernel], names: Sequence[str]) -> list[LaunchTime]:
    """Times of the launches of a replayed graph: for each launch, medians over the replays.

    Args:
        kernels: of all replays, sorted by start.
        names: kernels of one replay, in order.

    Raises:
        RuntimeError: the profile has launches that `names` does not have, or lacks some.
    """
    again = "the profile does not have the launches of the chain"
    if not kernels or len(kernels) % len(names):
        raise RuntimeError(
            f"{again}: {len(kernels)} launches are not a multiple of {len(names)}: run it again, and report it if it "
            "persists"
        )
    replays = []
    for first in range(0, len(kernels), len(names)):
        replay = in_order(kernels[first : first + len(names)])
        for index, (found, name) in enumerate(zip(replay, names, strict=True)):
            if found.kernel != name and not (is_copy(found.kernel) and is_copy(name)):
                raise RuntimeError(
                    f"{again}: launch {index} is {found.kernel}, expected {name}: run it again, and report it if it "
                    "persists"
                )
        replays.append(replay)
    return [
        LaunchTime(
            name,
            statistics.median(replay[index].in_chain for replay in replays),
            statistics.median(replay[index].duration for replay in replays),
            statistics.median(replay[index].start for replay in replays),
        )
        for index, name in enumerate(names)
    ]


def mean_time(times: Sequence[LaunchTime]) -> LaunchTime:
    """The mean of launches of one kernel at the same place of several layers."""
    return LaunchTime(
        times[0].kernel,
        statistics.fmean(time.in_chain for time in times),
        statistics.fmean(time.duration for time in times),
        statistics.fmean(time.start for time in times),
    )
