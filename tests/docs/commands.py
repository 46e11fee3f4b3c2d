"""Command lines of the pages against the real parser of `executorch-moe`."""

from __future__ import annotations

import shlex
from typing import Any

import click
import typer

from executorch_moe.export.cli.app import app

PROGRAM = "executorch-moe"


def root() -> click.Group:
    """The command with its subcommands."""
    command: Any = typer.main.get_command(app)
    return command  # type: ignore[no-any-return]


def find_command(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that the words after the program's name call, and its arguments.

    Raises:
        ValueError: no such command.
    """
    command: Any = root()
    words = list(words)
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        if words[0] not in command.commands:
            raise ValueError(f"no command {words[0]!r}: there are {', '.join(sorted(command.commands))}")
        command = command.commands[words.pop(0)]
    return command, words


def options_of(command: click.Command) -> set[str]:
    """All spellings of a command's options."""
    spellings = {"--help", "-h"} | {s for p in command.params for s in (*p.opts, *p.secondary_opts)}
    return {spelling for spelling in spellings if spelling.startswith("-")}


def all_options() -> set[str]:
    """All spellings of the options of all commands."""
    found, todo = {"--version", "--install-completion", "--show-completion"}, [root()]
    while todo:
        command: Any = todo.pop()
        found |= options_of(command)
        todo += getattr(command, "commands", {}).values()
    return found


def check_line(line: str) -> None:
    """Parse a whole command line, without running it.

    Raises:
        ValueError: an unknown command or option, a missing argument, or a value of another type.
    """
    words = shlex.split(line)
    top = root()
    while len(words) > 1 and words[1] in options_of(top):
        words.pop(1)
    if len(words) == 1:
        return
    command, arguments = find_command(words[1:])
    try:
        command.make_context(PROGRAM, list(arguments))
    except Exception as error:  # typer has its own copy of click's classes
        if hasattr(error, "format_message"):
            raise ValueError(f"{line}: {error.format_message()}") from error
        raise


def check_mention(text: str) -> None:
    """Check commands and options of a command line that is mentioned in a sentence, which may lack arguments.

    Raises:
        ValueError: an unknown command or option.
    """
    words = [word for word in text.replace("[", " ").replace("]", " ").split() if word not in ("...", "|")][1:]
    while words and words[0].startswith("-"):
        words.pop(0)
    if words and words[0].isupper():
        return
    command, arguments = find_command(words)
    for word in arguments:
        if word.startswith("-") and word.split("=")[0] not in options_of(command):
            raise ValueError(f"{text!r}: {command.name} has no option {word}")
