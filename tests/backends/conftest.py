"""Artifacts for several test files, each exported once in a session, and a summary of bit equality."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from emulated_cuda import lower_emulated, stateful_programs
from tiny_artifacts import CONSTANTS, export_linear

from executorch_moe.backends.artifact.files import Artifact, save
from executorch_moe.backends.runtime.pybindings import why_not_pybindings

BITS = "delegates against eager"


@pytest.fixture
def note_bits(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Add a line to the summary after the tests: passing tests print nothing."""
    return functools.partial(record_property, BITS)


def pytest_terminal_summary(terminalreporter) -> None:
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    if lines := [value for report in reports for key, value in report.user_properties if key == BITS]:
        terminalreporter.section(BITS)
        for line in lines:
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
def emulated(made_once: Callable[[str, Callable[[Path], None]], Path]) -> Artifact:
    """prefill, decode and peek with CudaBackend delegates that are compiled for the CPU."""

    def make(folder: Path) -> None:
        save(lower_emulated(stateful_programs()[1], CONSTANTS), folder / "model")

    folder = made_once("emulated", make)
    return Artifact(folder / "model.pte", folder / "model.ptd")
