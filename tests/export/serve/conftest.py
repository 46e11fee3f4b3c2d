"""Servers in a thread of the test process, with a worker process each."""

from __future__ import annotations

import contextlib
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from executorch_moe.export.serve.guard import Limits

from .scripted import CONSTANTS, TEMPLATE

HERE = Path(__file__).parent


@contextlib.contextmanager
def running(app: Any) -> Iterator[str]:
    """Serves an ASGI application; gives the address of its API."""
    import uvicorn

    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join(60)


@pytest.fixture(scope="session")
def scripted_pte(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with the constants of a language model, for `scripted.py`."""
    from executorch_moe.backends.artifact import save
    from executorch_moe.backends.lower import lower
    from executorch_moe.export.models.pretrained import resolve

    pte = tmp_path_factory.mktemp("scripted") / "script.pte"
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
    save(lower({"forward": program}, "cpu", {**CONSTANTS, "get_chat_template": TEMPLATE}), pte)
    shutil.copy(resolve("tiny") / "tokenizer.json", pte.with_suffix(".tokenizer.json"))
    return pte


@contextlib.contextmanager
def scripted_server(
    pte: Path, seconds: float = 0.0, sessions: int = 4, states: int = 2, limits: Limits = Limits()
) -> Iterator[str]:
    """A server with a scripted worker; gives the address of its API.

    Args:
        seconds: of each call of the program.
    """
    from executorch_moe.export.serve.app import ServeOptions, serving

    command = [sys.executable, str(HERE / "scripted.py"), str(seconds), str(sessions), str(states)]
    with serving(ServeOptions(pte, "script", limits=limits), command) as app, running(app) as address:
        yield address
