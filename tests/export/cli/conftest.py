"""Fixtures of the command line's tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from executorch_moe.export.models.pretrained import resolve


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A copy of the tiny model to damage."""
    return Path(shutil.copytree(resolve("tiny"), tmp_path / "model"))
