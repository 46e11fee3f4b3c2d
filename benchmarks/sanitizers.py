"""Runs GPU tests of the kernels under compute-sanitizer and writes its findings to benchmarks/results/DATE-TOOL.txt.

Usage, in the root of the repository: python -m benchmarks.sanitizers memcheck|racecheck|initcheck [pytest arguments]

memcheck runs the GPU tests of tests/kernels. racecheck runs those of the kernels whose programs share buffers: routing,
few tokens, one token. initcheck runs fewer of these, because it has to watch every write, torch's too. `make test-gpu`
runs exported models under memcheck.

The tests run in one process. The worker processes of pytest-xdist end without the summary that shows that
compute-sanitizer watched them.
"""

from __future__ import annotations

import datetime
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from .gpu_tests import ROOT, header, results_folder

COMMON = "few_token or on_a_gpu or zero_points or no_tokens or (against_the_oracle and (few_tokens or hot or empty))"
FEW = "on_a_gpu or few_tokens_repeat or zero_points or no_tokens or (against_the_oracle and few_tokens and w4a16)"
OURS = ("--kernel-regex", "kns=moe_")
TOOLS = {
    # Leaves out tests of CUDA graphs and of torch.library, and sizes that take minutes.
    "memcheck": (OURS, "not opcheck and not graph and not qwen35 and not in_a_row and not four_billion"),
    "racecheck": (OURS, COMMON),
    "initcheck": ((), FEW),
}
"""Tool -> its options, and the expression for -k that chooses its GPU tests in tests/kernels."""


def main(tool: str, *arguments: str) -> int:
    if tool not in TOOLS:
        print(f"error: unknown tool {tool!r}: choose one of {', '.join(TOOLS)}")
        return 2
    import torch

    if not torch.cuda.is_available():
        print(f"error: no CUDA device for torch {torch.__version__}: run this on a GPU machine.")
        return 2
    if any(argument.startswith("-n") for argument in arguments):
        print("error: compute-sanitizer cannot watch the workers of -n: leave it out, and choose tests with -k.")
        return 2
    if shutil.which("compute-sanitizer") is None:
        print("error: compute-sanitizer is not on PATH: add the bin folder of the CUDA toolkit.")
        return 2
    options, tests = TOOLS[tool]
    out = results_folder() / f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}-{tool}.txt"
    with tempfile.TemporaryDirectory() as folder:
        # One allocation per tensor, so that an access beyond a tensor cannot land in another one.
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONUNBUFFERED": "1"}
        command = ["compute-sanitizer", "--tool", tool, "--target-processes", "all", "--log-file", f"{folder}/%p.txt"]
        command += [*options, sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--tb=short", "--color=no"]
        command += ["tests/kernels", "-k", tests, *arguments]
        run = subprocess.run(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE)
        logs = [path.read_text(errors="replace") for path in sorted(Path(folder).iterdir())]
    print(run.stdout[-6000:])
    found = [log for log in logs if any(_is_finding(line) for line in log.splitlines())]
    passed = re.search(r"(\d+) passed", run.stdout)
    last = run.stdout.strip().splitlines()[-1] if run.stdout.strip() else "no output"
    watched = sum("SUMMARY" in log for log in logs)
    clean = run.returncode == 0 and not found and watched > 0 and passed is not None
    verdict = f"{'Clean' if clean else 'NOT CLEAN'}: findings in {len(found)} of {watched} processes; pytest: {last}"
    lines = [
        *header(f"python -m benchmarks.sanitizers {' '.join([tool, *arguments])}", f"{tool} over GPU tests"),
        verdict,
        f"compute-sanitizer {' '.join(options)} over tests/kernels; without -k in the command: -k '{tests}'",
        "",
        *found,
    ]
    out.write_text("\n".join(lines).rstrip()[:200_000] + "\n")
    print(f"{verdict}\nwritten: {out}")
    return 0 if clean else 1


def _is_finding(line: str) -> bool:
    """True for a line of compute-sanitizer that reports an error, False for one about the run itself."""
    if not line.startswith("=========") or not (text := line.strip("= ")):
        return False
    if match := re.search(r"SUMMARY: (\d+)", text):
        return int(match[1]) > 0
    return not text.startswith(("COMPUTE-SANITIZER", "Target application"))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) if len(sys.argv) > 1 else main(""))
