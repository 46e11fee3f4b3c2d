"""A worker that is started again when its process has ended."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable
from typing import Any

from executorch.examples.llm_server.python.worker_client import WorkerClient, WorkerError

logger = logging.getLogger(__name__)

KILL_AFTER = 30.0
"""Seconds that a canceled request may take to stop before its process is ended."""


class RestartedWorker:
    """Has the methods of ExecuTorch's `WorkerClient`, and outlives its process.

    A request that is running when the process ends fails. The next one starts a new process, whose sessions have no
    state; their next prompts are computed from the start.

    Args:
        spawn: starts a process and returns its client.
        kill_after: see `KILL_AFTER`.

    Raises:
        WorkerError: the first process does not start.
    """

    supports_cancel = True

    def __init__(self, spawn: Callable[[], WorkerClient], kill_after: float = KILL_AFTER) -> None:
        self._spawn, self._kill_after = spawn, kill_after
        self._client = spawn()
        self.max_named_sessions = self._client.max_named_sessions
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._active: int | None = None
        self._stopped = self._closed = False

    @property
    def healthy(self) -> bool:
        """True until `close`: a process that has ended is replaced."""
        return not self._closed

    def reserve_request(self) -> int:
        """The number of the next request; does not wait.

        Raises:
            WorkerError: the worker is closed.
        """
        if self._closed:
            raise WorkerError("the worker is closed")
        with self._lock:
            self._active, self._stopped = next(self._numbers), False
            return self._active

    def release_request(self, request_id: int) -> bool:
        """Gives a number back that was not used."""
        with self._lock:
            if self._active != request_id:
                return False
            self._active = None
            return True

    def generate(
        self,
        prompt: str,
        config: Any,
        token_callback: Callable[[str], None] | None = None,
        stats_callback: Callable[[Any], None] | None = None,
        request_id: int | None = None,
    ) -> None:
        """Runs one request; see `WorkerClient.generate`.

        Raises:
            WorkerError: it failed, or its process ended or cannot be started.
        """
        if request_id is None:
            request_id = self.reserve_request()
        try:
            client = self._running()
            inner = client.reserve_request()
            with self._lock:
                stopped = self._stopped
            if stopped:  # before there was a process to tell
                client.stop()
            client.generate(prompt, config, token_callback, stats_callback, inner)
        finally:
            with self._lock:
                if self._active == request_id:
                    self._active = None

    def stop(self) -> bool:
        """Asks the running request to stop at the next token; its process is ended if it does not.

        Returns True if there is a request to stop.
        """
        with self._lock:
            number, client = self._active, self._client
            if number is None:
                return False
            self._stopped = True
        client.stop()
        timer = threading.Timer(self._kill_after, self._end_if_active, (number, client))
        timer.daemon = True
        timer.start()
        return True

    def open_session(self, session_id: str) -> None:
        """See `WorkerClient.open_session`."""
        self._running().open_session(session_id)

    def close_session(self, session_id: str) -> None:
        """See `WorkerClient.close_session`."""
        self._running().close_session(session_id)

    def reset_session(self, session_id: str) -> None:
        """See `WorkerClient.reset_session`."""
        self._running().reset_session(session_id)

    def abort(self) -> None:
        """Ends the process; the next request starts another one."""
        self._client.abort()

    def close(self) -> None:
        """Ends the process for good."""
        self._closed = True
        self._client.close()

    def _running(self) -> WorkerClient:
        """The client of a process that runs. Called by one thread at a time."""
        if not self._client.healthy and not self._closed:
            logger.warning("the worker has ended: starting it again")
            self._client.abort()
            started = self._spawn()
            if self._closed:
                started.close()
            self._client = started
        return self._client

    def _end_if_active(self, number: int, client: WorkerClient) -> None:
        with self._lock:
            if self._active != number or self._client is not client:
                return
        logger.warning("a canceled request did not stop for %.0f s: ending its worker", self._kill_after)
        client.abort()
