"""`executorch-moe inspect`."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.console import Console

from executorch_moe.export.progress import OneLineConsole

from .app import (
    RESULT,
    ResultOption,
    app,
    check_format,
    check_pte,
    check_result,
    command,
    is_debug,
    is_users,
    quiet_unless,
    show_error,
    show_note,
    show_result,
    values,
)

if TYPE_CHECKING:
    from executorch_moe.backends.artifact.inspect import ArtifactReport

Item = TypeVar("Item")
Result = TypeVar("Result")
CHECKS = "Checks"


@command(app, "inspect")
def inspect(
    artifacts: Annotated[list[Path], typer.Argument(help="One or more .pte files of exports.")],
    target: Annotated[
        str | None,
        typer.Option(
            help="Also check that every method has code for these GPUs and no others.", rich_help_panel=CHECKS
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Only compare all bytes of .pte and .ptd with the digests of the export.",
            rich_help_panel=CHECKS,
        ),
    ] = False,
    output_format: Annotated[
        str,
        typer.Option(
            "--format",
            help="table or json; JSON of several artifacts is a list.",
            autocompletion=values("table", "json"),
            rich_help_panel=RESULT,
        ),
    ] = "table",
    out: ResultOption = None,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose", "-v", help="Show the tables of several artifacts, not one line each.", rich_help_panel=RESULT
        ),
    ] = False,
) -> None:
    """Show what is inside an artifact: tables for one, one line each for several.

    For artifacts with CUDA delegates, check that ExecuTorch's runtime can load them. Exit status 2 if a check fails.
    """
    quiet_unless(False)
    check_format(output_format, ("table", "json"))
    check_result(out)
    if verify:
        if target is not None or output_format != "table" or out is not None:
            raise ValueError("--verify only checks the files' bytes: leave --target and --format out, and --out")
        _, failed = for_each(artifacts, verify_files)
    else:
        reports, failed = for_each(artifacts, read)
        text = as_json(reports, len(artifacts)) if output_format == "json" else ""
        if text or out is not None:
            show_result(text or as_text(reports, verbose or len(artifacts) == 1), out)
        else:
            show_tables(reports, OneLineConsole(), verbose or len(artifacts) == 1)
        _, unfit = for_each(reports, lambda report: check_inside(report, target))
        failed = failed or unfit
    if failed:
        raise typer.Exit(2)


def for_each(items: Sequence[Item], act: Callable[[Item], Result]) -> tuple[list[Result], bool]:
    """Results of `act`, and True if it refused an item; what it refused of several is shown and left out."""
    results, failed = [], False
    for item in items:
        try:
            results.append(act(item))
        except Exception as error:
            if len(items) == 1 or is_debug() or not is_users(error):
                raise
            show_error(error, {})
            failed = True
    return results, failed


def read(artifact: Path) -> ArtifactReport:
    """What is inside an artifact."""
    from executorch_moe.backends.artifact.inspect import inspect_artifact

    check_pte(artifact)
    return inspect_artifact(artifact)


def as_json(reports: Sequence[ArtifactReport], asked: int) -> str:
    """JSON of one artifact, or a list if several were asked for."""
    from executorch_moe.export.report.inspection import contents

    found = [contents(report) for report in reports]
    if asked > 1:
        return json.dumps([{"artifact": str(r.pte), **c} for r, c in zip(reports, found, strict=True)], indent=2)
    return json.dumps(found[0], indent=2)


def as_text(reports: Sequence[ArtifactReport], whole: bool) -> str:
    """`show_tables` as text."""
    file = io.StringIO()
    show_tables(reports, OneLineConsole(file=file), whole)
    return file.getvalue().rstrip("\n")


def show_tables(reports: Sequence[ArtifactReport], console: Console, whole: bool) -> None:
    """Tables of each artifact, or one line for each."""
    from executorch_moe.export.report.inspection import methods_table, one_line, sizes_table

    for report in reports:
        if whole:
            console.print(methods_table(report), sizes_table(report))
        else:
            console.print(one_line(report), soft_wrap=True, markup=False, highlight=False)


def check_inside(report: ArtifactReport, target: str | None) -> None:
    """Check the CUDA delegates of an artifact, and that its code is for `target`.

    Raises:
        ValueError: see `check_cuda_artifact` and `check_archs`.
    """
    from executorch_moe.backends.artifact.inspect import check_cuda_artifact
    from executorch_moe.backends.artifact.weight_metadata import CUDA_BACKEND
    from executorch_moe.export.report.inspection import check_archs

    if any(d.backend == CUDA_BACKEND for method in report.methods.values() for d in method.delegates):
        check_cuda_artifact(report)
    if target is not None:
        check_archs(report, target)


def verify_files(artifact: Path) -> None:
    """Compares the files of an artifact with the digests of its export, and prints what was compared."""
    from executorch_moe.backends.artifact.files import check, no_digests
    from executorch_moe.backends.artifact.pte import PteFile

    check_pte(artifact)
    files = check(artifact, verify_bytes=True)
    if note := no_digests(PteFile(files.pte)):
        show_note(note)
        if files.ptd.exists():
            typer.echo(f"{files.ptd} fits {files.pte}")
        else:
            typer.echo(f"{files.pte} has no .ptd and no digests: nothing was compared")
    else:
        typer.echo(f"{files.pte} and {files.ptd} are whole: all bytes are those that were exported")
