"""Memory of this machine, and the peak memory of this process."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")
_LIMIT = Path("/sys/fs/cgroup/memory.max")
_RESET = Path("/proc/self/clear_refs")


def restart_peak() -> None:
    """Restarts the peak of `peak_rss`. Where that fails, the peak is that of the whole process."""
    with contextlib.suppress(OSError):
        _RESET.write_text("5")


def peak_rss() -> int:
    """Most bytes that were resident since `restart_peak`, mapped files included; 0 if unknown."""
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
    """Bytes of memory that this process may use; 0 if unknown."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows
        return 0
    try:
        return min(total, int(_LIMIT.read_text()))  # limit of a container
    except (OSError, ValueError):
        return total


def size(num_bytes: float) -> str:
    """A readable size: 1.9 MB."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.2f} GB" if num_bytes < 1000 else f"{num_bytes / 1000:,.1f} TB"
