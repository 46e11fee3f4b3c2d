"""A worker whose program is a script instead of a model: it answers the last message of the user by what it says.

The program computes from its cache, so an answer is wrong if a session reads another's tokens, or resumes at a wrong
position. As a script it is the worker process.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import torch

from executorch_moe.export.generate.generator import TextGenerator
from executorch_moe.export.generate.tokenizer_file import read_tokenizer
from executorch_moe.export.models.pretrained import resolve
from executorch_moe.export.serve.worker import serve_lines

CONTEXT, EOS, VOCABULARY = 1024, 257, 264
TEMPLATE = (
    "{% if tools %}[tools]{% endif %}"
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}[end]{% endfor %}[assistant]"
)
TOOL_CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>'
CONSTANTS: dict[str, Any] = {
    "get_max_context_len": CONTEXT,
    "get_vocab_size": VOCABULARY,
    "get_eos_ids": [EOS],
    "get_bos_id": -1,
    "get_method_output": "token",
}


def reply(prompt: str) -> str:
    """The answer to a prompt of `TEMPLATE`."""
    asked = prompt.rpartition("[user]")[2].partition("[end]")[0]
    order, _, rest = asked.partition(" ")
    if order == "echo":
        return rest
    if order == "recall":  # all that this session was told
        return prompt.replace("[", "<")
    if order == "count":
        return " ".join(str(n) for n in range(int(rest)))
    if order == "die":
        os._exit(3)
    if "weather" in asked:
        return TOOL_CALL
    return f"You said: {asked}"


class ScriptedProgram:
    """A program of `--output token` whose cache is the text itself."""

    runtime, note, device = "script", "", torch.device("cpu")
    method_names = ("prefill", "decode")
    constant_names = tuple(CONSTANTS)

    def __init__(self, seconds: float = 0.0) -> None:
        self._cache: list[int] = []
        self._seconds = seconds
        self.computed = 0

    def constant(self, name: str) -> Any:
        return CONSTANTS[name]

    def reset(self) -> None:
        self._cache = []

    def run(self, method: str, ids: torch.Tensor, positions: torch.Tensor, *sampling: torch.Tensor) -> list[Any]:
        assert len(sampling) == 3 and (method == "prefill") == (ids.shape[1] > 1)
        first = int(positions[0])
        assert first <= len(self._cache), "a position was left out"
        self._cache[first:] = ids[0].tolist()
        self.computed += ids.shape[1]
        time.sleep(self._seconds)
        # The tokens of this tokenizer are bytes.
        prompt, marker, answered = bytes(min(token, 255) for token in self._cache).rpartition(b"[assistant]")
        rest = reply((prompt + marker).decode(errors="replace")).encode()[len(answered) :]
        return [torch.tensor([[rest[0] if rest else EOS]])]


def load(seconds: float = 0.0) -> TextGenerator:
    """A generator of its own."""
    program = ScriptedProgram(seconds)
    return TextGenerator(program, read_tokenizer(resolve("tiny") / "tokenizer.json"), 64)  # type: ignore[arg-type]


if __name__ == "__main__":  # SECONDS_PER_CALL SESSIONS STATES
    serve_lines(lambda: load(float(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3]))
