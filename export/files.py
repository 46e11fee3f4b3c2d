"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from executorch_moe.backends.atomic_files import written_together


def check_writable(what: str, path: Path, suffixes: Sequence[str] = ()) -> None:
    """Check that a file can be written, before minutes are spent; its folder need not be there.

    Args:
        what: the option that names it. suffixes: how its name must end, in one of these ways.

    Raises:
        ValueError: another ending, a folder, or a place without a writable folder.
    """
    if suffixes and path.suffix not in suffixes:
        example = f": give for example {path.with_suffix(suffixes[0])}" if path.name else ": give a file name"
        raise ValueError(f"{what}={str(path)!r} must end in {' or '.join(suffixes)}{example}")
    if path.is_dir():
        raise ValueError(f"{what}={str(path)!r} is a folder: give a file name")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise ValueError(f"{what}={str(path)!r} cannot be written, {folder} is no writable folder: choose another")


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Errors of the system within it name a file; of themselves, those of writing (a full disk) name none."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yields a path beside `path`, with its ending: renamed to `path` at the end, removed after an error.

    See `written_together`: it is this for several files.
    """
    with named(path), written_together(path) as aside:
        yield aside[path]


def write_aside(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")
