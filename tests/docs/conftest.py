"""One folder in which the commands and examples of all pages run."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from executorch_moe.export.cli.app import app

from ..export.conftest import MadeOnce, tiny_artifact
from .commands import PROGRAM
from .pages import ROOT


class Workspace:
    """A folder that looks like the repository's root, and the commands that were run in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        for name in ("examples", "docs", "tests"):
            (path / name).symlink_to(ROOT / name)
        self.done: set[str] = set()

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Within it, the folder is the current one."""
        before = Path.cwd()
        os.chdir(self.path)
        try:
            yield
        finally:
            os.chdir(before)

    def run(self, line: str) -> None:
        """Run a command line, once: pages share commands, and an export to one name is not made again."""
        words = shlex.split(line)
        key = words[words.index("-o") + 1] if words[:2] == [PROGRAM, "export"] else line
        if key in self.done:
            return
        self.done.add(key)
        if words[0] == PROGRAM:  # in this process, which has imported torch
            with self.entered():
                result = CliRunner().invoke(app, words[1:])
            assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception!r}"
            return
        words[0] = sys.executable if words[0] == "python" else words[0]
        run = subprocess.run(words, cwd=self.path, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, f"{line}\n{run.stdout}\n{run.stderr}"


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory, made_once: MadeOnce) -> Workspace:
    """With an export of the tiny model, which other tests use too, in place of the demo model's (`make demo`)."""
    made = Workspace(tmp_path_factory.mktemp("docs"))
    (made.path / "demo").mkdir()
    for file in tiny_artifact(made_once, "w4a16", "cpu").parent.iterdir():
        shutil.copy(file, made.path / "demo" / file.name.replace("tiny", "demo", 1))
    made.done.add("demo/demo.pte")
    return made
