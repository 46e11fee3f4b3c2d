"""The server over HTTP, with a scripted worker: clients of OpenAI's API, sessions, tools, failures."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from .conftest import scripted_server

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

PACKAGE = "executorch.examples.llm_server"


@pytest.fixture(scope="module")
def address(scripted_pte: Path) -> Iterator[str]:
    with scripted_server(scripted_pte) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> Any:
    return openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=60)


def ask(client: Any, content: str, **fields: Any) -> str:
    messages = [{"role": "user", "content": content}]
    answer = client.chat.completions.create(model="script", messages=messages, **fields)
    return str(answer.choices[0].message.content)


def post(address: str, body: Any, **headers: str) -> Any:
    content = body if isinstance(body, (bytes, str)) else json.dumps(body)
    sent = {"content-type": "application/json", **headers}
    return httpx.post(f"{address}/chat/completions", content=content, headers=sent, timeout=60)


def error_of(response: Any) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert isinstance(error["message"], str) and isinstance(error["type"], str) and "code" in error
    return error


def test_openai_client_streams(client: Any) -> None:
    messages = [{"role": "user", "content": "count 30"}]
    stream = client.chat.completions.create(
        model="script", messages=messages, stream=True, stream_options={"include_usage": True}
    )
    pieces, usage, finish = [], None, None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            finish = choice.finish_reason or finish
            if choice.delta.content:
                pieces.append(choice.delta.content)
    expected = " ".join(map(str, range(30)))
    assert "".join(pieces) == expected and len(pieces) > 10 and finish == "stop"
    assert usage is not None and usage.completion_tokens == len(expected)
    assert usage.prompt_tokens == len("[user]count 30[end][assistant]")


def test_openai_client(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["script"]
    assert ask(client, "echo 你好 🌍") == "你好 🌍"
    assert ask(client, "echo abcdef", max_tokens=3) == "abc"
    assert ask(client, "echo one two three", stop=[" three"]) == "one two"
    assert ask(client, "echo x", temperature=0.7, top_p=0.9, seed=5) == "x"


def test_tool_calls(client: Any) -> None:
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    answer = client.chat.completions.create(model="script", messages=messages, tools=tools).choices[0]
    (call,) = answer.message.tool_calls
    assert answer.finish_reason == "tool_calls" and call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Paris"}


def test_sessions(client: Any, address: str) -> None:
    """Sessions that take turns on fewer states; `recall` returns all that the model was told."""
    names = ["a", "b", "c", None]
    for turn in range(3):
        for name in names:
            extra = {"session_id": name} if name else {}
            assert ask(client, f"recall {name}{turn}", extra_body=extra) == f"<user]recall {name}{turn}<end]<assistant]"
    root = address.removesuffix("/v1")
    assert httpx.post(f"{root}/v1/sessions/a/reset").json() == {"reset": True, "session_id": "a"}
    for name in ("a", "unknown"):
        assert httpx.delete(f"{root}/v1/sessions/{name}").json() == {"closed": True, "session_id": name}
    response = post(address, {"messages": [{"role": "user", "content": "x"}], "session_id": "no spaces"})
    assert response.status_code == 400 and error_of(response)["code"] == "invalid_session_id"


def test_a_conversation_with_history(client: Any) -> None:
    messages: list[Any] = [{"role": "user", "content": "echo one"}]
    first = client.chat.completions.create(model="script", messages=messages, extra_body={"session_id": "talk"})
    messages += [{"role": "assistant", "content": first.choices[0].message.content}]
    messages += [{"role": "user", "content": "recall"}]
    second = client.chat.completions.create(model="script", messages=messages, extra_body={"session_id": "talk"})
    assert second.choices[0].message.content == "<user]echo one<end]<assistant]one<end]<user]recall<end]<assistant]"


GOOD = {"messages": [{"role": "user", "content": "echo on"}]}


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ("{broken", 400, "invalid_json"),
        (b"\xff\xfe", 400, "invalid_json"),
        ("[" * 100_000, 400, "invalid_json"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "invalid_json"),
        (b"x" * 10_000_000, 413, "request_too_large"),
        ("[]", 422, "invalid_value"),
        ({"messages": "hello"}, 422, "invalid_value"),
        ({"messages": []}, 400, "invalid_value"),
        ({**GOOD, "model": "other"}, 404, "model_not_found"),
        ({**GOOD, "temperature": 9}, 400, "invalid_value"),
        ({**GOOD, "max_tokens": 0}, 400, "invalid_value"),
        ({**GOOD, "top_k": 5}, 400, "unsupported_parameter"),
        ({**GOOD, "n": 2}, 400, "unsupported_parameter"),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, 400, "context_length_exceeded"),
        ({**GOOD, "max_tokens": 5000}, 400, "context_length_exceeded"),
    ],
    ids=[
        "broken", "utf-8", "deep", "surrogate", "10MB", "list", "schema", "empty", "model", "temperature", "max_tokens",
        "top_k", "n", "prompt", "answer",
    ],
)  # fmt: skip
def test_refused_requests(body: Any, status: int, code: str, address: str) -> None:
    response = post(address, body)
    assert response.status_code == status and error_of(response)["code"] == code
    assert post(address, GOOD).json()["choices"][0]["message"]["content"] == "on"


def test_other_refusals(address: str) -> None:
    assert post(address, GOOD, **{"content-type": "text/plain"}).status_code == 415
    response = httpx.get(f"{address}/nothing")
    assert response.status_code == 404 and error_of(response)
    response = httpx.get(f"{address}/chat/completions")
    assert response.status_code == 405 and error_of(response)


def test_a_body_without_a_length(address: str) -> None:
    """Chunked, so that only counting finds its size."""
    response = post_chunks(address, (b" " * 2**16 for _ in range(200)))
    assert response.status_code == 413 and error_of(response)["code"] == "request_too_large"


def post_chunks(address: str, chunks: Iterator[bytes]) -> Any:
    headers = {"content-type": "application/json"}
    return httpx.post(f"{address}/chat/completions", content=chunks, headers=headers, timeout=60)


def test_200_requests_at_once(address: str) -> None:
    """In several sessions, each of which gets its own answer."""

    def one(number: int) -> str:
        session = {} if number % 5 == 4 else {"session_id": f"s{number % 5}"}
        content = [{"role": "user", "content": f"recall {number}"}]
        body = {"messages": content, "stream": False, **session}
        return str(post(address, body).json()["choices"][0]["message"]["content"])

    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(one, range(200)))
    assert answers == [f"<user]recall {number}<end]<assistant]" for number in range(200)]


def test_a_client_that_goes_away_frees_the_worker(scripted_pte: Path) -> None:
    """The answer takes 18 s. Each call of the program takes longer here, so that it has a server of its own."""
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "count 250"}]}
    with scripted_server(scripted_pte, 0.02) as address:
        for stream in (True, False):
            body["stream"] = stream
            if stream:
                with httpx.stream("POST", f"{address}/chat/completions", json=body) as response:
                    next(response.iter_raw())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    httpx.post(f"{address}/chat/completions", json=body, timeout=0.5)
            start = time.monotonic()
            assert post(address, GOOD).status_code == 200
            assert time.monotonic() - start < 8


def test_a_killed_worker_is_started_again(address: str) -> None:
    die = {"messages": [{"role": "user", "content": "die"}]}
    response = post(address, die)
    assert response.status_code == 500 and "worker exited" in error_of(response)["message"]
    assert httpx.get(address.removesuffix("/v1") + "/health").status_code == 200
    assert post(address, GOOD).json()["choices"][0]["message"]["content"] == "on"
    streamed = post(address, {**die, "stream": True}).text
    assert '"error"' in streamed and streamed.rstrip().endswith("data: [DONE]")
    assert post(address, {**GOOD, "session_id": "a"}).status_code == 200


def run_suite(folder: str, *arguments: str, **environment: str) -> str:
    """Runs tests of ExecuTorch's server, which need a process of their own; returns what pytest printed."""
    package = importlib.util.find_spec(PACKAGE)
    assert package is not None and package.origin is not None
    tests = Path(package.origin).parent / folder
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        "--rootdir",
        str(tests),
    ]
    command += [str(tests), *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_conformance_suite(address: str) -> None:
    found = run_suite("conformance", OPENAI_BASE_URL=address, OPENAI_MODEL="script")
    assert "7 passed" in found and "skipped" not in found


def test_contract_suite_behind_the_middleware(tmp_path: Path) -> None:
    """ExecuTorch's tests of its server make it with `build_app`; a plugin puts our middleware around that."""
    (tmp_path / "behind_guard.py").write_text(
        f"from {PACKAGE}.python import server\n"
        "from executorch_moe.export.serve.app import guarded\n"
        "from executorch_moe.export.serve.guard import Limits\n"
        "build = server.build_app\n"
        "server.build_app = lambda serving, model_id: guarded(build(serving, model_id), Limits())\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    found = run_suite("python/tests", "-p", "behind_guard", PYTHONPATH=path)
    assert int(found.rpartition(" passed")[0].split()[-1]) > 200
