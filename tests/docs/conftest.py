"""One folder in which the commands and examples of all pages run, with one export."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .commands import PROGRAM
from .pages import ROOT

EXPORT = f"{PROGRAM} export demo -o demo/demo.pte --target cpu"
"""Makes what the examples of all pages use; the pages export the same in other words."""


class Workspace:
    """A folder that looks like the repository's root, and the commands that were run in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        for name in ("examples", "docs", "tests"):
            (path / name).symlink_to(ROOT / name)
        self.exported: set[str] = set()

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Within it, the folder is the current one."""
        before = Path.cwd()
        os.chdir(self.path)
        try:
            yield
        finally:
            os.chdir(before)

    def run(self, line: str) -> str:
        """Run a command line and return its stdout; an export to a name that is there already is not made again."""
        words = shlex.split(line)
        if words[:2] == [PROGRAM, "export"]:
            out = words[words.index("-o") + 1]
            if out in self.exported:
                return ""
            self.exported.add(out)
        if words[0] == PROGRAM:
            words = [sys.executable, "-m", "executorch_moe.export.cli", *words[1:]]
        elif words[0] == "python":
            words[0] = sys.executable
        environment = os.environ | {"PYTHONWARNINGS": "ignore", "COLUMNS": "120"}
        result = subprocess.run(words, cwd=self.path, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, f"{line}\n{result.stdout}\n{result.stderr}"
        return result.stdout


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """With the demo model exported for the CPU."""
    made = Workspace(tmp_path_factory.mktemp("docs"))
    made.run(EXPORT)
    return made
