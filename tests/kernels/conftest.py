"""Prints a summary of compiled kernels, which passing tests would not show."""

from __future__ import annotations

PROPERTY = "compiled kernels"


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
