"""ASGI middleware in front of ExecuTorch's server: API key, limits, well-formed bodies, and clients that go away.

Errors have the form of OpenAI's API: {"error": {"message", "type", "code"}}.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

CHAT = "/v1/chat/completions"
OPEN_PATHS = ("/health",)
"""Paths that need no API key."""
INVALID = "invalid_request_error"
WITHOUT_EFFECT = {"temperature": (None, 0), "top_p": (None, 1), "top_k": (None, 0, 1), "seed": (None,)}
"""Sampling settings, and their values that every artifact has: `top_k` 1 is temperature 0."""


@dataclass(frozen=True)
class Limits:
    """Limits of a server, and what its artifact can do.

    Attributes:
        api_key: that each request must have as `Authorization: Bearer KEY`; empty: none.
        max_body: most bytes of a body.
        max_waiting: most chat requests that run or wait at a time.
        lacks: sampling settings that the artifact does not have; keys of `WITHOUT_EFFECT`.
    """

    api_key: str = ""
    max_body: int = 4 * 2**20
    max_waiting: int = 256
    lacks: tuple[str, ...] = ()


class Refused(Exception):
    """A request that is answered with an error.

    Attributes:
        status: of HTTP. code: of the error.
    """

    def __init__(self, status: int, message: str, kind: str = INVALID, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.code = status, kind, code


class ClientGone(Exception):
    """The client has closed its connection."""


def error_body(message: str, kind: str = INVALID, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's API writes it."""
    return {"error": {"message": message, "type": kind, "code": code}}


class Guard:
    """The middleware.

    Args:
        app: the server behind it.
        limits: see `Limits`.
    """

    def __init__(self, app: App, limits: Limits) -> None:
        self._app, self._limits = app, limits
        self._waiting = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Handles one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check_key(scope)
            if scope["path"].rstrip("/") != CHAT or scope["method"] != "POST":
                await self._app(scope, receive, send)
                return
            if self._waiting >= self._limits.max_waiting:
                raise Refused(
                    503, f"{self._waiting} requests are waiting already: try again later", "server_error", "overloaded"
                )
            # Other types need no consent of the browser when a page of another site sends them.
            if _header(scope, b"content-type").split(b";")[0].strip().lower() != b"application/json":
                raise Refused(415, "the body must be JSON: send Content-Type: application/json")
            self._waiting += 1
            try:
                body = await self._body(scope, receive)
                self._check_body(body)
                await self._run(scope, body, receive, send)
            finally:
                self._waiting -= 1
        except Refused as error:
            await _answer(send, error)
        except ClientGone:
            pass

    def _check_key(self, scope: MutableMapping[str, Any]) -> None:
        key = self._limits.api_key
        if not key or scope["path"] in OPEN_PATHS:
            return
        given = _header(scope, b"authorization")
        if not hmac.compare_digest(given, b"Bearer " + key.encode()):
            raise Refused(
                401, "the API key is missing or wrong: send Authorization: Bearer KEY", INVALID, "invalid_api_key"
            )

    async def _body(self, scope: MutableMapping[str, Any], receive: Receive) -> bytes:
        most = self._limits.max_body
        too_large = Refused(413, f"the body has more than {most} bytes: send less", INVALID, "request_too_large")
        length = _header(scope, b"content-length")
        if length.isdigit() and int(length[:20]) > most:
            raise too_large
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            body += message.get("body", b"")
            if len(body) > most:
                raise too_large
            if not message.get("more_body", False):
                return bytes(body)

    def _check_body(self, body: bytes) -> None:
        """Refuses what the server behind would answer with a failure of its own."""
        try:
            request = json.loads(body)
            # Escapes may name half a character, which no tokenizer takes.
            json.dumps(request, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the body is not valid JSON in UTF-8: {error}", INVALID, "invalid_json") from None
        if not isinstance(request, dict):
            return
        if request.get("messages") == []:
            raise Refused(400, "messages is empty: send at least one message", INVALID, "invalid_value")
        for name in self._limits.lacks:
            if request.get(name) not in WITHOUT_EFFECT[name]:
                message = f"this model picks tokens without {name}: leave it out"
                if name == "top_k":
                    message += ", use top_p, or export the model with --output logits"
                raise Refused(400, message, INVALID, "unsupported_parameter")

    async def _run(self, scope: MutableMapping[str, Any], body: bytes, receive: Receive, send: Send) -> None:
        """Runs the app until it is done or the client has gone, in which case the app is canceled."""
        gone, sent_all = asyncio.Event(), False
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def forward(message: Message) -> None:
            nonlocal sent_all
            await send(message)
            sent_all = message["type"] == "http.response.body" and not message.get("more_body", False)

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        running, watching = asyncio.ensure_future(self._app(scope, replay, forward)), asyncio.ensure_future(watch())
        try:
            await asyncio.wait((running, watching), return_when=asyncio.FIRST_COMPLETED)
            gone.set()
            if not running.done() and not sent_all:
                running.cancel()
            await asyncio.wait((running,))
        finally:
            watching.cancel()
            if not running.done():
                running.cancel()
        if not running.cancelled():
            running.result()


def _header(scope: MutableMapping[str, Any], name: bytes) -> bytes:
    return next((bytes(value) for key, value in scope["headers"] if key == name), b"")


async def _answer(send: Send, error: Refused) -> None:
    body = json.dumps(error_body(str(error), error.kind, error.code)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if error.status == 413:  # the rest of the body is not read
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
