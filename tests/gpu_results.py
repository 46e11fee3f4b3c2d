"""Runs the tests that need a GPU and writes what happens to tests/results/DATE-gpu.txt, as it happens.

python tests/gpu_results.py [pytest arguments]
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DISTRIBUTIONS = ("torch", "triton", "executorch", "torchao", "transformers")
PYTEST = (sys.executable, "-m", "pytest", "-p", "tests.results_plugin", "-v", "--tb=short", "--color=no")


def version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def commit() -> str:
    """The commit under test, from COMMIT or from git, and whether the tree differs from it."""
    if told := os.environ.get("COMMIT"):
        return told
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + (" with uncommitted changes" if dirty.strip() else "")


def header(command: str, title: str) -> list[str]:
    """First lines of a record: when, what, of which code, on which GPU, with which packages."""
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
    """Where records go: tests/results, or the folder that RESULTS names."""
    folder = Path(os.environ.get("RESULTS") or ROOT / "tests" / "results")
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
    """Run it to its end, or to ours: on SIGTERM, which `timeout` sends, pytest is ended; its record is written by then.

    Returns:
        pytest's exit status; negative: the signal that ended it.
    """
    # Lines come as they are printed, whatever they are printed to.
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1"}) as run:
        stock = signal.signal(signal.SIGTERM, lambda *_: run.terminate())
        try:
            return run.wait()
        finally:
            signal.signal(signal.SIGTERM, stock)


if __name__ == "__main__":
    sys.exit(main())
