"""Text from an exported model: prompt checks, prefill, the decode loop, and how long each took."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .pipeline import tokenizer_path

if TYPE_CHECKING:
    from executorch_moe.backends.runtime import LoadedProgram

METHODS = ("prefill", "decode")
WARMUP_DECODE_STEPS = 4
"""ExecuTorch captures a CUDA graph on the fourth call of a method; what comes before is slower and is not counted."""


@dataclass
class Generation:
    """Tokens of one run and the time they took."""

    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    stopped_by: str = ""

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second, up to and including the first new token."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else float("nan")

    @property
    def decode_rate(self) -> float:
        """New tokens a second, the first not counted: it comes out of prefill."""
        steps = len(self.tokens) - 1
        return steps / self.decode_seconds if steps > 0 and self.decode_seconds else float("nan")


class Sampler:
    """Picks a token from logits fp32 [1, V]: the likeliest at temperature 0, else at random with a seed of its own."""

    def __init__(self, temperature: float = 0.0, seed: int = 0) -> None:
        if not 0.0 <= temperature < float("inf"):
            raise ValueError(f"temperature={temperature} must be 0 (always the likeliest token) or above: try 0.8")
        self.temperature = temperature
        self.random = torch.Generator().manual_seed(seed)

    def __call__(self, logits: Tensor) -> int:
        if self.temperature == 0.0:
            return int(logits[0].argmax())
        probabilities = (logits[0].float().cpu() / self.temperature).softmax(-1)
        return int(torch.multinomial(probabilities, 1, generator=self.random))


class TextGenerator:
    """An exported causal language model with its tokenizer."""

    def __init__(self, program: LoadedProgram, tokenizer: Any) -> None:
        """Wraps a loaded program and a `tokenizers.Tokenizer`.

        Raises:
            ValueError: the program was not exported by `executorch-moe export`.
        """
        missing = [name for name in METHODS if name not in program.method_names]
        if missing:
            raise ValueError(
                f"the program has the methods {', '.join(program.method_names) or 'none'}, "
                f"but not {', '.join(missing)}: give a .pte that `executorch-moe export` made"
            )
        self.program = program
        self.tokenizer = tokenizer
        self.max_context = int(program.constant("get_max_context_len"))
        self.vocabulary = int(program.constant("get_vocab_size"))
        eos = program.constant("get_eos_ids")
        self.eos_ids = frozenset(int(token) for token in (eos if isinstance(eos, (list, tuple)) else [eos]))

    @classmethod
    def load(cls, pte: Path, runtime: str = "auto") -> TextGenerator:
        """Opens NAME.pte with NAME.ptd and NAME.tokenizer.json beside it.

        Raises:
            FileNotFoundError: one of the three files is missing.
            ValueError: a file is damaged or belongs to something else, or the runtime cannot run it here.
        """
        from executorch_moe.backends.runtime import load

        if not pte.is_file():
            raise FileNotFoundError(
                f"artifact={str(pte)!r} is not a file: give the .pte that `executorch-moe export` made"
            )
        tokenizer = read_tokenizer(tokenizer_path(pte))
        return cls(load(pte, runtime=runtime), tokenizer)

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt.

        Raises:
            ValueError: an empty prompt, or a token that the model does not have.
        """
        ids: list[int] = self.tokenizer.encode(prompt).ids
        if not ids:
            raise ValueError(f"prompt={prompt!r} has no tokens: give at least one character")
        if max(ids) >= self.vocabulary:
            raise ValueError(
                f"the prompt has token {max(ids)} but the model's vocabulary ends at {self.vocabulary - 1}: "
                "the tokenizer beside the artifact belongs to another model; export it again"
            )
        return ids

    def check_length(self, prompt_tokens: int, max_new_tokens: int | None) -> int:
        """How many tokens may be generated: `max_new_tokens`, or what fits into the cache if it is None (128 at most).

        Raises:
            ValueError: the prompt or the tokens asked for do not fit into the exported cache.
        """
        # The last new token is never fed back, so it needs no place in the cache.
        room = self.max_context - prompt_tokens + 1
        if prompt_tokens > self.max_context:
            raise ValueError(
                f"the prompt has {prompt_tokens} tokens but the model was exported with "
                f"max_context={self.max_context}: "
                f"shorten the prompt, or export again with --max-context {prompt_tokens + (max_new_tokens or 128)}"
            )
        if max_new_tokens is None:
            return min(128, room)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
        if max_new_tokens > room:
            raise ValueError(
                f"max_new_tokens={max_new_tokens} after a prompt of {prompt_tokens} tokens do not fit into "
                f"max_context={self.max_context}: ask for {room} at most, or export again with a larger --max-context"
            )
        return max_new_tokens

    def generate(
        self,
        prompt_ids: list[int],
        max_new_tokens: int | None = None,
        sampler: Sampler | None = None,
        on_token: Callable[[int], None] | None = None,
        ignore_eos: bool = False,
    ) -> Generation:
        """Generates from an empty cache and times it; each pick of a token waits for the device, so the times are real.

        Args:
            prompt_ids: token ids, at least one.
            max_new_tokens: None takes what fits, 128 at most.
            sampler: greedy by default.
            on_token: called with each new token; its time is not counted.
            ignore_eos: go on after an end-of-text token, for benchmarks.

        Raises:
            ValueError: nothing to start from, or more tokens than the exported cache holds; the runtime is not called.
        """
        if not prompt_ids:
            raise ValueError("prompt_ids is empty: give at least one token")
        limit = self.check_length(len(prompt_ids), max_new_tokens)
        sampler = sampler or Sampler()
        result = Generation(prompt_tokens=len(prompt_ids))
        self.program.reset()

        start = time.perf_counter()
        token = sampler(self._run(prompt_ids, 0))
        result.prefill_seconds = time.perf_counter() - start
        while True:
            result.tokens.append(token)
            if on_token is not None:
                on_token(token)
            if token in self.eos_ids and not ignore_eos:
                result.stopped_by = "end of text"
                return result
            if len(result.tokens) == limit:
                result.stopped_by = "max_new_tokens" if max_new_tokens is not None else f"length {limit}"
                return result
            start = time.perf_counter()
            token = sampler(self._run([token], len(prompt_ids) + len(result.tokens) - 1))
            result.decode_seconds += time.perf_counter() - start

    def warm_up(self, prompt_tokens: int) -> None:
        """Runs both methods at the size to come, so that one-time costs are not in the times."""
        steps = min(WARMUP_DECODE_STEPS + 1, self.max_context - prompt_tokens + 1)
        self.generate([0] * prompt_tokens, steps, ignore_eos=True)

    def _run(self, ids: list[int], position: int) -> Tensor:
        """Logits fp32 [1, V] after `ids`, the first of which stands at `position`."""
        device = self.program.device
        input_ids = torch.tensor([ids], dtype=torch.int64, device=device)
        cache_position = torch.arange(position, position + len(ids), dtype=torch.int64, device=device)
        # prefill was exported for 2 tokens and more.
        return self.program.run("prefill" if len(ids) > 1 else "decode", input_ids, cache_position)[0]


def read_tokenizer(path: Path) -> Any:
    """A `tokenizers.Tokenizer` from a tokenizer.json.

    Raises:
        FileNotFoundError: no such file.
        ModuleNotFoundError: the tokenizers package is missing.
        ValueError: the file is not a tokenizer.
    """
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "tokenizers is not installed: text needs it; pip install 'executorch-moe[hf]'"
        ) from None
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: copy it beside the .pte (an export writes .pte, .ptd and .tokenizer.json)"
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the bindings raise plain Exception
        raise ValueError(f"{path} is not a tokenizer ({error}): export the model again") from None


class TextStream:
    """Turns tokens into text as they come; holds back bytes of a character that is not whole yet."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        # Tokens before `start` are settled; those up to `shown` are on the screen and give the next ones their context.
        self.start = 0
        self.shown = 0

    def push(self, token: int) -> str:
        """The new text that `token` completes, often a part of a word, sometimes nothing yet."""
        self.ids.append(token)
        before, after = self._decode(self.ids[self.start : self.shown]), self._decode(self.ids[self.start :])
        # A character has at most four bytes: after that, the bytes are simply not UTF-8.
        if after.endswith("\ufffd") and len(self.ids) - self.shown < 4:
            return ""
        self.start, self.shown = self.shown, len(self.ids)
        return after[len(before) :]

    def end(self) -> str:
        """What was held back."""
        before, after = self._decode(self.ids[self.start : self.shown]), self._decode(self.ids[self.start :])
        return after[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text
