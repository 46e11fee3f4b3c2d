"""Artifacts that several test files read; each is exported once a session."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from emulated_cuda import lower_emulated, stateful_programs
from torch.export import export

from executorch_moe.backends.artifact import Artifact, save
from executorch_moe.backends.targets import lower

CONSTANTS = {"get_vocab_size": 7, "get_eos_ids": [1, 2], "name": "tiny", "rope_theta": 1.5, "use_kv_cache": True}


def export_linear(path: Path, *, seed: int = 0, width: int = 3) -> Artifact:
    """A linear layer for the CPU target: the smallest artifact with weights."""
    torch.manual_seed(seed)
    program = export(torch.nn.Linear(4, width), (torch.randn(2, 4),))
    return save(lower({"forward": program}, "cpu", CONSTANTS), path)


@pytest.fixture(scope="session")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export_linear(tmp_path_factory.mktemp("linear") / "model")


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """prefill, decode and peek with CudaBackend delegates that are compiled for the CPU."""
    _, programs = stateful_programs()
    return save(lower_emulated(programs, CONSTANTS), tmp_path_factory.mktemp("emulated") / "model")
