"""The application `executorch-moe`: settings, error handling, and options that several commands share.

Heavy packages are imported inside the commands, so that --help is quick.
"""

from __future__ import annotations

import functools
import inspect
import select
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup

from executorch_moe.backends.versions import check_versions
from executorch_moe.export.progress import OneLineConsole

from .names import with_option_names

# Generated text and results go to stdout, so that they can be piped; everything else goes to stderr.
console = OneLineConsole(stderr=True)
debug = False

Function = TypeVar("Function", bound=Callable[..., Any])


class _Command(TyperCommand):
    """A command whose help shows no type for flags, which take no value."""

    def get_params(self, ctx: Any) -> Any:
        """Arguments and options."""
        return _without_flag_types(super().get_params(ctx))


class _Group(TyperGroup):
    """The same for a group of commands."""

    def get_params(self, ctx: Any) -> Any:
        """Options."""
        return _without_flag_types(super().get_params(ctx))


def _without_flag_types(params: list[Any]) -> list[Any]:
    for param in params:
        if getattr(param, "is_flag", False):
            param.metavar = ""
    return params


def group(help_text: str, **settings: Any) -> typer.Typer:
    """A group of commands."""
    return typer.Typer(help=help_text, cls=_Group, no_args_is_help=True, rich_markup_mode="rich", **settings)


app = group(
    "Export Mixture-of-Experts language models to ExecuTorch with fused experts, and run them.",
    name="executorch-moe",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def command(parent: typer.Typer, name: str, **settings: Any) -> Callable[[Function], Function]:
    """Decorator: makes a function a command of `parent`, with `one_line_errors`; its docstring is the help."""

    def register(function: Function) -> Function:
        paragraphs = inspect.cleandoc(function.__doc__ or "").split("\n\n")
        text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)  # the terminal breaks lines
        return parent.command(name, cls=_Command, help=text, **settings)(one_line_errors(function))

    return register


def _show_versions(wanted: bool) -> None:
    if not wanted:
        return
    for name in ("executorch-moe", "torch", "executorch", "triton", "transformers"):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            version = "not installed"
        typer.echo(f"{name} {version}")
    raise typer.Exit


@app.callback()
def settings(
    show_traceback: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show versions and exit.", callback=_show_versions, is_eager=True)
    ] = False,
) -> None:
    """Options of all commands."""
    global debug
    debug = show_traceback


def is_debug() -> bool:
    """True if errors keep their traceback."""
    return debug


def is_users(error: Exception) -> bool:
    """True for an error that this package raised for its input, or that the system raised for a file."""
    from executorch_moe.backends.errors import raised_here

    if isinstance(error, OSError):
        return True
    if not isinstance(error, (ValueError, NotImplementedError, ModuleNotFoundError, RuntimeError)):
        return False
    return raised_here(error)


def lost_reader(error: Exception) -> bool:
    """True if the reader of stdout (`| head`) has closed it: typer then ends the program silently with status 1."""
    if not isinstance(error, BrokenPipeError) or not hasattr(select, "poll"):
        return False
    poll = select.poll()
    poll.register(1, 0)  # errors are always reported
    return any(event & select.POLLERR for _, event in poll.poll(0))


def one_line_errors(function: Function) -> Function:
    """Turns a user's mistake into one line and exit status 2; an error of the program itself keeps its traceback."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            if function.__name__ != "doctor":  # it shows all versions
                check_versions()
            return function(*args, **kwargs)
        except typer.Exit:  # also a RuntimeError
            raise
        except Exception as error:
            if debug or not is_users(error) or lost_reader(error):
                raise
            show_error(error, kwargs)
            raise typer.Exit(2) from None

    return wrapped  # type: ignore[return-value]


def show_error(error: Exception, given: dict[str, Any]) -> None:
    """Prints an error in one line, with the names of options instead of Python's.

    Args:
        given: the command's arguments and options.
    """
    if isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.filename} cannot be read or written: {error.strerror}"
    else:
        text = with_option_names(str(error), typer.main.get_command(app), given)
    console.print(f"[bold red]error:[/bold red] {escape(text)}", soft_wrap=True, highlight=False)


def show_note(note: str) -> None:
    """Prints a note in one line; nothing if it is empty."""
    if note:
        console.print(f"[yellow]note:[/yellow] {escape(note)}", soft_wrap=True, highlight=False)


def warn_deprecated(old: str, new: str) -> None:
    """Prints that an option has another name."""
    console.print(
        f"[yellow]warning:[/yellow] {escape(old)} is deprecated: use {escape(new)}", soft_wrap=True, highlight=False
    )


def quiet_unless(verbose: bool) -> None:
    """Keeps warnings and notes of other packages off the terminal."""
    if not verbose:
        from executorch_moe.export.quiet import quiet

        quiet()


def check_format(given: str, known: Sequence[str]) -> None:
    """Check the value of --format.

    Raises:
        ValueError: an unknown one.
    """
    if given not in known:
        raise ValueError(f"format={given!r} is unknown: use one of {', '.join(known)}")


def check_plot(plot: Path | None) -> None:
    """Check the name of a picture before anything is measured.

    Raises:
        ValueError: another ending than .png or .svg, or a place that cannot be written.
    """
    from executorch_moe.export.options import check_output

    if plot is not None:
        check_output("plot", plot, (".png", ".svg"))


def check_result(out: Path | None) -> None:
    """Check the file for a result before anything is measured.

    Raises:
        ValueError: a place that cannot be written.
    """
    from executorch_moe.export.options import check_output

    if out is not None:
        check_output("out", out)


def check_json(json_file: Path) -> None:
    """Check the file for --json before anything is measured.

    Raises:
        ValueError: a place that cannot be written.
    """
    from executorch_moe.export.options import check_output

    check_output("json", json_file)


def show_result(text: str, out: Path | None) -> None:
    """Writes a result to a file, or to stdout if `out` is None."""
    if out is None:
        typer.echo(text)
        return
    from executorch_moe.backends.atomic_files import write_text

    write_text(out, text + "\n")


def check_pte(artifact: Path) -> None:
    """Check that a path is not one of the files beside a .pte.

    Raises:
        ValueError: it is.
    """
    for suffix in (".ptd", ".tokenizer.json", ".export.json"):
        if artifact.name.endswith(suffix):
            pte = artifact.with_name(artifact.name.removesuffix(suffix) + ".pte")
            raise ValueError(f"{artifact} is a file beside the program: give the .pte, {pte}")


def parse_lengths(text: str, what: str) -> list[int]:
    """ "32,128" -> [32, 128].

    Raises:
        ValueError: something that is not a list of positive whole numbers.
    """
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ValueError(f"{what}={text!r} must be positive whole numbers separated by commas: give for example 32,128")
    return numbers


def values(*known: str) -> Callable[[str], list[str]]:
    """Shell completion of an option with known values."""
    return lambda incomplete: [value for value in known if value.startswith(incomplete)]


RUN = "How it runs"
SAMPLING = "Sampling"
RESULT = "Output"
DEBUGGING = "Debugging"

ArtifactArgument = Annotated[Path, typer.Argument(help="The .pte of an export, with .ptd and tokenizer beside it.")]
TemperatureOption = Annotated[
    float, typer.Option(help="0 always takes the most likely token.", rich_help_panel=SAMPLING)
]
TopPOption = Annotated[
    float,
    typer.Option(
        help="Sample from the most likely tokens whose probabilities add up to this.", rich_help_panel=SAMPLING
    ),
]
TopKOption = Annotated[
    int,
    typer.Option(
        help="Sample from this many most likely tokens, 0 from all; for artifacts of --output logits.",
        rich_help_panel=SAMPLING,
    ),
]
RuntimeOption = Annotated[
    str,
    typer.Option(
        help="executorch, delegate-host, or auto: the first of them that can run the artifact here.",
        autocompletion=values("auto", "executorch", "delegate-host"),
        rich_help_panel=RUN,
    ),
]
CudaGraphOption = Annotated[
    bool,
    typer.Option(
        "--cuda-graph/--no-cuda-graph", help="Replay decode as a CUDA graph (delegate host).", rich_help_panel=RUN
    ),
]
VerifyOption = Annotated[
    bool,
    typer.Option(
        "--verify/--no-verify",
        help="Compare all bytes of .pte and .ptd with the digests of the export before anything runs.",
        rich_help_panel=RUN,
    ),
]
PrefillChunkOption = Annotated[
    int | None,
    typer.Option(help="Largest number of prompt tokens per call; by default the whole prompt.", rich_help_panel=RUN),
]
VerboseOption = Annotated[
    bool, typer.Option("--verbose", "-v", help="Show warnings of other packages.", rich_help_panel=DEBUGGING)
]
ResultOption = Annotated[
    Path | None, typer.Option("--out", "-o", help="Write the result to this file.", rich_help_panel=RESULT)
]
PlotOption = Annotated[
    Path | None, typer.Option(help="Also write a plot to this file (.png, .svg).", rich_help_panel=RESULT)
]


def main() -> None:
    """Entry point of the console command."""
    app()
