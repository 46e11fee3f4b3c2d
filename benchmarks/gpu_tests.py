"""Runs the tests that need a GPU and writes their outcomes to benchmarks/results/DATE-gpu.txt while they run.

Usage, in the root of the repository: python -m benchmarks.gpu_tests [pytest arguments]
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DISTRIBUTIONS = ("torch", "triton", "executorch", "torchao", "transformers")
PYTEST = (sys.executable, "-m", "pytest", "-p", "benchmarks.results_plugin", "-v", "--tb=short", "--color=no")


def version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def commit() -> str:
    """Commit under test, from the variable COMMIT or from git, with a note if the working tree differs from it.

    Raises:
        SystemExit: COMMIT is no commit's name: nobody could tell later what a record is about.
    """
    if given := os.environ.get("COMMIT"):
        if not re.fullmatch(r"[0-9a-f]{7,40}", given):
            raise SystemExit(
                f"error: COMMIT={given} is not the name of a commit: use the output of `git rev-parse HEAD`, or unset "
                "it in a git checkout"
            )
        return given
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + (" with uncommitted changes" if dirty.strip() else "")


def header(command: str, title: str) -> list[str]:
    """First lines of a record: title and time, command, commit, GPU, and versions of the packages."""
    import torch

    now = datetime.datetime.now(datetime.timezone.utc)
    return [
        f"{title} of executorch-moe, {now:%Y-%m-%d %H:%M} UTC",
        f"command: {command}",
        f"commit: {commit()}",
        f"GPU: {torch.cuda.get_device_name()}; Python {platform.python_version()}; CUDA {torch.version.cuda}",
        "; ".join(f"{name} {version(name)}" for name in DISTRIBUTIONS),
        "",
    ]


def results_folder() -> Path:
    """Folder for records: benchmarks/results, or the one that the variable RESULTS names. It is made if missing."""
    folder = Path(os.environ.get("RESULTS") or ROOT / "benchmarks" / "results")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def main() -> int:
    import torch

    if not torch.cuda.is_available():
        print(f"error: no CUDA device for torch {torch.__version__}: run this on a GPU machine, or use `make test`.")
        return 2
    given = f' GPU_PYTEST_FLAGS="{" ".join(sys.argv[1:])}"' if sys.argv[1:] else ""
    now = datetime.datetime.now(datetime.timezone.utc)
    out = results_folder() / f"{now:%Y-%m-%d}-gpu.txt"
    out.write_text("\n".join(header(f"make test-gpu{given}", "GPU tests")))
    status = run_pytest([*PYTEST, "-m", "gpu", "--results-file", str(out), *sys.argv[1:]])
    print(f"written: {out}")
    return status


def run_pytest(command: list[str]) -> int:
    """Run pytest and wait for it. SIGTERM, which `timeout` sends, is passed on to it.

    Returns:
        pytest's exit status; if negative, the number of the signal that ended it.
    """
    # Unbuffered, so that each line appears at once even where stdout is a file or a pipe.
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1"}) as run:
        stock = signal.signal(signal.SIGTERM, lambda *_: run.terminate())
        try:
            return run.wait()
        finally:
            signal.signal(signal.SIGTERM, stock)


if __name__ == "__main__":
    sys.exit(main())
