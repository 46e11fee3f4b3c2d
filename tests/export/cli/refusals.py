"""Runs commands that must be refused."""

from __future__ import annotations

from typer.testing import CliRunner

from executorch_moe.export.cli.app import app

runner = CliRunner()


def refused(*arguments: object, steps: tuple[str, ...] = ()) -> str:
    """The one line that a refused command prints; asserts status 2, no traceback, nothing on stdout."""
    result = runner.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    # Lines above the error: completed steps, and the step that failed.
    *before, line = result.stderr.strip().splitlines()
    expected = all(step.startswith(("done ", *steps)) or step.endswith(" ...") for step in before)
    assert line.startswith("error: ") and expected, result.stderr
    return line
