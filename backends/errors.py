"""Errors of other packages as one line that names the file and what to do."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator

_PACKAGE = "executorch_moe."


def raised_here(error: BaseException, main: str = "") -> bool:
    """True for an error that this package raised itself: its message is meant for the user.

    Args:
        main: name of a module of this package that runs as a program.
    """
    frames = list(traceback.walk_tb(error.__traceback__))
    module = str(frames[-1][0].f_globals.get("__name__", "")) if frames else ""
    return module.startswith(_PACKAGE) or (module == main != "")


def reason(error: BaseException) -> str:
    """First line of an error's message, or the name of its class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[0] if isinstance(error, (RuntimeError, ValueError)) else f"{type(error).__name__}: {lines[0]}"


@contextlib.contextmanager
def said_in_one_line(
    what: str, remedy: str, raises: type[Exception] = RuntimeError, keep: tuple[type[Exception], ...] = (OSError,)
) -> Iterator[None]:
    """Within it, whatever another package raises becomes `raises` with one line: `what` (reason): `remedy`.

    Errors that this package raised itself, and those of the types `keep`, pass unchanged.
    """
    try:
        yield
    except keep:
        raise
    except Exception as error:
        if raised_here(error):
            raise
        raise raises(f"{what} ({reason(error)}): {remedy}") from error
