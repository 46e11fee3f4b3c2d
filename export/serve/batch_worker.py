"""The worker process for artifacts of `export --max-batch`: requests run at once, and join and leave between steps.

The lines are those of ExecuTorch's protocol (`worker`), each with the number of its request, `id`. {"op": "cancel"}
ends the request of that number at the next step. Weights exist once. A session's state is a slot of the KV cache.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from executorch_moe.export.generate.batch import BatchGenerator, Sequence
from executorch_moe.export.generate.generator import TextGenerator
from executorch_moe.export.generate.stop_text import StopText
from executorch_moe.export.generate.text_stream import TextStream

from .sessions import Sessions, State
from .turn import RequestError, Turn, counts, read_turn
from .worker import load_from, read_arguments

logger = logging.getLogger(__name__)

Write = Callable[[dict[str, Any]], None]


@dataclass(eq=False)
class Request:
    """A `generate` request that waits or runs.

    Attributes:
        number: its `id`. session: its name, or None. turn: what is asked.
        sequence: its text in the generator, once it runs; state: its slot. cached, reason: see `State.reusable`.
        lost: the session's state had gone to another. answer: new tokens. ended_by_eos: the text ended by itself.
    """

    number: int
    session: str | None
    turn: Turn
    text: StopText
    started: float = field(default_factory=time.perf_counter)
    first_token: float | None = None
    sequence: Sequence | None = None
    state: State | None = None
    cached: int = 0
    reason: str = "new"
    lost: bool = False
    answer: list[int] = field(default_factory=list)
    ended_by_eos: bool = False


class BatchWorker:
    """Runs the requests of many clients at once.

    Args:
        generator: an artifact of `export --max-batch`.
        names: most named sessions.
        write: sends an answer.

    Raises:
        ValueError: see `BatchGenerator` and `Sessions`.
    """

    def __init__(self, generator: TextGenerator, names: int, write: Write) -> None:
        self._generator, self._write = generator, write
        self._batch = BatchGenerator(generator, slots_given=True)
        self._sessions = Sessions(lambda: generator, names, generator.max_batch)
        self._waiting: list[Request] = []
        self._running: list[Request] = []

    @property
    def busy(self) -> bool:
        """True while a request waits or runs."""
        return bool(self._waiting or self._running)

    def greet(self) -> None:
        """Tells the server that requests can come."""
        self._write({"ready": True, "max_named_sessions": self._sessions.names, "supports_cancel": True})

    def take(self, line: str) -> None:
        """Takes a line; an error of a request is an answer too."""
        number = None
        try:
            message = json.loads(line)
            number = message.get("id") if isinstance(message, dict) else None
            if not isinstance(number, int):
                raise RequestError("a request must be a JSON object with a number, id")
            if (operation := message.get("op")) is None:
                self._queue(number, message)
            elif operation == "cancel":
                self._cancel(number)
            else:
                self._operate(number, operation, message.get("session_id"))
        except RequestError as error:
            code = {} if error.code is None else {"code": error.code}
            self._write({"id": number, "error": str(error), **code})
        except Exception as error:
            logger.exception("a request failed")
            self._write({"id": number, "error": f"{type(error).__name__}: {error}"})

    def step(self) -> None:
        """Starts the requests for which there is a slot, and computes one token of all that run.

        If the runtime fails, all that run fail.
        """
        try:
            for request in list(self._waiting):
                if self._sessions.can_lend(request.session):
                    self._start(request)
            self._batch.step()
        except Exception as error:
            logger.exception("a step failed")
            for request in self._running:
                if request.sequence is not None:
                    self._batch.cancel(request.sequence)
                self._release(request, [])
                self._write({"id": request.number, "error": f"{type(error).__name__}: {error}"})
            self._running.clear()
        for request in [request for request in self._running if self._sequence(request).stopped_by]:
            self._finish(request)

    def _queue(self, number: int, message: dict[str, Any]) -> None:
        name = message.get("session_id") or None
        if name is not None and self._sessions.names == 0:
            raise RequestError("this worker has no named sessions", "unsupported_session")
        turn = read_turn(message, self._generator)
        stream = TextStream(self._generator.tokenizer, show_special=turn.show_special)
        self._waiting.append(Request(number, name, turn, StopText(stream, turn.stop)))

    def _start(self, request: Request) -> None:
        self._waiting.remove(request)
        request.state, request.lost = self._sessions.lend(request.session)
        request.cached, request.reason = request.state.reusable(request.turn.prompt_ids)
        request.state.busy, request.state.resident = True, []  # an error leaves nothing to resume
        self._running.append(request)
        request.sequence = self._batch.add(
            request.turn.prompt_ids, request.turn.limit, request.turn.sampler, lambda token: self._hear(request, token),
            slot=request.state.number, cached=request.cached,
        )  # fmt: skip

    def _hear(self, request: Request, token: int) -> bool:
        """Sends the text of a new token; True if the answer ends with it."""
        if request.first_token is None:
            request.first_token = time.perf_counter()
        if token in self._generator.eos_ids:
            request.ended_by_eos = True
            return True
        request.answer.append(token)
        if piece := request.text.push(token):
            self._write({"id": request.number, "token": piece})
        return request.text.stopped

    def _finish(self, request: Request) -> None:
        self._running.remove(request)
        sequence = self._sequence(request)
        self._release(request, sequence.resident)
        if piece := request.text.end():
            self._write({"id": request.number, "token": piece})
        end = time.perf_counter()
        times = request.started, request.first_token or end, end
        canceled = sequence.stopped_by == "canceled"
        done = counts(request.turn, request.answer, request.cached, request.reason, times)
        if request.lost:
            logger.info("session %s had lost its slot to another; its prompt was computed again", request.session)
            done["session_reset_reason"] = "evicted"
        if not (request.text.stopped or canceled):
            done["generated_token_ids"] = request.answer
        stopped = request.ended_by_eos or request.text.stopped
        reason = "stop" if stopped else "length"
        self._write({"id": request.number, "done": True, "finish_reason": reason, "cancelled": canceled, **done})

    def _release(self, request: Request, resident: list[int]) -> None:
        state = request.state
        assert state is not None
        state.busy = False
        # The session may have been closed or reset meanwhile.
        state.resident = resident if state.owner == request.session else []

    def _cancel(self, number: int) -> None:
        for request in list(self._waiting):
            if request.number == number:
                self._waiting.remove(request)
                times = 3 * (request.started,)
                done = counts(request.turn, [], 0, "new", times)
                self._write({"id": number, "done": True, "finish_reason": "length", "cancelled": True, **done})
        for request in list(self._running):
            if request.number == number:
                self._batch.cancel(self._sequence(request))
                self._finish(request)

    def _operate(self, number: int, operation: object, name: object) -> None:
        if not isinstance(name, str) or not name:
            raise RequestError("session_id must be text")
        if self._sessions.names == 0:
            raise RequestError("this worker has no named sessions", "unsupported_session")
        answers = {"open": "opened", "close": "closed", "reset": "reset"}
        if operation not in answers:
            raise RequestError(f"op={operation!r} is unknown: use open, close, reset or cancel")
        if operation == "open":
            if closed := self._sessions.open(name):
                logger.info("session %s was closed to make room for %s", closed, name)
        elif operation == "close":
            self._sessions.close(name)
        else:
            self._sessions.reset(name)
        self._write({"id": number, answers[str(operation)]: True, "session_id": name})

    @staticmethod
    def _sequence(request: Request) -> Sequence:
        assert request.sequence is not None
        return request.sequence


def serve_batch(load: Callable[[], TextGenerator], names: int) -> None:
    """Answers the lines of stdin on stdout until stdin is closed; see `worker.serve_lines`.

    Raises:
        ValueError: see `BatchWorker`.
    """
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def write(message: dict[str, Any]) -> None:
        output.write(json.dumps(message) + "\n")
        output.flush()

    generator = load()
    logger.info("runtime: %s, %d sequences at once", generator.program.runtime, generator.max_batch)
    worker = BatchWorker(generator, names, write)
    worker.greet()
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        while not worker.busy or not lines.empty():
            line = lines.get()
            if line is None:
                return
            if line.strip():
                worker.take(line)
        worker.step()


def main() -> None:
    """Entry point of the process."""
    options = read_arguments()
    logging.basicConfig(level=logging.INFO, format="worker: %(message)s")
    serve_batch(lambda: load_from(options), options.sessions)


if __name__ == "__main__":
    main()
