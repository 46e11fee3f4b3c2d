"""Memory: what this machine has, and the peak of this process, step by step."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")
_LIMIT = Path("/sys/fs/cgroup/memory.max")
_RESET = Path("/proc/self/clear_refs")


def restart_peak() -> None:
    """Let `peak_rss` count from now on. Where the system cannot do that, it goes on counting from the start."""
    with contextlib.suppress(OSError):
        _RESET.write_text("5")


def peak_rss() -> int:
    """Most bytes that were resident since `restart_peak`, mapped files included; 0 where that cannot be known."""
    try:
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return 0
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024


def total_memory() -> int:
    """Bytes of memory that this process may use at most; 0 where that cannot be known."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows
        return 0
    try:
        return min(total, int(_LIMIT.read_text()))  # of a container
    except (OSError, ValueError):
        return total


def size(num_bytes: float) -> str:
    """A size for people: 1.9 MB."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.2f} GB" if num_bytes < 1000 else f"{num_bytes / 1000:,.1f} TB"
