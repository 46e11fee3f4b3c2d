"""Runs GPU tests of the kernels under compute-sanitizer and writes what it found to tests/results/DATE-TOOL.txt.

python tests/gpu_sanitizers.py memcheck|racecheck|initcheck [pytest arguments]

memcheck runs every GPU test of tests/kernels; racecheck and initcheck those of the kernels whose programs work on
common buffers: routing, few tokens, one token. Exported models are under memcheck in `make test-gpu` itself.
"""

from __future__ import annotations

import datetime
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from gpu_results import ROOT, header, results_folder

# Without CUDA graphs and opcheck, which are about other things and take minutes.
SMALL = "few_token or on_a_gpu or zero_points or no_tokens or (against_the_oracle and (few_tokens or hot or empty))"
TESTS = {
    "memcheck": ["tests/kernels", "-k", "not opcheck and not graph and not qwen35 and not in_a_row"],
    "racecheck": ["tests/kernels", "-k", SMALL],
    "initcheck": ["tests/kernels", "-k", SMALL],
}


def main(tool: str, *arguments: str) -> int:
    if tool not in TESTS:
        print(f"error: {tool!r} is no tool: choose one of {', '.join(TESTS)}")
        return 2
    out = results_folder() / f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}-{tool}.txt"
    with tempfile.TemporaryDirectory() as folder:
        # An allocation each: nothing is read from, or taken for, the memory of another tensor.
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONUNBUFFERED": "1"}
        command = ["compute-sanitizer", "--tool", tool, "--target-processes", "all", "--log-file", f"{folder}/%p.txt"]
        command += [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--tb=short", "--color=no"]
        run = subprocess.run(
            [*command, *TESTS[tool], *arguments], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE
        )
        logs = [path.read_text(errors="replace") for path in sorted(Path(folder).iterdir())]
    print(run.stdout[-6000:])
    errors = sum(int(count) for log in logs for count in re.findall(r"(\d+) (?:error|hazard)s?\b", _summary(log)))
    passed = re.search(r"(\d+) passed", run.stdout)
    last = run.stdout.strip().splitlines()[-1] if run.stdout.strip() else "no output"
    # A log without a summary is of a process that the tool did not see to its end.
    watched = sum(bool(_summary(log)) for log in logs)
    clean = run.returncode == 0 and errors == 0 and watched > 0 and passed is not None
    lines = [
        *header(f"python tests/gpu_sanitizers.py {' '.join([tool, *arguments])}", f"{tool} over GPU tests"),
        f"{'Clean' if clean else 'NOT CLEAN'}: {errors} errors in {watched} processes; pytest: {last}",
        f"tests: {' '.join(TESTS[tool])}",
        "",
        *(log for log in logs if re.search(r"[1-9]\d* (?:error|hazard)s?\b", _summary(log))),
    ]
    out.write_text("\n".join(lines).rstrip()[:200_000] + "\n")
    print(f"{lines[5]}\nwritten: {out}")
    return 0 if clean else 1


def _summary(log: str) -> str:
    """The last line that counts errors or, for racecheck, hazards."""
    found = [line for line in log.splitlines() if "SUMMARY" in line]
    return found[-1].split("(")[0] if found else ""


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) if len(sys.argv) > 1 else main(""))
