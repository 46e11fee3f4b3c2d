"""Faster interpretation of kernels, and a summary of compiled kernels, which passing tests would not show."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

PROPERTY = "compiled kernels"


@pytest.fixture(scope="session", autouse=True)
def interpreter_patches_once() -> Iterator[None]:
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from .patched_once import patched_once

    with patched_once():
        yield


def pytest_terminal_summary(terminalreporter) -> None:
    lines = [
        line
        for report in terminalreporter.stats.get("passed", [])
        for name, line in getattr(report, "user_properties", [])
        if name == PROPERTY
    ]
    if lines:
        terminalreporter.section("kernels compiled without a GPU: most registers, spilled bytes, shared memory")
        for line in sorted(lines):
            terminalreporter.write_line(line)
