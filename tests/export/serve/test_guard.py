"""The middleware in front of an application that only records."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from executorch_moe.export.models.causal_lm import BY_OUTPUT
from executorch_moe.export.serve.app import LACKS
from executorch_moe.export.serve.guard import CHAT, WITHOUT_EFFECT, Guard, Limits

GOOD = json.dumps({"messages": [{"role": "user", "content": "x"}]}).encode()


class Application:
    """Answers "done" once `release` is set; records the bodies that arrived and cancellations."""

    def __init__(self) -> None:
        self.release = asyncio.Event()
        self.bodies: list[bytes] = []
        self.canceled = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        if scope["method"] == "POST":
            self.bodies.append((await receive())["body"])
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.canceled += 1
            raise
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})


class Connection:
    """One request; `status` and `body` are those of the answer."""

    def __init__(self, body: bytes = GOOD, path: str = CHAT, method: str = "POST", **headers: str) -> None:
        given = {"content-type": "application/json", **headers}
        pairs = [(name.encode(), value.encode()) for name, value in given.items()]
        self.scope = {"type": "http", "method": method, "path": path, "headers": pairs}
        self.incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        half = len(body) // 2
        self.incoming.put_nowait({"type": "http.request", "body": body[:half], "more_body": True})
        self.incoming.put_nowait({"type": "http.request", "body": body[half:]})
        self.status, self.body = 0, b""

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        else:
            self.body += message["body"]

    def leave(self) -> None:
        self.incoming.put_nowait({"type": "http.disconnect"})

    async def through(self, guard: Guard) -> Connection:
        await guard(self.scope, self.incoming.get, self.send)
        return self

    def code(self) -> str:
        return str(json.loads(self.body)["error"]["code"])


def test_api_key() -> None:
    async def check() -> None:
        application = Application()
        application.release.set()
        guard = Guard(application, Limits(api_key="s\u00e9cret"))
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "s\u00e9cret"}):
            refused = await Connection(**headers).through(guard)
            assert refused.status == 401 and refused.code() == "invalid_api_key"
            assert (await Connection(path="/v1/models", method="GET", **headers).through(guard)).status == 401
        assert (await Connection(authorization="Bearer s\u00e9cret").through(guard)).body == b"done"
        assert (await Connection(path="/health", method="GET").through(guard)).status == 200
        assert application.bodies == [GOOD]

    asyncio.run(check())


def test_too_many_requests_wait() -> None:
    async def check() -> None:
        application = Application()
        guard = Guard(application, Limits(max_waiting=2))
        waiting = [asyncio.ensure_future(Connection().through(guard)) for _ in range(2)]
        await asyncio.sleep(0)
        refused = await Connection().through(guard)
        assert refused.status == 503 and refused.code() == "overloaded"
        application.release.set()
        assert [(await request).status for request in waiting] == [200, 200]
        assert (await Connection().through(guard)).status == 200

    asyncio.run(check())


def test_a_request_is_cancelled_when_its_client_leaves() -> None:
    async def check() -> None:
        application = Application()
        guard = Guard(application, Limits())
        connection = Connection()
        running = asyncio.ensure_future(connection.through(guard))
        while not application.bodies:
            await asyncio.sleep(0)
        connection.leave()
        await running
        assert application.canceled == 1 and connection.status == 0
        early = Connection(body=b"")
        early.incoming = asyncio.Queue()
        early.leave()  # before its body has come
        assert (await early.through(guard)).status == 0

    asyncio.run(check())


@pytest.mark.parametrize(
    ("body", "limits", "status"),
    [
        (b'{"top_k": 5}', Limits(lacks=LACKS["token"]), 400),
        (b'{"top_k": 1}', Limits(lacks=LACKS["token"]), 200),
        (b'{"top_k": 5, "top_p": 0.5, "seed": 1}', Limits(lacks=LACKS["logits"]), 200),
        (b'{"top_p": 0.5, "seed": 1}', Limits(lacks=LACKS["token"]), 200),
        (b'{"temperature": 0.5}', Limits(lacks=LACKS["greedy"]), 400),
        (b'{"temperature": 0}', Limits(lacks=LACKS["greedy"]), 200),
        (b'{"temperature": 0.5, "top_p": 1.0}', Limits(lacks=LACKS["engine"]), 200),
        (b'{"top_p": 0.5}', Limits(lacks=LACKS["engine"]), 400),
        (b'{"seed": 1}', Limits(lacks=LACKS["engine"]), 400),
        (b'{"messages": []}', Limits(), 400),
        (b"x" * 11, Limits(max_body=10), 413),
        (b"1" * 10, Limits(max_body=10), 200),
        (b"{", Limits(), 400),
    ],
)
def test_bodies(body: bytes, limits: Limits, status: int) -> None:
    async def check() -> int:
        application = Application()
        application.release.set()
        return (await Connection(body).through(Guard(application, limits))).status

    assert asyncio.run(check()) == status


def test_every_output_of_an_export_is_known() -> None:
    assert LACKS.keys() == BY_OUTPUT.keys()
    assert set().union(*LACKS.values()) == WITHOUT_EFFECT.keys()


def test_other_types_of_content() -> None:
    async def check() -> int:
        return (await Connection(**{"content-type": "text/plain"}).through(Guard(Application(), Limits()))).status

    assert asyncio.run(check()) == 415
