"""The child process of an export for a GPU by name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from executorch_moe.export.cli.app import app
from executorch_moe.export.options import Context, Dense, Experts, ExportOptions, Target
from executorch_moe.export.own_process import Request, export_in_own_process

from .refusals import refused, runner


def test_export_for_another_gpu_runs_in_its_own_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str]) -> int:
        commands.append(command)
        return 3

    monkeypatch.setattr("executorch_moe.backends.cuda.cross.target.check_target", lambda target: None)
    monkeypatch.setattr("executorch_moe.export.own_process.run_to_the_end", run)
    result = runner.invoke(
        app,
        ["export", "tiny", "-o", str(tmp_path / "x.pte"), "--target", "h200", "--dtype", "bf16", "--algorithm", "hqq"],
    )
    assert result.exit_code == 3 and result.output == ""
    (command,) = commands
    assert command[1:4] == ["-m", "executorch_moe.export.cli", "export-child"]
    request = Request.from_json(command[4])
    assert request.parent == os.getpid() and request.report is None and not request.verbose
    assert request.options.target == Target("h200", "bf16") and request.options.experts == Experts(algorithm="hqq")
    # The other process gets the same options, all of them.
    options = ExportOptions(
        "synthetic:tiny",
        tmp_path / "y.pte",
        experts=Experts("w4a8", 64, implementation="upstream"),
        dense=Dense("int4", "int8", "int8"),
        target=Target("sm_90", "bf16"),
        context=Context(77, "logits"),
        layers=3,
        seed=11,
        placeholder_weights=True,
    )
    export_in_own_process(Request(options, tmp_path / "r.json", True, 1))
    received: list[ExportOptions] = []
    monkeypatch.setattr("executorch_moe.export.own_process.end_with_parent", lambda parent: None)
    monkeypatch.setattr("executorch_moe.export.pipeline.export_model", lambda given, _: received.append(given))
    runner.invoke(app, commands[1][3:])
    assert received == [options]


@pytest.mark.parametrize(
    ("group", "how"),
    [(True, signal.SIGINT), (False, signal.SIGINT), (False, signal.SIGTERM)],
    ids=["Ctrl-C", "parent only", "asked to end"],
)
def test_an_interrupted_export_in_its_own_process_cleans_up(tmp_path: Path, group: bool, how: signal.Signals) -> None:
    """The other process gets the time that it needs, longer than `subprocess.run` would wait."""
    # A shell that starts tests in the background makes them ignore Ctrl-C, which child processes inherit.
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    child = heed + (
        "import pathlib, sys, time\n"
        "pathlib.Path(sys.argv[1], 'begun').touch()\n"
        "try: time.sleep(60)\n"
        "finally: time.sleep(1); pathlib.Path(sys.argv[1], 'cleaned').touch()"
    )
    parent = heed + (
        "import sys\n"
        "from executorch_moe.export import own_process\n"
        "own_process.INTERRUPTED_SECONDS = 3\n"
        "sys.exit(own_process.run_to_the_end([sys.executable, '-c', *sys.argv[1:]]))"
    )
    command = [sys.executable, "-c", parent, child, str(tmp_path)]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    while not (tmp_path / "begun").exists() and process.poll() is None:
        time.sleep(0.05)
    (os.killpg if group else os.kill)(process.pid, how)
    assert process.wait(60) != 0
    assert (tmp_path / "cleaned").exists()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (signal.SIGKILL, "the export was ended by SIGKILL: memory may have run out: export on a machine with more"),
        (signal.SIGSEGV, "the export was ended by SIGSEGV: start it again"),
    ],
)
def test_a_killed_export_in_its_own_process_is_reported(
    how: signal.Signals, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("executorch_moe.backends.cuda.cross.target.check_target", lambda target: None)
    monkeypatch.setattr("executorch_moe.export.own_process.run_to_the_end", lambda command: -how)
    command = ("export", "tiny", "-o", tmp_path / "x.pte", "--target", "sm_90")
    assert refused(*command).endswith(message)
    (tmp_path / "x.work").mkdir()
    assert f"packed layers are kept in {tmp_path / 'x.work'}: the same" in refused(*command)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_an_export_in_its_own_process_ends_with_its_parent(tmp_path: Path) -> None:
    child = (
        "import os, pathlib, sys, time\n"
        "from executorch_moe.export.own_process import end_with_parent\n"
        "end_with_parent(int(sys.argv[1]))\n"
        "pathlib.Path(sys.argv[2], 'pid').write_text(str(os.getpid())); time.sleep(60)"
    )
    parent = (
        "import os, sys\n"
        "from executorch_moe.export.own_process import run_to_the_end\n"
        "run_to_the_end([sys.executable, '-c', sys.argv[1], str(os.getpid()), sys.argv[2]])"
    )
    process = subprocess.Popen([sys.executable, "-c", parent, child, str(tmp_path)])
    pid = tmp_path / "pid"
    while not (pid.exists() and pid.read_text()) and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.wait()
    stat = Path("/proc", pid.read_text(), "stat")
    deadline = time.monotonic() + 30
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert time.monotonic() < deadline
    # A child whose parent has ended already ends at once.
    late = subprocess.run([sys.executable, "-c", child, "1", str(tmp_path)], timeout=60)
    assert late.returncode == 1
