"""A pytest plugin that records a run: python -m pytest -p benchmarks.results_plugin --results-file FILE

The text that FILE contains at the start becomes the head of the record. The rest is written again after every test, so
that an interrupted run leaves a correct record, marked as incomplete. The reason of a failure is printed at once, under
pytest-xdist too.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

SLOWEST = 15
REASON_WIDTH = 300


class Record:
    """Outcomes, reasons and durations of the tests of one run, kept in a file.

    Attributes:
        expected: number of tests, 0 until it is known.
        ended: whether pytest finished without an interrupt.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.head = file, file.read_text() if file.is_file() else ""
        self.expected, self.ended = 0, False
        self.running: list[str] = []
        self.outcomes: dict[str, str] = {}
        self.seconds: Counter[str] = Counter()
        self.reasons: list[str] = []
        self.notes: dict[str, list[str]] = {}

    def started(self, test: str) -> None:
        self.running.append(test)
        self.write()

    def finished(self, test: str) -> None:
        if test in self.running:
            self.running.remove(test)
        self.write()

    def add(self, report: pytest.TestReport) -> None:
        """Add the report of one phase of a test: setup, call or teardown."""
        test = name(report.nodeid)
        self.seconds[test] += report.duration
        if report.failed:
            self.outcomes[test] = "FAILED" if report.when == "call" else "ERROR"
            where = "" if report.when == "call" else f", in {report.when}"
            self.reasons.append(f"{test}{where}\n{report.longreprtext}\n")
        elif report.when == "call" or report.skipped:
            expected_failure = hasattr(report, "wasxfail")
            outcome = ("XFAIL" if report.skipped else "XPASS") if expected_failure else report.outcome.upper()
            self.outcomes.setdefault(test, outcome)
        if report.when == "teardown":
            for key, value in report.user_properties:
                self.notes.setdefault(key, []).append(str(value))

    def text(self) -> str:
        counts = Counter(self.outcomes.values())
        counted = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())) or "no outcome"
        state = "Complete" if self.ended and len(self.outcomes) >= self.expected else "Incomplete, cut off"
        lines = [f"{state}: {len(self.outcomes)} of {self.expected or 'an unknown number of'} tests: {counted}"]
        lines += [f"still running: {test}" for test in ([] if self.ended else self.running)]
        lines += ["", *(f"{outcome} {test}" for test, outcome in sorted(self.outcomes.items())), ""]
        lines += ["Slowest tests, seconds with their fixtures:"]
        lines += [f"{seconds:8.1f} {test}" for test, seconds in self.seconds.most_common(SLOWEST)]
        for title, values in sorted(self.notes.items()):
            lines += ["", f"{title}:", *sorted(values)]
        if self.reasons:
            lines += ["", "Reasons of failures:", "", *self.reasons]
        return self.head + "\n".join(lines).rstrip() + "\n"

    def write(self) -> None:
        aside = self.file.with_suffix(".tmp")
        aside.write_text(self.text())
        aside.replace(self.file)


def name(nodeid: str) -> str:
    """Test id without the group that pytest-xdist appends."""
    path, _, group = nodeid.rpartition("@")
    return path if path and not group.endswith("]") and "::" not in group else nodeid


def reason(report: pytest.TestReport) -> str:
    """Reason of a failure in one line: the first line of the error, or else the last line of the report."""
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = (crash.message.splitlines()[:1] if crash else report.longreprtext.splitlines()[-1:]) or ["no reason"]
    where = f" ({os.path.relpath(crash.path)}:{crash.lineno})" if crash else ""
    return lines[0][:REASON_WIDTH] + where


class Plugin:
    """Passes the events of pytest's main process to a `Record`."""

    def __init__(self, record: Record, config: pytest.Config) -> None:
        self.record, self.config = record, config

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.record.expected = self.record.expected or len(session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: object, ids: list[str]) -> None:
        self.record.expected = len(ids)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.record.started(name(nodeid))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.record.add(report)
        if report.failed:
            terminal = self.config.pluginmanager.get_plugin("terminalreporter")
            terminal.ensure_newline()
            terminal.write_line(f"  why {name(report.nodeid)}: {reason(report)}")

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.record.finished(name(nodeid))

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        self.record.ended = exitstatus != pytest.ExitCode.INTERRUPTED
        self.record.write()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results-file", type=Path, help="keep a record of the run in this file")


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("--results-file")
    if file is not None and not hasattr(config, "workerinput"):  # pytest-xdist's workers report to the main process
        config.pluginmanager.register(Plugin(Record(file), config))
