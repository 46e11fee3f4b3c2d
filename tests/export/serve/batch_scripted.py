"""`scripted` for several requests at once: a program with a cache of slots. As a script it is the worker process."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch

from executorch_moe.export.generate.generator import TextGenerator
from executorch_moe.export.generate.tokenizer_file import read_tokenizer
from executorch_moe.export.models.pretrained import resolve
from executorch_moe.export.serve.batch_worker import serve_batch

from .scripted import CONSTANTS, EOS, reply

SLOTS = 4
BATCHED: dict[str, Any] = {**CONSTANTS, "get_max_batch": SLOTS}


class BatchScript:
    """A program of `--output token --max-batch 4` whose cache is the text of each slot."""

    runtime, note, device = "script", "", torch.device("cpu")
    method_names = ("decode", "decode_batch", "prefill")
    constant_names = tuple(BATCHED)

    def __init__(self, seconds: float = 0.0) -> None:
        self._slots: list[list[int]] = [[] for _ in range(SLOTS)]
        self._seconds = seconds
        self.rows: list[int] = []
        """Texts of each step."""

    def constant(self, name: str) -> Any:
        return BATCHED[name]

    def run(self, method: str, ids: torch.Tensor, positions: torch.Tensor, *inputs: torch.Tensor) -> list[Any]:
        time.sleep(self._seconds)
        if method == "prefill":
            return [torch.tensor([[self._next(int(inputs[0]), int(positions[0]), ids[0].tolist())]])]
        slots = torch.zeros(1, dtype=torch.int64) if method == "decode" else inputs[0]
        self.rows.append(int((positions >= 0).sum()))
        rows = zip(slots.tolist(), positions.tolist(), ids.tolist(), strict=True)
        return [torch.tensor([[self._next(*row) if row[1] >= 0 else 0] for row in rows])]

    def _next(self, slot: int, first: int, ids: list[int]) -> int:
        cache = self._slots[slot]
        assert first <= len(cache), "a position was left out"
        cache[first:] = ids
        # The tokens of this tokenizer are bytes.
        prompt, marker, answered = bytes(min(token, 255) for token in cache).rpartition(b"[assistant]")
        rest = reply((prompt + marker).decode(errors="replace")).encode()[len(answered) :]
        return rest[0] if rest else EOS


def load(seconds: float = 0.0) -> TextGenerator:
    """A generator of its own."""
    program = BatchScript(seconds)
    return TextGenerator(program, read_tokenizer(resolve("tiny") / "tokenizer.json"), 64)  # type: ignore[arg-type]


if __name__ == "__main__":  # SECONDS_PER_CALL SESSIONS
    serve_batch(lambda: load(float(sys.argv[1])), int(sys.argv[2]))
