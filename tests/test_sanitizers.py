"""How `make sanitize` reads the output of compute-sanitizer."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.gpu_tests import ROOT
from benchmarks.sanitizers import _is_finding


@pytest.mark.parametrize(
    ("line", "finding"),
    [
        ("========= COMPUTE-SANITIZER", False),
        ("========= ERROR SUMMARY: 0 errors", False),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", False),
        ("========= Target application terminated before first instrumented API call", False),
        ("=========", False),
        ("24 passed in 16.16s", False),
        ("========= Invalid __global__ read of size 4 bytes", True),
        ("========= Error: Race reported between Write access at moe_one_token_router", True),
        ("========= Uninitialized __global__ memory read of size 4 bytes", True),
        ("========= Program hit cudaErrorInvalidValue (error 1)", True),
        ("========= ERROR SUMMARY: 16 errors", True),
        ("========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)", True),
    ],
)
def test_findings(line: str, finding: bool) -> None:
    assert _is_finding(line) is finding


def test_an_unknown_tool_is_named() -> None:
    command = [sys.executable, "-m", "benchmarks.sanitizers", "nocheck"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stdout == "error: unknown tool 'nocheck': choose one of memcheck, racecheck, initcheck\n"
