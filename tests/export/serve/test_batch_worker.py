"""Requests at once: the worker's lines, with a scripted program."""

from __future__ import annotations

import json
from typing import Any

import pytest

from executorch_moe.export.serve.batch_worker import BatchWorker

from .batch_scripted import SLOTS, load
from .scripted import EOS


class Lines:
    """A worker and what it said, by number of the request."""

    def __init__(self, names: int = 8) -> None:
        self.said: dict[Any, list[dict[str, Any]]] = {}
        self.generator = load()
        self.worker = BatchWorker(self.generator, names, self._write)

    def _write(self, message: dict[str, Any]) -> None:
        self.said.setdefault(message.get("id"), []).append(message)

    def ask(self, number: int, asked: str, **fields: Any) -> None:
        self.worker.take(json.dumps({"id": number, "prompt": f"[user]{asked}[end][assistant]", **fields}))

    def run(self) -> None:
        while self.worker.busy:
            self.worker.step()

    def text(self, number: int) -> str:
        return "".join(message.get("token", "") for message in self.said[number])

    def done(self, number: int) -> dict[str, Any]:
        message = self.said[number][-1]
        assert message["done"] is True, message
        return message


def test_requests_run_at_once_and_end_by_themselves() -> None:
    lines = Lines()
    texts = {number: "x" * number for number in range(1, 11)}  # more than slots
    for number, text in texts.items():
        lines.ask(number, f"echo {text}")
    lines.run()
    for number, text in texts.items():
        done = lines.done(number)
        assert lines.text(number) == text and done["finish_reason"] == "stop"
        assert done["completion_tokens"] == number and EOS not in done["generated_token_ids"]
    rows = lines.generator.program.rows  # type: ignore[attr-defined]
    assert max(rows) == SLOTS and len(rows) < sum(texts)


def test_limits_and_stop_texts() -> None:
    lines = Lines()
    lines.ask(1, "echo abcdef", max_new_tokens=3)
    lines.ask(2, "echo one two three", stop=["two th"])
    lines.ask(3, "echo héllo")
    lines.run()
    assert [lines.text(number) for number in (1, 2, 3)] == ["abc", "one ", "héllo"]
    assert lines.done(1)["finish_reason"] == "length" and lines.done(2)["finish_reason"] == "stop"
    assert "generated_token_ids" not in lines.done(2)


def test_a_session_computes_only_what_is_new() -> None:
    lines = Lines()
    lines.ask(1, "echo one", session_id="a")
    lines.ask(2, "echo of others")
    lines.run()
    prompt, following = "[user]echo one[end][assistant]", "[end][user]recall[end][assistant]"
    segments = [{"text": prompt}, {"ids": lines.done(1)["generated_token_ids"]}, {"text": following}]
    lines.worker.take(json.dumps({"id": 3, "prompt_segments": segments, "session_id": "a"}))
    lines.ask(4, "recall b", session_id="b")
    lines.run()
    assert lines.text(3) == (prompt + "one" + following).replace("[", "<")
    done = lines.done(3)
    # The last token of an answer was never an input.
    assert done["session_reset_reason"] == "exact_prefix" and done["reused_prompt_tokens"] == len(prompt + "one")
    assert lines.text(4) == "<user]recall b<end]<assistant]"


def test_requests_of_one_session_wait_for_each_other() -> None:
    lines = Lines()
    for number in (1, 2, 3):
        lines.ask(number, f"recall {number}", session_id="a")
    lines.worker.step()
    lines.worker.step()
    assert 1 in lines.said and 2 not in lines.said
    lines.run()
    assert [lines.text(number) for number in (1, 2, 3)] == [f"<user]recall {n}<end]<assistant]" for n in (1, 2, 3)]


def test_the_least_recently_used_session_loses_its_slot_and_is_told() -> None:
    lines = Lines()
    for number in range(SLOTS + 1):
        lines.ask(number, f"echo {number}", session_id=f"s{number}")
        lines.run()
    lines.ask(90, "echo 0", session_id="s0")
    lines.ask(91, f"echo {SLOTS}", session_id=f"s{SLOTS}")
    lines.run()
    assert lines.done(90)["session_reset_reason"] == "evicted" and lines.done(90)["reused_prompt_tokens"] == 0
    assert lines.done(91)["session_reset_reason"] == "mismatch" and lines.done(91)["reused_prompt_tokens"] > 0


def test_cancel_close_and_reset() -> None:
    lines = Lines()
    lines.ask(1, "count 200", session_id="a")
    lines.ask(2, "count 300", session_id="b")
    for _ in range(5):
        lines.worker.step()
    lines.worker.take(json.dumps({"id": 1, "op": "cancel"}))
    lines.worker.take(json.dumps({"id": 7, "op": "close", "session_id": "b"}))
    assert lines.done(1)["cancelled"] is True and "generated_token_ids" not in lines.done(1)
    lines.worker.take(json.dumps({"id": 2, "op": "cancel"}))
    assert lines.said[7] == [{"id": 7, "closed": True, "session_id": "b"}] and not lines.worker.busy
    lines.ask(3, "count 200", session_id="a")
    lines.ask(4, "count 300", session_id="b")  # closed while it ran: nothing is left
    lines.worker.take(json.dumps({"id": 8, "op": "reset", "session_id": "a"}))
    lines.run()
    assert lines.text(3) == " ".join(map(str, range(200))) and lines.done(4)["reused_prompt_tokens"] == 0
    for number in range(10, 10 + SLOTS):
        lines.ask(number, "count 300")
    lines.ask(20, "echo waits")
    lines.worker.step()
    lines.worker.take(json.dumps({"id": 20, "op": "cancel"}))  # before it has a slot
    assert lines.done(20)["cancelled"] is True and lines.text(20) == ""


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("[1]", "a request must be a JSON object with a number, id"),
        ('{"id": 1, "op": "what", "session_id": "a"}', "op='what' is unknown"),
        ('{"id": 1, "op": "open"}', "session_id must be text"),
        ('{"id": 1, "prompt": ""}', "the prompt has no tokens"),
        ('{"id": 1, "prompt": "x", "temperature": -1}', "temperature=-1.0 must be 0"),
        ("{", "JSONDecodeError"),
    ],
)
def test_a_bad_line_is_one_error(line: str, error: str) -> None:
    lines = Lines()
    lines.worker.take(line)
    (answer,) = (message for messages in lines.said.values() for message in messages)
    assert error in answer["error"] and not lines.worker.busy
    lines.ask(2, "echo on")
    lines.run()
    assert lines.text(2) == "on"


def test_a_runtime_that_fails_ends_what_runs() -> None:
    lines = Lines()
    program: Any = lines.generator.program
    run = program.run
    lines.ask(1, "echo one", session_id="a")
    lines.worker.step()
    program.run = lambda *inputs: 1 / 0
    lines.worker.step()
    assert lines.said[1][-1]["error"].startswith("ZeroDivisionError") and not lines.worker.busy
    program.run = run
    lines.ask(2, "recall", session_id="a")
    lines.run()
    assert lines.text(2) == "<user]recall<end]<assistant]" and lines.done(2)["reused_prompt_tokens"] == 0
