"""Consoles, and the steps of an export: shown on a console, with time and peak memory."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from rich.console import Console, ConsoleDimensions
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.spinner import Spinner

from .host_memory import peak_rss, restart_peak

UNWRAPPED = 100_000
"""Width of what is not a terminal, in characters."""


class OneLineConsole(Console):
    """A console that wraps lines on terminals only: files and pipes get each line and each table row whole.

    A width from the environment (COLUMNS) is for terminals too.
    """

    @property
    def size(self) -> ConsoleDimensions:
        """Columns and rows of the terminal."""
        return super().size if self.is_terminal else ConsoleDimensions(UNWRAPPED, 25)

    @size.setter
    def size(self, new_size: tuple[int, int]) -> None:
        self._width, self._height = new_size


@dataclass
class Steps:
    """The steps of an export.

    Attributes:
        console: where they are shown; None shows nothing.
        seconds: step -> its time.
        peaks: step -> most bytes resident during it.
    """

    console: Console | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)

    @contextlib.contextmanager
    def step(self, name: str, doing: str, note: str = "") -> Iterator[None]:
        """One step, with a spinner; the note is shown while it runs."""
        shown = escape(doing + note)
        waiting = self.console.status(shown) if self.console is not None else contextlib.nullcontext()
        with self._measured(name, doing, note), waiting:
            yield

    @contextlib.contextmanager
    def counted(self, name: str, doing: str, total: int) -> Iterator[Callable[[object], None]]:
        """One step with a progress bar; yields a function to call after each of `total` parts."""
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
        """Prints a line."""
        if self.console is not None:
            self.console.print(text, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def _measured(self, name: str, doing: str, note: str = "") -> Iterator[None]:
        if self.console is not None and not self.console.is_terminal:
            self.say(f"{escape(doing + note)} ...")  # no spinner is visible, and a step may take minutes
        start = time.perf_counter()
        restart_peak()
        yield
        self.seconds[name], self.peaks[name] = time.perf_counter() - start, peak_rss()
        self.say(f"[green]done[/green] {escape(doing)} ({self.seconds[name]:.1f} s)")


def spinner(console: Console, doing: str) -> Live:
    """A spinner that disappears at the end and does not replace sys.stderr.

    `Console.status` replaces it. Notes of ExecuTorch's C++ code, which go through sys.stderr, would then reach the
    terminal although file descriptor 2 is redirected (`quiet.hold_native_notes`).
    """
    turning = Spinner("dots", text=doing, style="status.spinner")
    return Live(
        turning, console=console, transient=True, refresh_per_second=12.5, redirect_stdout=False, redirect_stderr=False
    )


def progress_bar(console: Console) -> Progress:
    """A progress bar that disappears at the end; nothing where the console is no terminal. Leaves sys.stderr alone."""
    return Progress(
        console=console, transient=True, disable=not console.is_terminal, redirect_stdout=False, redirect_stderr=False
    )
