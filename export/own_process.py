"""The child process of an export for a GPU by name: how it is started, ended, and explained if a signal ends it."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .options import ExportOptions

INTERRUPTED_SECONDS = 10
"""How long a child process may take to end after Ctrl-C before it is interrupted itself."""

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Request:
    """What the child process is asked to do, passed to it as JSON.

    Attributes:
        options: of the export.
        report: file for the export's report.
        verbose: print more.
        parent: process id of the process that started the child.
    """

    options: ExportOptions
    report: Path | None = None
    verbose: bool = False
    parent: int = 0

    def to_json(self) -> str:
        """JSON for `from_json`."""
        report = None if self.report is None else str(self.report)
        rest = {"report": report, "verbose": self.verbose, "parent": self.parent}
        return json.dumps({"options": json.loads(self.options.to_json()), **rest})

    @classmethod
    def from_json(cls, text: str) -> Request:
        """The request that `to_json` wrote.

        Raises:
            ValueError: see `ExportOptions.from_json`.
        """
        from .options import ExportOptions

        values = json.loads(text)
        report = None if values["report"] is None else Path(values["report"])
        options = ExportOptions.from_json(json.dumps(values["options"]))
        return cls(options, report, values["verbose"], values["parent"])


def export_in_own_process(request: Request, *, debug: bool = False) -> int:
    """Runs the export in another Python process; returns its exit status.

    Compiling for a GPU by name replaces functions of torch and Triton for a whole process.

    Raises:
        RuntimeError: a signal ended the process.
    """
    command = [sys.executable, "-m", "executorch_moe.export.cli", *(["--debug"] if debug else [])]
    status = run_to_the_end([*command, "export-child", request.to_json()])
    if status < 0:
        raise RuntimeError(why_killed(-status, request.options.pte))
    return status


def run_to_the_end(command: list[str]) -> int:
    """Exit status of a child process. After Ctrl-C it gets the time to remove temporary files.

    `subprocess.run` kills the child a quarter of a second after Ctrl-C, and its temporary files stay. SIGTERM is passed
    on as Ctrl-C; otherwise the child would continue alone.
    """
    process = subprocess.Popen(command)
    before = signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGINT))
    try:
        return process.wait()
    except KeyboardInterrupt:
        try:
            process.wait(INTERRUPTED_SECONDS)  # a terminal interrupts both processes
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def end_with_parent(parent: int) -> None:
    """Makes Linux kill this process when its parent ends, even if the parent is killed.

    Otherwise this process would write the output when nobody expects it any more.

    Args:
        parent: process id of the parent.

    Raises:
        SystemExit: the parent has ended already.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit(1)


def why_killed(number: int, pte: Path) -> str:
    """The error message for an export to `pte` whose process was ended by a signal and could not print one itself."""
    from executorch_moe.export.checkpoint.work_folder import work_folder_path

    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    reason = "memory may have run out: export on a machine with more" if number == signal.SIGKILL else "start it again"
    work = work_folder_path(pte)
    kept = f"; packed layers are kept in {work}: the same command continues from there" if work.is_dir() else ""
    return f"the export was ended by {name}: {reason}{kept}"
