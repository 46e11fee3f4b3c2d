"""The record of a GPU run: written during the run, and correct when the run is interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu_tests import PYTEST, ROOT, commit, run_pytest

TESTS = """
import time
import pytest

@pytest.fixture
def broken():
    raise OSError("no such machine")

def test_good(record_property):
    record_property("bits", "equal bit for bit")
    time.sleep(0.3)

def test_bad():
    assert 1 + 1 == 3, "sums are off"

def test_setup(broken):
    pass

def test_skipped():
    pytest.skip("not today")
"""
SLOW = """
import time

def test_quick():
    assert False, "failed before the end"

def test_slow():
    time.sleep(600)
"""


def command(folder: Path, tests: str, *arguments: str) -> list[str]:
    """Command that runs pytest on a file of tests in another folder, out of reach of this folder's conftest.py."""
    (folder / "test_some.py").write_text(tests)
    (folder / "record.txt").write_text("the head\n")
    places = ["--rootdir", str(folder), "-c", os.devnull, "-p", "no:cacheprovider", str(folder)]
    return [*PYTEST, "--results-file", str(folder / "record.txt"), *places, *arguments]


@pytest.mark.parametrize("arguments", [(), ("-n", "1")], ids=["one process", "xdist"])
def test_a_run_is_recorded_and_reasons_are_printed(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = subprocess.run(command(tmp_path, TESTS, *arguments), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    whys = [line.strip() for line in done.stdout.splitlines() if line.startswith("  why ")]
    assert [why.partition(" (")[0] for why in whys] == [
        "why test_some.py::test_bad: AssertionError: sums are off",
        "why test_some.py::test_setup: OSError: no such machine",
    ]
    record = (tmp_path / "record.txt").read_text()
    assert record.startswith("the head\nComplete: 4 of 4 tests: 1 ERROR, 1 FAILED, 1 PASSED, 1 SKIPPED\n\n")
    outcomes, _, rest = record.partition("Slowest tests")
    assert outcomes.split()[-8:] == [
        "FAILED", "test_some.py::test_bad", "PASSED", "test_some.py::test_good",
        "ERROR", "test_some.py::test_setup", "SKIPPED", "test_some.py::test_skipped",
    ]  # fmt: skip
    assert rest.splitlines()[1].endswith("test_some.py::test_good")  # the slowest first
    assert "bits:\nequal bit for bit\n" in rest
    assert "test_some.py::test_setup, in setup\n" in rest and "E   assert (1 + 1) == 3" in rest


def test_an_interrupted_run_leaves_a_record(tmp_path: Path) -> None:
    """`timeout` sends SIGTERM to the process that started pytest."""
    code = "import sys; from benchmarks.gpu_tests import run_pytest; print('status', run_pytest(sys.argv[1:]))"
    record = tmp_path / "record.txt"
    run = subprocess.Popen(
        [sys.executable, "-c", code, *command(tmp_path, SLOW)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    for _ in range(600):
        if "running: test_some.py::test_slow" in record.read_text():
            break
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    out, _ = run.communicate(timeout=30)
    assert f"status {-signal.SIGTERM}" in out and "why test_some.py::test_quick: AssertionError: failed before" in out
    text = record.read_text()
    assert "\nIncomplete, cut off: 1 of 2 tests: 1 FAILED\nstill running: test_some.py::test_slow\n" in text
    assert "failed before the end" in text


def test_the_status_is_pytests() -> None:
    assert run_pytest([sys.executable, "-c", "raise SystemExit(5)"]) == 5


def test_a_record_names_a_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMIT", "7886356")
    assert commit() == "7886356"
    monkeypatch.setenv("COMMIT", "MERGE")
    with pytest.raises(SystemExit, match="COMMIT=MERGE is not the name of a commit"):
        commit()
