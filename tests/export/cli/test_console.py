"""What is printed where: steps, notes of native code, text, errors of the program itself."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from executorch_moe.export.cli.app import app
from executorch_moe.export.progress import Steps

from .refusals import runner


def test_steps_are_shown_when_they_begin() -> None:
    """Without a terminal there is no spinner, and a step may take minutes."""
    shown = io.StringIO()
    steps = Steps(Console(file=shown))
    with steps.step("lower", "lowering to sm_90", " (compiles kernels: minutes)"):
        assert shown.getvalue() == "lowering to sm_90 (compiles kernels: minutes) ...\n"
    with steps.counted("pack", "packing [a]", 2) as advance:
        assert shown.getvalue().endswith("s)\npacking [a] ...\n")
        advance(None)
    lines = shown.getvalue().splitlines()
    assert re.fullmatch(r"done lowering to sm_90 \(\d\.\d s\)", lines[1])
    assert re.fullmatch(r"done packing \[a\] \(\d\.\d s\)", lines[3]) and len(lines) == 4
    on_terminal = io.StringIO()
    with Steps(Console(file=on_terminal, force_terminal=True)).step("write", "writing"):
        pass
    assert "writing ..." not in on_terminal.getvalue() and "done" in on_terminal.getvalue()


@pytest.mark.skipif(sys.platform == "win32", reason="needs pseudo-terminals")
def test_notes_of_native_code_are_held_back_on_a_terminal() -> None:
    """ExecuTorch's C++ code writes through sys.stderr, which rich's displays replace by default."""
    import pty

    code = (
        "import sys\n"
        "from executorch_moe.export.progress import progress_bar\n"
        "from executorch_moe.export.progress import spinner\n"
        "from executorch_moe.export.quiet import hold_native_notes\n"
        "with hold_native_notes() as terminal:\n"
        "    assert terminal.is_terminal\n"
        "    with spinner(terminal, 'loading'): print('a note', file=sys.stderr, flush=True)\n"
        "    with progress_bar(terminal): print('a note', file=sys.stderr, flush=True)\n"
        "print('the end', file=sys.stderr)"
    )
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-c", code], stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while piece := os.read(ours, 4096):
            shown += piece
    os.close(ours)
    assert process.wait(60) == 0, shown
    assert b"loading" in shown and b"the end" in shown and b"note" not in shown


def test_a_reader_that_has_enough_ends_the_program_without_a_word() -> None:
    code = (
        "import sys\n"
        "from executorch_moe.export.cli import app as cli\n"
        "@cli.app.command()\n"
        "@cli.one_line_errors\n"
        "def shout() -> None:\n"
        "    while True:\n"
        "        sys.stdout.write('a' * 1000); sys.stdout.flush()\n"
        "@cli.app.command()\n"
        "@cli.one_line_errors\n"
        "def lose_worker() -> None:\n"
        "    raise BrokenPipeError(32, 'Broken pipe')\n"
        "cli.app()"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen([*command, "shout"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(5) == b"aaaaa"
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(60) == 1
    other = subprocess.run([*command, "lose-worker"], capture_output=True)  # another pipe than ours
    assert other.returncode == 2 and b"error: [Errno 32] Broken pipe" in other.stderr


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = runner.invoke(app, ["--debug", "generate", str(tmp_path / "none.pte"), "-p", "a"])
    assert isinstance(result.exception, FileNotFoundError)


def test_an_error_of_the_program_itself_is_not_hidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*_: object) -> None:
        torch.zeros(2).reshape(3)

    monkeypatch.setattr("executorch_moe.export.pipeline.export_model", broken)
    result = runner.invoke(app, ["export", "tiny", "-o", str(tmp_path / "x.pte"), "--target", "cpu"])
    assert isinstance(result.exception, RuntimeError)
