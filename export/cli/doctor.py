"""`executorch-moe doctor`."""

from __future__ import annotations

import typer
from rich.markup import escape
from rich.table import Table

from executorch_moe.export.progress import OneLineConsole

from .app import app, command, console, quiet_unless

COLORS = {"ok": "green", "warn": "yellow", "fail": "red"}


@command(app, "doctor")
def doctor() -> None:
    """Check versions, GPU and runtimes, with a remedy for each problem. Exit status 1 if a check fails."""
    quiet_unless(False)
    from executorch_moe.export.doctor import FAIL, run_checks

    with console.status("checking"):
        checks = run_checks()
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        mark = f"[{COLORS[check.status]}]{check.status}[/{COLORS[check.status]}]"
        remedy = f": {check.remedy}" if check.remedy else ""
        table.add_row(mark, escape(check.name), escape(check.found + remedy))
    OneLineConsole().print(table)
    if any(check.status == FAIL for check in checks):
        raise typer.Exit(1)
