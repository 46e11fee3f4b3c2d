"""The worker process: runs a program and speaks the JSON lines of ExecuTorch's server on stdin and stdout.

Source of the protocol: `executorch/examples/llm_server/python/worker_client.py`. One request at a time; `generate`
answers with {"token"} lines and a {"done"} line, `open`, `close` and `reset` with one line, and a failure with
{"error"}. The server cancels a request by writing its number, 8 bytes in little-endian order, to a pipe.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from executorch_moe.export.generate.generator import TextGenerator

from .sessions import Sessions
from .turn import RequestError, read_turn, run_turn

CONTROL_FD = "EXECUTORCH_LLM_WORKER_CONTROL_FD"
_FRAME = 8
PREFILL_CHUNK = 512
"""Prompt tokens per call, if not given: between calls the worker sees that a request is canceled."""

logger = logging.getLogger(__name__)


class Cancellations:
    """Numbers of canceled requests, read from a pipe without waiting."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor, self._rest = descriptor, b""
        self._numbers: set[int] = set()
        if descriptor is not None:
            os.set_blocking(descriptor, False)

    def has(self, number: int | None) -> bool:
        """True if a request was canceled; None has no number and cannot be."""
        if self._descriptor is None or number is None:
            return False
        while True:
            try:
                read = os.read(self._descriptor, 4096)
            except BlockingIOError:
                break
            if not read:
                break
            self._rest += read
        whole = len(self._rest) - len(self._rest) % _FRAME
        for start in range(0, whole, _FRAME):
            self._numbers.add(int.from_bytes(self._rest[start : start + _FRAME], "little"))
        self._rest = self._rest[whole:]
        # Numbers only grow: earlier requests are over.
        self._numbers = {canceled for canceled in self._numbers if canceled >= number}
        return number in self._numbers


class Worker:
    """Answers requests one after the other.

    Args:
        sessions: of `TextGenerator` objects.
        output: where answers are written, one JSON object a line.
        cancellations: of the server.
    """

    def __init__(self, sessions: Sessions, output: IO[str], cancellations: Cancellations) -> None:
        self._sessions, self._output, self._cancellations = sessions, output, cancellations

    def greet(self) -> None:
        """Tells the server that requests can come."""
        self._write(ready=True, max_named_sessions=self._sessions.names, supports_cancel=True)

    def answer(self, line: str) -> None:
        """Answers one line; an error of a request is an answer too."""
        try:
            request = json.loads(line)
            if not isinstance(request, dict):
                raise RequestError("a request must be a JSON object")
            operation = request.get("op")
            if operation is None:
                self._generate(request)
            else:
                self._operate(operation, request.get("session_id"))
        except RequestError as error:
            self._write(error=str(error), **({} if error.code is None else {"code": error.code}))
        except Exception as error:  # whatever fails in a runtime is this request's failure
            logger.exception("a request failed")
            self._write(error=f"{type(error).__name__}: {error}")

    def _operate(self, operation: object, name: object) -> None:
        if not isinstance(name, str) or not name:
            raise RequestError("session_id must be text")
        if self._sessions.names == 0:
            raise RequestError("this worker has no named sessions", "unsupported_session")
        if operation == "open":
            if closed := self._sessions.open(name):
                logger.info("session %s was closed to make room for %s", closed, name)
            self._write(opened=True, session_id=name)
        elif operation == "close":
            self._sessions.close(name)
            self._write(closed=True, session_id=name)
        elif operation == "reset":
            self._sessions.reset(name)
            self._write(reset=True, session_id=name)
        else:
            raise RequestError(f"op={operation!r} is unknown: use open, close or reset")

    def _generate(self, request: dict[str, Any]) -> None:
        name, number = request.get("session_id") or None, request.get("cancel_request_id")
        if name is not None and self._sessions.names == 0:
            raise RequestError("this worker has no named sessions", "unsupported_session")
        # Before a state is taken from another session.
        turn = read_turn(request, self._sessions.first.generator)  # type: ignore[arg-type]
        state, lost = self._sessions.lend(name)
        generator = state.generator
        assert isinstance(generator, TextGenerator)
        done = run_turn(
            state, generator, turn, lambda text: self._write(token=text), lambda: self._cancellations.has(number)
        )
        if lost:
            logger.info("session %s had lost its state to another; its prompt was computed again", name)
            done["session_reset_reason"] = "evicted"
        self._write(done=True, **done)

    def _write(self, **message: Any) -> None:
        self._output.write(json.dumps(message) + "\n")
        self._output.flush()


def main() -> None:
    """Entry point of the process; ends when stdin is closed."""
    options = read_arguments()
    logging.basicConfig(level=logging.INFO, format="worker: %(message)s")
    serve_lines(lambda: load_from(options), options.sessions, options.states)


def load_from(options: argparse.Namespace) -> TextGenerator:
    """Loads the program that the arguments of the process name."""
    chunk, verify = options.prefill_chunk, not options.no_verify
    generator = TextGenerator.load(
        options.model_path, options.runtime, cuda_graph=options.cuda_graph, prefill_chunk=chunk, verify=verify
    )
    if chunk is None:
        generator.prefill_chunk = min(PREFILL_CHUNK, generator.max_context)
    return generator


def serve_lines(load: Callable[[], TextGenerator], names: int, states: int) -> None:
    """Answers the lines of stdin on stdout; what others write to stdout goes to stderr from here on.

    Args:
        load, names, states: see `Sessions`.

    Raises:
        ValueError: see `Sessions`.
    """
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sessions = Sessions(load, names, states)
    first = sessions.first.generator
    assert isinstance(first, TextGenerator)
    logger.info("runtime: %s", first.program.runtime)
    first.warm_up(1)
    given = os.environ.get(CONTROL_FD)
    worker = Worker(sessions, output, Cancellations(None if given is None else int(given)))
    worker.greet()
    for line in sys.stdin:
        if line.strip():
            worker.answer(line)


def read_arguments() -> argparse.Namespace:
    """Arguments of the process."""
    parser = argparse.ArgumentParser(description="Runs a program for ExecuTorch's OpenAI-compatible server.")
    parser.add_argument("--model_path", type=Path, required=True)
    parser.add_argument("--tokenizer_path", help="ignored: it is the .tokenizer.json beside the program")
    parser.add_argument("--runtime", default="auto")
    parser.add_argument("--sessions", type=int, default=16)
    parser.add_argument("--states", type=int, default=1)
    parser.add_argument("--cuda-graph", action="store_true")
    parser.add_argument("--prefill-chunk", type=int)
    parser.add_argument("--no-verify", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
