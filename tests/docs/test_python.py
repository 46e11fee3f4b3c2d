"""Python blocks of the pages run, in the order of their page, each in a namespace of its own."""

from __future__ import annotations

import contextlib
import io
import re
from typing import Any

import pytest

from .conftest import Workspace
from .pages import ROOT, Block, all_blocks

BLOCKS = all_blocks("python")


def runs(block: Block) -> Any:
    """Exports of the demo model take a minute of one core, as `make demo` does."""
    exports = "export_model(" in block.text
    return pytest.param(block, id=str(block), marks=pytest.mark.exhaustive if exports else ())


@pytest.mark.parametrize("block", [runs(block) for block in BLOCKS if not block.reason])
@pytest.mark.slow
@pytest.mark.xdist_group("docs")
def test_python_runs(block: Block, workspace: Workspace) -> None:
    code = compile(block.text, str(block), "exec")
    with workspace.entered(), contextlib.redirect_stdout(io.StringIO()):
        exec(code, {"__name__": "__main__"})


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.reason], ids=str)
def test_python_that_does_not_run_is_python(block: Block) -> None:
    compile(block.text, str(block), "exec")


def test_readme_quotes_the_export_example() -> None:
    (block,) = (b for b in BLOCKS if b.page.name == "README.md")
    script = re.search(r"examples/\w+\.py", block.reason)
    assert script is not None
    code = (ROOT / script[0]).read_text(encoding="utf-8").split('"""', 2)[2].strip()
    assert block.text.strip() == code
