"""Artifacts that several test files read, each exported once a session; a summary of bit-equality."""

from __future__ import annotations

import pytest
from emulated_cuda import lower_emulated, stateful_programs
from tiny_artifacts import CONSTANTS, export_linear

from executorch_moe.backends.artifact import Artifact, save
from executorch_moe.backends.pybindings import why_not_pybindings

_BITS: list[str] = []


@pytest.fixture
def note_bits():
    """Adds a line to the summary that follows the tests: passing tests print nothing otherwise."""
    return _BITS.append


def pytest_terminal_summary(terminalreporter) -> None:
    if _BITS:
        terminalreporter.section("delegates against eager")
        for line in _BITS:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def executorch_runtime() -> None:
    """For tests that run a program in ExecuTorch's own runtime."""
    if why := why_not_pybindings():
        pytest.skip(why)


@pytest.fixture(scope="session")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export_linear(tmp_path_factory.mktemp("linear") / "model")


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """prefill, decode and peek with CudaBackend delegates that are compiled for the CPU."""
    _, programs = stateful_programs()
    return save(lower_emulated(programs, CONSTANTS), tmp_path_factory.mktemp("emulated") / "model")
