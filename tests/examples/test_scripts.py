"""The scripts that a user copies run as they are, and the README quotes them word for word."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from executorch_moe.examples import runner

from ..export.conftest import MAX_CONTEXT, MadeOnce, tiny_artifact

ROOT = Path(__file__).resolve().parents[2]


def run(script: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [sys.executable, str(script), *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
    )


def test_readme_names_commands_that_exist() -> None:
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"make ([a-z][a-z-]*)", readme))
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for path in re.findall(r"\]\(([^)#:]+)\)", readme):
        assert (ROOT / path).exists(), path


@pytest.mark.slow
def test_export_example_writes_a_program_that_runs(tmp_path: Path) -> None:
    import torch

    from executorch_moe.backends.runtime.loader import load

    result = run(ROOT / "examples" / "export_tiny.py", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    program = load(tmp_path / "demo" / "tiny_logits.pte")
    outputs = program.run("forward", torch.zeros(1, 16, dtype=torch.int64))
    assert outputs[0].shape == (1, 16, 264) and torch.isfinite(outputs[0]).all()


@pytest.mark.slow
def test_runner_generates_text(tmp_path: Path, made_once: MadeOnce) -> None:
    pte = tiny_artifact(made_once, "w4a16", "cpu")
    result = run(ROOT / "examples" / "runner.py", str(pte), "The import", "200", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    # 10 positions for the prompt, as many more as there are, and the last token that is not fed back.
    assert result.stdout.startswith("The import") and len(result.stdout.rstrip("\n")) <= MAX_CONTEXT + 1
    assert "runtime: executorch (CPU)" in result.stderr
    with pytest.raises(SystemExit, match=f"the prompt has {MAX_CONTEXT + 8} tokens: give 1 to {MAX_CONTEXT}"):
        runner.main(str(pte), "x" * (MAX_CONTEXT + 8))
