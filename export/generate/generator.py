"""Generates text with an exported model: prompt checks, prefill and the decode loop, with times."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from executorch_moe.backends.artifact.digests import COPY_AGAIN
from executorch_moe.backends.errors import said_in_one_line
from executorch_moe.backends.runtime.loader import BATCH_METHOD, MAX_BATCH, RECURRENT
from executorch_moe.export.build import made_again
from executorch_moe.export.models.causal_lm import BY_OUTPUT
from executorch_moe.export.models.sampling import Sampler
from executorch_moe.export.report.metadata import (
    MADE_FROM,
    MODEL_LIMIT,
    TOKENIZER_SUFFIX,
    read_made_from,
)

from .text_stream import TextStream as TextStream
from .tokenizer_file import check_exists, check_tokenizer, read_tokenizer

if TYPE_CHECKING:
    from executorch_moe.backends.artifact.ptd import MakeWeights
    from executorch_moe.backends.artifact.pte import PteFile
    from executorch_moe.backends.runtime.loader import LoadedProgram

METHODS = ("prefill", "decode")
WARMUP_DECODE_STEPS = 4
"""ExecuTorch captures a CUDA graph on the fourth call of a method; earlier calls are slower and are not measured."""

Pick = Callable[[Tensor, int], Tensor]
"""(input_ids int64 [1, T], position of the first) -> the next token, int64 [1, 1], both on the device."""


@dataclass
class Generation:
    """Tokens of one run and their times.

    Attributes:
        prompt_tokens: length of the prompt.
        tokens: new token ids.
        prefill_seconds: time to the first new token. decode_seconds: time of all others.
        stopped_by: "end of text", "max_new_tokens", or "length N" if the default limit was reached.
    """

    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    stopped_by: str = ""

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second; the time includes the first new token."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else float("nan")

    @property
    def decode_rate(self) -> float:
        """New tokens per second without the first, which prefill returns."""
        steps = len(self.tokens) - 1
        return steps / self.decode_seconds if steps > 0 and self.decode_seconds else float("nan")


class TextGenerator:
    """An exported causal language model with its tokenizer."""

    def __init__(self, program: LoadedProgram, tokenizer: Any, prefill_chunk: int | None = None) -> None:
        """Wraps a loaded program and a `tokenizers.Tokenizer`.

        Args:
            program: a program of `executorch-moe export`.
            tokenizer: its tokenizer.
            prefill_chunk: most prompt tokens in one call of prefill; None: the whole prompt.

        Raises:
            ValueError: another program, or a chunk below 1 or over the cache.
        """
        missing = [name for name in METHODS if name not in program.method_names]
        if missing:
            raise ValueError(
                f"the program has the methods {', '.join(program.method_names) or 'none'}, "
                f"but not {', '.join(missing)}: pass a .pte that `executorch-moe export` made"
            )
        self.program = program
        self.tokenizer = tokenizer
        self.prefill_chunk = prefill_chunk
        self.load_seconds: float | None = None  # time of `load`, weights included
        # Artifacts of older versions lack this method; their methods return logits.
        says = "get_method_output" in program.constant_names
        self.output = str(program.constant("get_method_output")) if says else "logits"
        if self.output not in BY_OUTPUT:
            raise ValueError(
                f"the program's methods return {self.output!r}, this version of the package runs "
                f"{', '.join(BY_OUTPUT)}: install a newer executorch-moe, or export it again"
            )
        self.max_context = int(program.constant("get_max_context_len"))
        check_chunk(prefill_chunk, self.max_context)
        limited = MODEL_LIMIT in program.constant_names
        self.model_limit = int(program.constant(MODEL_LIMIT)) if limited else None
        self.vocabulary = int(program.constant("get_vocab_size"))
        self.can_rewind = RECURRENT not in program.constant_names
        self.max_batch = int(program.constant(MAX_BATCH)) if MAX_BATCH in program.constant_names else 1
        eos = program.constant("get_eos_ids")
        self.eos_ids = frozenset(int(token) for token in (eos if isinstance(eos, (list, tuple)) else [eos]))

    @classmethod
    def load(
        cls,
        pte: Path,
        runtime: str = "auto",
        *,
        cuda_graph: bool = False,
        prefill_chunk: int | None = None,
        verify: bool = True,
    ) -> TextGenerator:
        """Loads NAME.pte with NAME.ptd and NAME.tokenizer.json, which must be in the same folder.

        Args:
            pte: path of the .pte, with or without the suffix.
            runtime: as for `executorch_moe.backends.runtime.loader.load`.
            cuda_graph: replay decode, for one sequence and for several, as a CUDA graph.
            prefill_chunk: see `__init__`.
            verify: as for `executorch_moe.backends.runtime.loader.load`.

        Raises:
            FileNotFoundError: one of the three files is missing.
            ValueError: a file is damaged or belongs to another export, or no runtime on this machine can run it.
        """
        from executorch_moe.backends.artifact.files import companion
        from executorch_moe.backends.artifact.pte import PteFile
        from executorch_moe.backends.runtime.loader import load

        begin, pte = time.perf_counter(), pte_path(pte)
        if not pte.is_file():
            raise FileNotFoundError(
                f"artifact={str(pte)!r} is not a file: give the .pte that `executorch-moe export` made"
            )
        beside = companion(pte, TOKENIZER_SUFFIX)
        check_exists(beside)
        opened = PteFile(pte, verify=verify)
        check_tokenizer(opened, beside)
        tokenizer = read_tokenizer(beside)
        if "get_max_context_len" in opened.constant_names:
            check_chunk(prefill_chunk, int(opened.constant("get_max_context_len")))  # before weights are loaded
        batched = (BATCH_METHOD,) if MAX_BATCH in opened.constant_names else ()
        graphs = ("decode", *batched) if cuda_graph else ()
        program = load(opened, runtime=runtime, cuda_graph=graphs, make_weights=synthetic_weights, verify=verify)
        with said_in_one_line(f"{pte} cannot be used", COPY_AGAIN, ValueError):
            generator = cls(program, tokenizer, prefill_chunk)
        generator.load_seconds = time.perf_counter() - begin
        return generator

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt.

        Raises:
            ValueError: a prompt that is empty or not valid UTF-8, or a token outside the model's vocabulary.
        """
        check_text(prompt)
        ids: list[int] = self.tokenizer.encode(prompt).ids
        if not ids:
            raise ValueError(f"prompt={prompt!r} has no tokens: pass at least one character")
        if max(ids) >= self.vocabulary:
            raise ValueError(
                f"the prompt has token {max(ids)} but the model's vocabulary ends at {self.vocabulary - 1}: "
                "the tokenizer beside the artifact belongs to another model; export it again"
            )
        return ids

    def check_length(self, prompt_tokens: int, max_new_tokens: int | None) -> int:
        """Number of tokens to generate: `max_new_tokens`, or if None, as many as fit into the cache, 128 at most.

        Raises:
            ValueError: the prompt or the new tokens do not fit into the exported cache.
        """
        # The last new token is not an input of another call, so it needs no position in the cache.
        room = self.max_context - prompt_tokens + 1
        if prompt_tokens > self.max_context:
            raise ValueError(
                f"the prompt has {prompt_tokens} tokens but the model was exported with "
                f"max_context={self.max_context}: shorten the prompt{self._longer()}"
            )
        if max_new_tokens is None:
            return min(128, room)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
        if max_new_tokens > room:
            raise ValueError(
                f"max_new_tokens={max_new_tokens} after a prompt of {prompt_tokens} tokens do not fit into "
                f"max_context={self.max_context}: ask for {room} at most{self._longer()}"
            )
        return max_new_tokens

    def _longer(self) -> str:
        """The remedy of a longer cache, unless the model has no more positions."""
        if self.model_limit is None:  # artifacts exported by earlier versions
            return ", or export again with a larger --max-context, up to the model's own limit"
        if self.model_limit <= self.max_context:
            return ", the model has no more positions"
        return f", or export again with a larger --max-context, up to the model's limit of {self.model_limit}"

    def generate(
        self,
        prompt_ids: list[int],
        max_new_tokens: int | None = None,
        sampler: Sampler | None = None,
        on_token: Callable[[int], bool | None] | None = None,
        ignore_eos: bool = False,
    ) -> Generation:
        """Generates tokens after a prompt, from an empty cache, and measures the time.

        The host waits for the token of prefill. In decode it waits for each token, to compare it with the end-of-text
        tokens and call `on_token`. With `ignore_eos` and without `on_token`, tokens stay on the device, each the input
        of the next call, and the host waits for the last one only.

        Args:
            prompt_ids: token ids, at least one.
            max_new_tokens: see `check_length`.
            sampler: sampling settings; None: greedy.
            on_token: called with each new token, may return True to stop; its time is not counted.
            ignore_eos: continue after an end-of-text token, for benchmarks.

        Raises:
            ValueError: an empty prompt, or more tokens than fit into the exported cache; nothing is run.
        """
        if not prompt_ids:
            raise ValueError("prompt_ids is empty: pass at least one token")
        limit = self.check_length(len(prompt_ids), max_new_tokens)
        result = Generation(prompt_tokens=len(prompt_ids))
        tokens = self.stream(prompt_ids, sampler)
        start = time.perf_counter()
        token = int(next(tokens))
        result.prefill_seconds = time.perf_counter() - start
        if ignore_eos and on_token is None:
            start = time.perf_counter()
            rest = [next(tokens) for _ in range(limit - 1)]
            result.tokens = [token, *(torch.cat(rest).flatten().tolist() if rest else [])]
            result.decode_seconds = time.perf_counter() - start
            result.stopped_by = "max_new_tokens"
            return result
        while True:
            result.tokens.append(token)
            if on_token is not None and on_token(token):
                result.stopped_by = "a stop text"
                return result
            if token in self.eos_ids and not ignore_eos:
                result.stopped_by = "end of text"
                return result
            if len(result.tokens) == limit:
                result.stopped_by = "max_new_tokens" if max_new_tokens is not None else f"length {limit}"
                return result
            start = time.perf_counter()
            token = int(next(tokens))
            result.decode_seconds += time.perf_counter() - start

    def stream(self, prompt_ids: list[int], sampler: Sampler | None = None) -> Iterator[Tensor]:
        """Tokens after a prompt, int64 [1, 1] on the device, from its first token on; each `next` generates one.

        The caller must not generate more tokens than `check_length` allows.
        """
        # A text reads only what it wrote. Slots have no recurrent state, and clearing all takes a second on a GPU.
        if self.max_batch == 1:
            self.program.reset()
        return self._tokens(prompt_ids, self._picker(sampler or Sampler()))

    def resume(
        self,
        prompt_ids: list[int],
        sampler: Sampler | None = None,
        cached: int = 0,
        before_chunk: Callable[[int], None] | None = None,
    ) -> Iterator[Tensor]:
        """Tokens after a prompt, int64 [1, 1] on the device, without a reset; each `next` generates one.

        Args:
            prompt_ids: the whole prompt.
            sampler: sampling settings; None: greedy.
            cached: number of its first tokens whose state earlier calls left, less than its length. A model that
                cannot rewind (`can_rewind`) must have computed exactly these, or 0.
            before_chunk: called with the number of computed tokens before each call of prefill; it may raise to stop.
        """
        return self._tokens(prompt_ids, self._picker(sampler or Sampler()), cached, before_chunk)

    def _tokens(
        self, prompt_ids: list[int], pick: Pick, cached: int = 0, before_chunk: Callable[[int], None] | None = None
    ) -> Iterator[Tensor]:
        chunk = self.prefill_chunk or len(prompt_ids)
        ids = torch.tensor([prompt_ids], dtype=torch.int64, device=self.program.device)
        for start in range(cached, len(prompt_ids), chunk):
            if before_chunk is not None:
                before_chunk(start)
            token = pick(ids[:, start : start + chunk], start)
        for position in itertools.count(len(prompt_ids)):
            yield token
            token = pick(token, position)

    def warm_up(self, prompt_tokens: int) -> None:
        """Runs both methods with a prompt of this length, so that later times exclude one-time costs."""
        steps = min(WARMUP_DECODE_STEPS + 1, self.max_context - prompt_tokens + 1)
        self.generate([0] * prompt_tokens, steps, ignore_eos=True)

    def check_sampler(self, sampler: Sampler) -> None:
        """Checks settings.

        Raises:
            ValueError: settings that the artifact does not have.
        """
        if self.output == "greedy" and sampler.temperature > 0:
            raise ValueError(
                f"temperature={sampler.temperature} does not apply to this artifact, which always returns the "
                "likeliest token: omit it, or export with --output token"
            )
        if self.output != "logits" and sampler.top_k > 1:
            raise ValueError(
                f"top_k={sampler.top_k} does not apply to this artifact, which picks tokens on the device without it: "
                "omit it, use top_p, or export with --output logits"
            )
        if self.output == "engine" and sampler.top_p < 1:
            raise ValueError(
                f"top_p={sampler.top_p} does not apply to this artifact, which draws from all tokens: omit it, or "
                "export with --output token"
            )

    def _picker(self, sampler: Sampler) -> Pick:
        """Binds sampling settings to a function from input ids to the next token; see `check_sampler`."""
        device = self.program.device
        settings = sampler.inputs(device)[: BY_OUTPUT[self.output].settings]
        self.check_sampler(sampler)

        first_slot = (torch.zeros(1, dtype=torch.int64, device=device),) if self.max_batch > 1 else ()

        def pick(input_ids: Tensor, position: int) -> Tensor:
            end = position + input_ids.shape[1]
            cache_position = torch.arange(position, end, dtype=torch.int64, device=device)
            # decode is faster, and prefill of older exports needs two tokens.
            method = "prefill" if input_ids.shape[1] > 1 else "decode"
            slot = first_slot if method == "prefill" else ()
            (out,) = self.program.run(method, input_ids, cache_position, *slot, *settings)
            if self.output == "logits":
                return torch.tensor([[sampler(out, end)]], device=device)
            return out.to(torch.int64) if self.output == "engine" else out

        return pick


def check_chunk(prefill_chunk: int | None, max_context: int) -> None:
    """Checks the largest number of prompt tokens in a call; None is no limit.

    Raises:
        ValueError: it is below 1, or over the number of positions in the cache.
    """
    if prefill_chunk is not None and prefill_chunk < 1:
        raise ValueError(f"prefill_chunk={prefill_chunk} must be at least 1: try 512")
    if prefill_chunk is not None and prefill_chunk > max_context:
        raise ValueError(
            f"prefill_chunk={prefill_chunk} is more than the artifact's max_context={max_context}: leave it out, or "
            f"use {max_context} at most"
        )


def pte_path(artifact: Path) -> Path:
    """Path of the .pte of an artifact that is named with or without the suffix."""
    from executorch_moe.backends.artifact.files import artifact_paths

    return artifact if artifact.is_file() else artifact_paths(artifact).pte


def check_text(prompt: str) -> None:
    """Checks that a prompt is valid Unicode: Python turns invalid UTF-8 of a command line into lone surrogates.

    Raises:
        ValueError: a lone surrogate.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"prompt={prompt!r} is not valid UTF-8 at character {error.start}: give the text in UTF-8"
        ) from None


def synthetic_weights(program: PteFile, device: torch.device) -> MakeWeights | None:
    """Function that generates the weights of a synthetic model exported without them; None for other artifacts."""
    if MADE_FROM not in program.constant_names:
        return None
    with said_in_one_line(f"{MADE_FROM} of the artifact cannot be read", COPY_AGAIN, ValueError):
        options = read_made_from(program.constant(MADE_FROM))
    return made_again(options, device)
