"""A sharded checkpoint, saved once for each process, and copies of it to damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from .checkpoints import save_hub


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    save_hub("qwen3_moe", folder)
    return folder


@pytest.fixture
def spoiled(sharded: Path, tmp_path: Path) -> Path:
    """A copy of a sharded checkpoint, for a test to damage."""
    return Path(shutil.copytree(sharded, tmp_path / "model"))
