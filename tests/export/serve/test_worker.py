"""The worker's side of ExecuTorch's protocol, with a scripted program."""

from __future__ import annotations

import io
import json
import os
from typing import Any

import pytest

from executorch_moe.export.serve.sessions import Sessions
from executorch_moe.export.serve.worker import Cancellations, Worker

from .scripted import CONTEXT, EOS, load


class Lines:
    """Sends a request to a worker; returns its answer's lines."""

    def __init__(self, names: int = 2, states: int = 1, descriptor: int | None = None) -> None:
        self.sessions = Sessions(load, names, states)
        self._output = io.StringIO()
        self._worker = Worker(self.sessions, self._output, Cancellations(descriptor))

    def __call__(self, request: Any) -> list[dict[str, Any]]:
        self._output.seek(0)
        self._output.truncate()
        self._worker.answer(request if isinstance(request, str) else json.dumps(request))
        return [json.loads(line) for line in self._output.getvalue().splitlines()]

    def ask(self, asked: str, **fields: Any) -> tuple[str, dict[str, Any]]:
        """Text and `done` of an answer."""
        *tokens, done = self({"prompt": f"[user]{asked}[end][assistant]", **fields})
        assert done["done"] is True, done
        return "".join(token["token"] for token in tokens), done


def test_an_answer_and_its_counts() -> None:
    text, done = Lines().ask("echo héllo")
    assert text == "héllo" and done["finish_reason"] == "stop" and done["cancelled"] is False
    assert done["completion_tokens"] == len("héllo".encode()) == len(done["generated_token_ids"])
    assert EOS not in done["generated_token_ids"]
    assert done["prompt_tokens"] == done["prefilled_prompt_tokens"] == len("[user]echo héllo[end][assistant]".encode())
    assert (done["reused_prompt_tokens"], done["session_reset_reason"]) == (0, "new")


def test_limits_of_an_answer() -> None:
    lines = Lines()
    assert lines.ask("echo abcdef", max_new_tokens=3)[0] == "abc"
    text, done = lines.ask("count 999")  # to the end of the context
    assert done["finish_reason"] == "length" and done["prompt_tokens"] + len(text) == CONTEXT + 1
    assert lines.ask("echo again")[0] == "again"


def test_stop_texts() -> None:
    lines = Lines()
    text, done = lines.ask("echo one two three", stop=["zzz", " three", "two th"])
    assert text == "one " and done["finish_reason"] == "stop"
    assert "generated_token_ids" not in done  # the stop text ends within the tokens
    assert lines.ask("echo one twofold", stop=["two three"])[0] == "one twofold"
    assert lines.ask("echo abc", stop=["", "abcd"])[0] == "abc"  # a begun stop text is text at the end


def test_a_session_computes_only_what_is_new() -> None:
    lines = Lines()
    first, done = lines.ask("echo one", session_id="a")
    prompt = "[user]echo one[end][assistant]"
    following = "[end][user]recall[end][assistant]"
    segments = [{"text": prompt}, {"ids": done["generated_token_ids"]}, {"text": following}]
    *tokens, done = lines({"prompt_segments": segments, "session_id": "a"})
    assert "".join(token["token"] for token in tokens) == (prompt + first + following).replace("[", "<")
    assert done["session_reset_reason"] == "exact_prefix"
    assert done["reused_prompt_tokens"] == len(prompt + first)
    assert done["prefilled_prompt_tokens"] == done["prompt_tokens"] - done["reused_prompt_tokens"]
    assert lines({"op": "reset", "session_id": "a"}) == [{"reset": True, "session_id": "a"}]
    assert lines.ask("echo one", session_id="a")[1]["reused_prompt_tokens"] == 0


def test_sessions_do_not_read_each_others_tokens() -> None:
    """One state for three sessions that take turns; `recall` returns everything that is in the cache."""
    lines = Lines(names=3)
    for turn in range(3):
        for name in ("a", "b", None):
            text, _ = lines.ask(f"recall {name}{turn}", session_id=name)
            assert text == f"<user]recall {name}{turn}<end]<assistant]"


def test_a_session_is_told_that_it_lost_its_state() -> None:
    lines = Lines(names=2)
    lines.ask("echo one", session_id="a")
    lines.ask("echo two", session_id="b")
    assert lines.ask("echo one", session_id="a")[1]["session_reset_reason"] == "evicted"


def test_operations() -> None:
    lines = Lines(names=1)
    assert lines({"op": "open", "session_id": "a"}) == [{"opened": True, "session_id": "a"}]
    assert lines({"op": "open", "session_id": "b"}) == [{"opened": True, "session_id": "b"}]  # closes a
    assert lines({"op": "close", "session_id": "b"}) == [{"closed": True, "session_id": "b"}]
    assert lines({"op": "close", "session_id": "unknown"}) == [{"closed": True, "session_id": "unknown"}]
    none = Lines(names=0)
    for request in ({"op": "open", "session_id": "a"}, {"prompt": "x", "session_id": "a"}):
        (answer,) = none(request)
        assert answer["code"] == "unsupported_session"


def test_cancellation() -> None:
    reader, writer = os.pipe()
    lines = Lines(descriptor=reader)
    os.write(writer, (7).to_bytes(8, "little") + (9).to_bytes(8, "little")[:3])
    text, done = lines.ask("count 200", cancel_request_id=8)  # 7 is over, 9 is not whole
    assert done["cancelled"] is False and text.endswith("199")
    os.write(writer, (9).to_bytes(8, "little")[3:])
    text, done = lines.ask("count 200", cancel_request_id=9, session_id="a")
    assert done["cancelled"] is True and text == "" and "generated_token_ids" not in done
    assert lines.ask("echo on", cancel_request_id=10, session_id="a")[0] == "on"
    os.close(writer)
    assert lines.ask("echo on", cancel_request_id=11)[0] == "on"
    os.close(reader)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ("{broken", "Expecting property name"),
        ("[]", "must be a JSON object"),
        ({}, "the prompt must be text"),
        ({"prompt": ""}, "has no tokens"),
        ({"prompt": "\ud800"}, "not valid UTF-8"),
        ({"prompt": "x", "temperature": -1}, "temperature=-1.0"),
        ({"prompt": "x", "top_p": 0}, "top_p=0.0"),
        ({"prompt": "x", "top_k": 5}, "top_k=5 does not apply to this artifact"),
        ({"prompt": "x", "stop": "x"}, "stop must be a list"),
        ({"prompt": "x", "temperature": None}, "float"),
        ({"prompt_segments": []}, "at least one segment"),
        ({"prompt_segments": ["x"]}, "a segment must be an object"),
        ({"prompt_segments": [{"ids": [264]}]}, "outside the vocabulary"),
        ({"prompt_segments": [{"ids": [-1]}]}, "outside the vocabulary"),
        ({"op": "dance", "session_id": "a"}, "op='dance' is unknown"),
        ({"op": "open"}, "session_id must be text"),
        ({"prompt": "x" * (CONTEXT + 1)}, f"has {CONTEXT + 1} tokens"),
    ],
)
def test_refused_requests_leave_the_worker_running(request_: Any, message: str) -> None:
    lines = Lines()
    (answer,) = lines(request_)
    assert message in answer["error"]
    assert lines.ask("echo on")[0] == "on"


def test_a_failing_program_leaves_nothing_to_resume() -> None:
    lines = Lines()
    lines.ask("echo one", session_id="a")
    state, _ = lines.sessions.lend("a")
    run = state.generator.program.run  # type: ignore[attr-defined]

    def fails(*_: object) -> None:
        raise RuntimeError("no memory")

    state.generator.program.run = fails  # type: ignore[attr-defined]
    (answer,) = lines({"prompt": "[user]echo two[end][assistant]", "session_id": "a"})
    assert answer == {"error": "RuntimeError: no memory"}
    state.generator.program.run = run  # type: ignore[attr-defined]
    text, done = lines.ask("echo one", session_id="a")
    assert text == "one" and done["reused_prompt_tokens"] == 0
