"""Keeps warnings and notes of other packages off the terminal."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator

from rich.console import Console

from .progress import OneLineConsole

# torchao logs each compiled extension that this torch cannot load, and torch each deprecated registration. Neither
# concerns anything that this package uses.
NOISY = ("torchao", "torch.utils._pytree", "torch.export", "torch._inductor", "torch._dynamo", "executorch", "root")


def quiet() -> None:
    """Limits the noisy loggers to errors and turns off `warnings`."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    os.environ.setdefault("TORCH_LOGS", "-all")
    for name in NOISY:
        logging.getLogger(None if name == "root" else name).setLevel(logging.ERROR)


@contextlib.contextmanager
def hold_native_notes() -> Iterator[Console]:
    """Holds back what C++ code writes to stderr, such as ExecuTorch's notes about the CPU, unless an error follows.

    Yields a console that writes to the terminal.
    """
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as notes, open(terminal, "w") as file:
        os.dup2(notes.fileno(), 2)
        try:
            yield OneLineConsole(file=file)
        except BaseException:
            notes.seek(0)
            lines = notes.read().decode(errors="replace").splitlines(keepends=True)
            file.writelines(line for line in lines if "cpuinfo" not in line)
            raise
        finally:
            file.flush()
            os.dup2(terminal, 2)
