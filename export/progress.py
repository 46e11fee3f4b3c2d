"""The steps of an export: shown on a console as they are done, timed, and their peak memory taken."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.spinner import Spinner

from .host_memory import peak_rss, restart_peak


@dataclass
class Steps:
    """Steps that were done.

    Attributes:
        console: where they are shown; None shows nothing.
        seconds, peaks: of each step, and the most bytes that were resident during it.
    """

    console: Console | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)

    @contextlib.contextmanager
    def step(self, name: str, doing: str, note: str = "") -> Iterator[None]:
        """One step, with a spinner; the note is what to know while it lasts."""
        shown = escape(doing + note)
        waiting = self.console.status(shown) if self.console is not None else contextlib.nullcontext()
        with self._measured(name, doing, note), waiting:
            yield

    @contextlib.contextmanager
    def counted(self, name: str, doing: str, total: int) -> Iterator[Callable[[object], None]]:
        """One step with a progress bar; yields what to call after each of `total` parts."""
        with self._measured(name, doing):
            if self.console is None:
                yield lambda part: None
                return
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            shown = self.console.is_terminal
            with Progress(*columns, console=self.console, transient=True, disable=not shown) as progress:
                task = progress.add_task(doing, total=total)
                yield lambda part: progress.advance(task)

    def say(self, text: str) -> None:
        """A line for the reader."""
        if self.console is not None:
            self.console.print(text, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def _measured(self, name: str, doing: str, note: str = "") -> Iterator[None]:
        if self.console is not None and not self.console.is_terminal:
            self.say(f"{escape(doing + note)} ...")  # nobody sees a spinner, and a step may take minutes
        start = time.perf_counter()
        restart_peak()
        yield
        self.seconds[name], self.peaks[name] = time.perf_counter() - start, peak_rss()
        self.say(f"[green]done[/green] {escape(doing)} ({self.seconds[name]:.1f} s)")


def spinner(console: Console, doing: str) -> Live:
    """A spinner that is gone at the end, and that leaves sys.stderr alone.

    `Console.status` puts a writer of its own there, by which ExecuTorch's C++ code, whose notes go through sys.stderr,
    would reach the terminal although file descriptor 2 leads elsewhere (`quiet.hold_native_notes`).
    """
    turning = Spinner("dots", text=doing, style="status.spinner")
    return Live(
        turning, console=console, transient=True, refresh_per_second=12.5, redirect_stdout=False, redirect_stderr=False
    )
