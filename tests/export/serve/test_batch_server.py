"""The server over HTTP with requests at once, with a scripted worker."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from .conftest import running
from .scripted import TEMPLATE

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

SECONDS = 0.01
"""Of each step: long against the rest, so that times show how many steps there were."""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    from executorch_moe.backends.artifact import save
    from executorch_moe.backends.lower import lower
    from executorch_moe.export.models.pretrained import resolve
    from executorch_moe.export.serve.app import ServeOptions, serving

    from .batch_scripted import BATCHED

    pte = tmp_path_factory.mktemp("batched") / "script.pte"
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
    save(lower({"forward": program}, "cpu", {**BATCHED, "get_chat_template": TEMPLATE}), pte)
    shutil.copy(resolve("tiny") / "tokenizer.json", pte.with_suffix(".tokenizer.json"))
    command = [sys.executable, "-m", "tests.export.serve.batch_scripted", str(SECONDS), "8"]
    with serving(ServeOptions(pte, "script"), command) as app, running(app) as found:
        yield found


def post(address: str, content: str, **fields: Any) -> Any:
    body = {"messages": [{"role": "user", "content": content}], **fields}
    return httpx.post(f"{address}/chat/completions", json=body, timeout=60)


def answer(response: Any) -> str:
    return str(response.json()["choices"][0]["message"]["content"])


def test_requests_share_steps(address: str) -> None:
    """Four answers of 100 tokens in the time of less than three: steps, not requests, take the time."""
    expected = "y" * 100
    with ThreadPoolExecutor(4) as pool:
        assert answer(post(address, f"echo {expected}")) == expected
        start = time.monotonic()
        answers = [answer(found) for found in pool.map(lambda _: post(address, f"echo {expected}"), range(4))]
        took = time.monotonic() - start
    assert answers == [expected] * 4
    assert took < 3 * 100 * SECONDS, took


def test_200_requests_at_once(address: str) -> None:
    """In several sessions, each of which gets its own answer."""

    def one(number: int) -> str:
        session = {} if number % 5 == 4 else {"session_id": f"s{number % 5}"}
        return answer(post(address, f"echo {number}", **session))

    with ThreadPoolExecutor(200) as pool:
        assert list(pool.map(one, range(200))) == [str(number) for number in range(200)]


def test_streams_stop_texts_and_sessions(address: str) -> None:
    client = openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=60)
    messages: Any = [{"role": "user", "content": "count 12"}]
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(model="script", messages=messages, stream=True)
        if chunk.choices
    ]
    assert "".join(pieces) == " ".join(map(str, range(12))) and len(pieces) > 10
    assert answer(post(address, "echo one two three", stop=[" three"])) == "one two"
    for turn in range(2):
        for name in "abcdef":
            found = answer(post(address, f"recall {name}{turn}", session_id=name))
            assert found == f"<user]recall {name}{turn}<end]<assistant]"
    root = address.removesuffix("/v1")
    assert httpx.post(f"{root}/v1/sessions/a/reset").json() == {"reset": True, "session_id": "a"}
    assert httpx.delete(f"{root}/v1/sessions/a").json() == {"closed": True, "session_id": "a"}


def test_a_client_that_goes_away_frees_its_slot(address: str) -> None:
    """All slots are taken by answers of 9 s, whose clients leave."""
    for stream in (True, False):
        with ThreadPoolExecutor(4) as pool:

            def leave(_: int, stream: bool = stream) -> None:
                body = {"messages": [{"role": "user", "content": "count 250"}], "stream": stream}
                if stream:
                    with httpx.stream("POST", f"{address}/chat/completions", json=body) as response:
                        next(response.iter_raw())
                else:
                    with pytest.raises(httpx.ReadTimeout):
                        httpx.post(f"{address}/chat/completions", json=body, timeout=0.5)

            list(pool.map(leave, range(4)))
        start = time.monotonic()
        assert answer(post(address, "echo on")) == "on"
        assert time.monotonic() - start < 5


@pytest.mark.exhaustive  # each start of a process takes 10 CPU seconds
def test_a_killed_worker_is_started_again(address: str) -> None:
    response = post(address, "die")
    assert response.status_code == 500 and "the worker has ended" in response.json()["error"]["message"]
    assert httpx.get(address.removesuffix("/v1") + "/health").status_code == 200
    assert answer(post(address, "echo on", session_id="a")) == "on"
    streamed = post(address, "die", stream=True).text
    assert '"error"' in streamed and streamed.rstrip().endswith("data: [DONE]")
    assert answer(post(address, "echo on")) == "on"


def test_a_worker_that_does_not_start(address: str) -> None:
    from executorch.examples.llm_server.python.worker_client import WorkerError

    from executorch_moe.export.serve.batch_runtime import BatchRuntime

    with pytest.raises(WorkerError, match="the worker said '' instead of being ready"):
        BatchRuntime([sys.executable, "-c", "pass"])
