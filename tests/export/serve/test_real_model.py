"""The server and the chat command with the tiny model in ExecuTorch's CPU runtime."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from executorch_moe.export.cli.app import app
from executorch_moe.export.generate.generator import TextGenerator

from ..cli.refusals import refused, runner
from .conftest import running

openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("executorch_runtime")]
NEW_TOKENS = 24
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def pte(exported: Callable[..., Path]) -> Path:
    return exported("w4a16", "cpu")


@pytest.fixture(scope="module")
def client(pte: Path) -> Iterator[Any]:
    """A client of a server with two named sessions on two states."""
    from executorch_moe.export.serve.app import ServeOptions, serving

    with serving(ServeOptions(pte, "tiny", sessions=2, states=2)) as served, running(served) as address:
        yield openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def ours(pte: Path) -> Callable[[str], str]:
    """The text that our own runner gives after a prompt."""
    generator = TextGenerator.load(pte)

    def answer(prompt: str) -> str:
        tokens = generator.generate(generator.encode(prompt), NEW_TOKENS).tokens
        return str(generator.tokenizer.decode(tokens))

    return answer


def test_openai_client_streams_our_text(client: Any, ours: Callable[[str], str]) -> None:
    for prompt in ("The import statement", "x", "class Point:\n    def"):
        messages = [{"role": "user", "content": prompt}]
        stream = client.chat.completions.create(model="tiny", messages=messages, max_tokens=NEW_TOKENS, stream=True)
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
        assert "".join(pieces) == ours(prompt)


@pytest.mark.parametrize("page", ["README.md", "docs/serving.md"])
def test_the_request_of_a_page(page: str, client: Any) -> None:
    """The `curl` line, sent to this server."""
    (line,) = (line for line in (ROOT / page).read_text(encoding="utf-8").splitlines() if line.startswith("curl "))
    _, url, *options = shlex.split(line)
    given = dict(zip(options[::2], options[1::2], strict=True))
    name, _, value = given["-H"].partition(": ")
    path = url.removeprefix("http://127.0.0.1:8000/v1/")
    answer = httpx.post(f"{client.base_url}{path}", content=given["-d"], headers={name: value}, timeout=60)
    assert answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"]


def test_conversations_in_turns(client: Any, ours: Callable[[str], str]) -> None:
    """Two sessions in turn, each with its whole history; the model's template joins the messages by lines."""
    talks: dict[str, list[Any]] = {"a": [], "b": []}
    for number in range(2):
        for name, messages in talks.items():
            messages.append({"role": "user", "content": f"{name} {number} is"})
            answer = client.chat.completions.create(
                model="tiny", messages=messages, max_tokens=NEW_TOKENS, extra_body={"session_id": name}
            )
            text = answer.choices[0].message.content or ""
            prompt = "\n".join(message["content"] for message in messages)
            assert answer.usage.prompt_tokens == len(prompt)
            assert text == ours(prompt)
            messages.append({"role": "assistant", "content": text})


def test_sampling_with_a_seed(client: Any) -> None:
    def text(seed: int) -> str:
        messages = [{"role": "user", "content": "The import statement"}]
        answer = client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=NEW_TOKENS, temperature=1.0, top_p=0.95, seed=seed
        )
        return str(answer.choices[0].message.content)

    assert text(1) == text(1) != text(2)


def test_the_command(pte: Path) -> None:
    """From the command line to an answer, and to its end by Ctrl-C."""
    command = [sys.executable, "-m", "executorch_moe.export.cli", "serve", str(pte), "--port", "0", "--model-id", "m"]
    environment = {**os.environ, "EXECUTORCH_MOE_API_KEY": "key"}
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert server.stderr is not None
        lines = iter(server.stderr.readline, "")
        address = next(found[0] for line in lines if (found := re.search(r"http://127.0.0.1:\d+", line)))
        body = {"messages": [{"role": "user", "content": "The import"}], "max_tokens": 8, "model": "m"}
        assert httpx.post(f"{address}/v1/chat/completions", json=body).status_code == 401
        headers = {"authorization": "Bearer key"}
        answer = httpx.post(f"{address}/v1/chat/completions", json=body, headers=headers, timeout=60)
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 8
        server.send_signal(signal.SIGINT)
        assert server.wait(30) is not None
    finally:
        server.kill()
        server.communicate()


def test_refusals_of_the_command(pte: Path, tmp_path: Path) -> None:
    assert "is missing" in refused("serve", tmp_path / "none.pte") or "does not exist" in refused(
        "serve", tmp_path / "none.pte"
    )
    assert "--sessions -1 must be at least 0" in refused("serve", pte, "--sessions", -1)
    assert "--states 0 must be at least 1" in refused("serve", pte, "--states", 0)
    assert "--max-body 0 must be at least 1" in refused("serve", pte, "--max-body", 0)


def chat(pte: Path, lines: str, *options: str) -> Any:
    return runner.invoke(app, ["chat", str(pte), *options], input=lines, terminal_width=200)


def test_chat(pte: Path, ours: Callable[[str], str]) -> None:
    limit = ["--max-new-tokens", str(NEW_TOKENS)]
    ran = chat(pte, "The import\nis\n\n/reset\nThe import\n/exit\nignored\n", *limit)
    assert ran.exit_code == 0, ran.stderr
    first = ours("The import")
    assert ran.stdout == "".join(f"{text}\n" for text in (first, ours(f"The import\n{first}\nis"), first))
    computed = re.findall(r"prompt: (\d+) of (\d+) tokens computed", ran.stderr)
    assert len(computed) == 3 and int(computed[1][0]) < int(computed[1][1])  # the second turn continues the first
    assert "no chat template" in ran.stderr


def test_chat_options(pte: Path, tmp_path: Path, ours: Callable[[str], str]) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}<{{ m['content'] }}>{% endfor %}")
    stop = ours("<s><The import>")[5]
    ran = chat(pte, "The import\n", "--system", "s", "--chat-template", str(template), "--stop", stop)
    assert ran.stdout == ours("<s><The import>").partition(stop)[0] + "\n"
    assert "the conversation has" in chat(pte, "x" * 200 + "\n").stderr
    assert "--max-new-tokens 0 must be at least 1" in chat(pte, "", "--max-new-tokens", "0").stderr
    assert "--top-k 3 does not apply to this artifact" in chat(pte, "", "--top-k", "3").stderr


def test_generate_from_a_file_and_with_a_stop_text(pte: Path, tmp_path: Path, ours: Callable[[str], str]) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("The import")
    stop = ours("The import")[6]
    command = ["generate", str(pte), "--stop", stop, "--prompt-file"]
    expected = "The import" + ours("The import").partition(stop)[0] + "\n"
    ran = runner.invoke(app, [*command, str(file)], terminal_width=200)
    assert ran.stdout == expected and "stopped by a stop text" in ran.stderr
    assert runner.invoke(app, [*command, "-"], input="The import").stdout == expected
    file.write_bytes(b"\xff")
    assert "is not UTF-8 text" in refused("generate", pte, "--prompt-file", file)
    assert "use either --prompt or --prompt-file" in refused("generate", pte)
    assert "--chat needs a chat template" in refused("generate", pte, "-p", "x", "--chat")
    assert "is for --chat" in refused("generate", pte, "-p", "x", "--system", "y")
