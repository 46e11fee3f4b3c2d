"""Runs the tests that need a GPU and writes what happened to tests/results/DATE-gpu.txt.

python tests/gpu_results.py [pytest arguments]
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DISTRIBUTIONS = ("torch", "triton", "executorch", "torchao", "transformers")


def version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def digest(lines: list[str]) -> list[str]:
    """What pytest -v printed, as a record: each test's outcome, sorted, then failures, own sections and summary.

    Warnings and the folders of one machine are left out.
    """
    outcome = re.compile(r"(?:(tests/\S.*?) )?(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b(?: (tests/\S.*))?")
    outcomes, tail, section = set(), [], "test session starts"
    for line in lines:
        if heading := re.fullmatch(r"=+ (.*?) =+", line):
            section = heading[1]
        if section == "test session starts":
            if found := outcome.search(line):
                outcomes.add(f"{found[2]} {(found[1] or found[3] or '').strip()}")
        elif section != "warnings summary":
            tail.append(line)
    return [*sorted(outcomes, key=lambda entry: entry.partition(" ")[2]), "", *tail]


def commit() -> str:
    """The commit under test and whether the tree differs from it; 'unknown' outside a checkout."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + (" with uncommitted changes" if dirty.strip() else "")


def main() -> int:
    import torch

    if not torch.cuda.is_available():
        print(f"error: no CUDA device for torch {torch.__version__}: run this on a GPU machine, or use `make test`.")
        return 2
    now = datetime.datetime.now(datetime.timezone.utc)
    header = [
        f"GPU tests of executorch-moe, {now:%Y-%m-%d %H:%M} UTC",
        "command: make test-gpu" + (f' GPU_PYTEST_FLAGS="{" ".join(sys.argv[1:])}"' if sys.argv[1:] else ""),
        f"commit: {commit()}",
        f"GPU: {torch.cuda.get_device_name()}; Python {platform.python_version()}; CUDA {torch.version.cuda}",
        "; ".join(f"{name} {version(name)}" for name in DISTRIBUTIONS),
        "",
    ]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--tb=short", "--color=no", *sys.argv[1:]]
    lines: list[str] = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        assert run.stdout is not None
        for line in run.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip().replace(str(ROOT) + os.sep, ""))
    folder = ROOT / "tests" / "results"
    folder.mkdir(exist_ok=True)
    out = folder / f"{now:%Y-%m-%d}-gpu.txt"
    aside = out.with_suffix(".tmp")
    aside.write_text("\n".join(header + digest(lines)) + "\n")
    aside.replace(out)
    print(f"written: {out.relative_to(ROOT)}")
    return run.returncode


if __name__ == "__main__":
    sys.exit(main())
