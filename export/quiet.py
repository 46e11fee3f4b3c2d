"""Keeps other packages' notes off the terminal, unless they are asked for."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator

from rich.console import Console

# torchao logs each of its compiled extensions that this torch cannot load, torch each deprecated registration: neither
# is about anything that is used here.
NOISY = ("torchao", "torch.utils._pytree", "torch.export", "torch._inductor", "torch._dynamo", "executorch", "root")


def quiet() -> None:
    """Errors only, from the noisy loggers and from `warnings`."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    os.environ.setdefault("TORCH_LOGS", "-all")
    for name in NOISY:
        logging.getLogger(None if name == "root" else name).setLevel(logging.ERROR)


@contextlib.contextmanager
def hold_native_notes() -> Iterator[Console]:
    """Keeps what C++ code writes to stderr (ExecuTorch probes the CPU aloud) and shows it only after an error.

    Yields a console that goes on writing to the terminal.
    """
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as notes, open(terminal, "w") as file:
        os.dup2(notes.fileno(), 2)
        try:
            yield Console(file=file)
        except BaseException:
            notes.seek(0)
            lines = notes.read().decode(errors="replace").splitlines(keepends=True)
            file.writelines(line for line in lines if "cpuinfo" not in line)
            raise
        finally:
            file.flush()
            os.dup2(terminal, 2)
