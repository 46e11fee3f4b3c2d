"""Turns errors of other packages into one line that names the file and the remedy."""

from __future__ import annotations

import contextlib
import dis
from collections.abc import Iterator
from types import TracebackType

_PACKAGE = "executorch_moe."


def raised_here(error: BaseException, main: str = "") -> bool:
    """True for an error raised in this package's own code, or in native code that it called directly.

    Args:
        main: `__name__` of a module of this package that runs as a program; empty for none.
    """
    last = _last_entry(error)
    module = str(last.tb_frame.f_globals.get("__name__", "")) if last is not None else ""
    return module.startswith(_PACKAGE) or (module == main != "")


def said_here(error: BaseException) -> bool:
    """True for an error of a `raise` statement in this package. Its message is written for the user."""
    last = _last_entry(error)
    if last is None or not raised_here(error):
        return False
    # Native code has no frame: the last instruction tells a call of native code from a `raise` statement.
    return dis.opname[last.tb_frame.f_code.co_code[last.tb_lasti]] == "RAISE_VARARGS"


def _last_entry(error: BaseException) -> TracebackType | None:
    entry = error.__traceback__
    while entry is not None and entry.tb_next is not None:
        entry = entry.tb_next
    return entry


def reason(error: BaseException) -> str:
    """First line of an error's message, or the name of its class if the message is empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[0] if isinstance(error, (RuntimeError, ValueError)) else f"{type(error).__name__}: {lines[0]}"


@contextlib.contextmanager
def said_in_one_line(
    what: str, remedy: str, raises: type[Exception] = RuntimeError, keep: tuple[type[Exception], ...] = (OSError,)
) -> Iterator[None]:
    """Context in which an error of another package becomes `raises` with one line: `what` (reason): `remedy`.

    Errors of this package's own `raise` statements and errors of the types `keep` pass unchanged.
    """
    try:
        yield
    except keep:
        raise
    except Exception as error:
        if said_here(error):
            raise
        raise raises(f"{what} ({reason(error)}): {remedy}") from error
