"""ExecuTorch's server with many requests at once: what its `SessionRuntime` does, for `batch_worker`.

`SessionRuntime` hands its worker one request after the other. `ServingChat` itself has no such limit, so this class
takes the place of the runtime: it numbers the requests, sends them all, and sorts the answers.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import subprocess
import threading
from collections.abc import AsyncIterator, Sequence
from contextvars import ContextVar
from typing import Any

from executorch.examples.llm_server.python.session_runtime import GenerationOptions, GenStats, PromptInput
from executorch.examples.llm_server.python.worker_client import WorkerError

logger = logging.getLogger(__name__)

ENDED = "the worker has ended"
_FIELDS = {
    "prompt_tokens", "completion_tokens", "finish_reason", "reused_prompt_tokens", "prefilled_prompt_tokens",
    "session_reset_reason", "prefill_ms", "decode_ms", "total_ms", "prefill_tok_s", "decode_tok_s",
    "generated_token_ids", "cancelled",
}  # fmt: skip

# `ServingChat` calls `stop` in the task that reads the stream, without saying which request it means.
_current: ContextVar[int | None] = ContextVar("request", default=None)


class _Process:
    """A worker process and the requests that wait for its answers."""

    def __init__(self, command: Sequence[str]) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        try:
            self.greeting = json.loads(line)
        except ValueError:
            self.greeting = {}
        if not self.greeting.get("ready"):
            self.end()
            raise WorkerError(f"the worker said {line.strip()!r} instead of being ready")
        self._lock = threading.Lock()
        self._requests: dict[int, tuple[asyncio.AbstractEventLoop, asyncio.Queue[dict[str, Any]]]] = {}
        self._ended = False
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def runs(self) -> bool:
        return not self._ended and self.process.poll() is None

    def send(self, message: dict[str, Any]) -> None:
        """Sends a line.

        Raises:
            WorkerError: the process has ended.
        """
        try:
            with self._lock:
                assert self.process.stdin is not None
                self.process.stdin.write(json.dumps(message) + "\n")
                self.process.stdin.flush()
        except (OSError, ValueError):
            raise WorkerError(ENDED) from None

    def expect(self, number: int) -> asyncio.Queue[dict[str, Any]]:
        """A queue that will have the answers to a request."""
        answers: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        with self._lock:
            if self._ended:
                raise WorkerError(ENDED)
            self._requests[number] = (asyncio.get_running_loop(), answers)
        return answers

    def forget(self, number: int) -> None:
        """Further answers to a request are dropped."""
        with self._lock:
            self._requests.pop(number, None)

    def end(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            try:
                message = json.loads(line)
            except ValueError:  # the last line of a process that was ended
                logger.warning("the worker said %r", line.strip())
                continue
            with self._lock:
                found = self._requests.get(message.get("id"))
            if found is not None:
                self._put(*found, message)
        with self._lock:
            self._ended = True
            waiting = list(self._requests.values())
        for loop, answers in waiting:
            self._put(loop, answers, {"error": ENDED})

    @staticmethod
    def _put(loop: asyncio.AbstractEventLoop, answers: asyncio.Queue[dict[str, Any]], message: dict[str, Any]) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(answers.put_nowait, message)


class BatchRuntime:
    """Has the methods of ExecuTorch's `SessionRuntime`, for any number of requests at once, and outlives its process.

    The requests that run when the process ends fail. The next one starts a new process, whose sessions have no state.

    Args:
        command: starts a `batch_worker`.

    Raises:
        WorkerError: the process does not start.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._command = list(command)
        self._process = _Process(self._command)
        self._numbers = itertools.count(1)
        self._starting = threading.Lock()
        self._closed = False

    @property
    def healthy(self) -> bool:
        """True until the worker is closed: a process that has ended is replaced."""
        return not self._closed

    async def open(self, session_id: str) -> None:
        """Admits a named session."""
        await self._operate("open", session_id)

    async def reset(self, session_id: str) -> None:
        """Forgets what a session's slot holds."""
        await self._operate("reset", session_id)

    async def close(self, session_id: str) -> None:
        """Forgets a session."""
        await self._operate("close", session_id)

    def stop(self) -> bool:
        """Ends the request whose stream the current task reads; False if there is none."""
        number = _current.get()
        if number is None:
            return False
        self._cancel(self._process, number)
        return True

    async def generate_stream(
        self, session_id: str | None, prompt: PromptInput, options: GenerationOptions, stats: GenStats | None = None
    ) -> AsyncIterator[str]:
        """The pieces of an answer; a stream that is left early cancels its request.

        Args:
            session_id: None: no session. prompt: text, or segments of text and token ids.
            options: of sampling. stats: filled at the end.

        Raises:
            WorkerError: the request failed, or its process ended.
        """
        process, number = await asyncio.to_thread(self._running), next(self._numbers)
        answers = process.expect(number)
        request: dict[str, Any] = {"id": number, **vars(options)}
        request |= {"prompt": prompt.text} if prompt.segments is None else {"prompt_segments": prompt.segments}
        if session_id is not None:
            request["session_id"] = session_id
        done = False
        before = _current.get()
        _current.set(number)
        try:
            process.send(request)
            while not done:
                message = await answers.get()
                if "error" in message:
                    done = True
                    raise WorkerError(message["error"], message.get("code"))
                if "token" in message:
                    yield message["token"]
                elif message.get("done"):
                    done = True
                    for name in _FIELDS & message.keys():
                        setattr(stats or GenStats(), name, message[name])
        finally:
            _current.set(before)
            process.forget(number)
            if not done:
                self._cancel(process, number)

    def close_worker(self) -> None:
        """Ends the process for good."""
        self._closed = True
        self._process.end()

    async def _operate(self, operation: str, session_id: str) -> None:
        process, number = await asyncio.to_thread(self._running), next(self._numbers)
        answers = process.expect(number)
        try:
            process.send({"id": number, "op": operation, "session_id": session_id})
            message = await answers.get()
        finally:
            process.forget(number)
        if "error" in message:
            raise WorkerError(message["error"], message.get("code"))

    def _running(self) -> _Process:
        """A process that runs. It may take as long as loading the model."""
        with self._starting:
            if self._closed:
                raise WorkerError("the worker is closed")
            if not self._process.runs:
                logger.warning("the worker has ended: starting it again")
                self._process.end()
                self._process = _Process(self._command)
            return self._process

    @staticmethod
    def _cancel(process: _Process, number: int) -> None:
        try:
            process.send({"id": number, "op": "cancel"})
        except WorkerError:
            logger.debug("request %d ended with its worker", number)
