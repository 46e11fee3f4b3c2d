"""The process of an export for a GPU that is not here: it ends with the one that started it, and why it ended."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

from executorch_moe.export.checkpoint.work_folder import work_folder_path

_PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int) -> None:
    """Has Linux kill this process when the one that started it ends, even if that is killed: it would write the output
    when nobody expects it any more.

    Args:
        parent: process id of who started this one.

    Raises:
        SystemExit: it has ended already.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit(1)


def why_killed(number: int, pte: Path) -> str:
    """What to tell the user of an export for `pte` that a signal ended: it could not say anything itself."""
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    reason = "memory may have run out: export where there is more" if number == signal.SIGKILL else "start it again"
    work = work_folder_path(pte)
    kept = f"; packed layers are kept in {work}: the same command goes on from there" if work.is_dir() else ""
    return f"the export was ended by {name}: {reason}{kept}"
