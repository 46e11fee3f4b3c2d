"""One request of the worker: its fields, its tokens, and the loop that generates text until something stops it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from executorch_moe.export.generate.generator import TextGenerator, check_text
from executorch_moe.export.generate.stop_text import StopText
from executorch_moe.export.generate.text_stream import TextStream
from executorch_moe.export.models.sampling import Sampler, fresh_seed

from .sessions import State


class RequestError(Exception):
    """A request that cannot be answered; the worker goes on.

    Attributes:
        code: for the protocol; None: no code.
    """

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


class Canceled(Exception):
    """The server asked to stop this request."""


@dataclass(frozen=True)
class Turn:
    """A checked `generate` request.

    Attributes:
        prompt_ids: at least one.
        limit: most new tokens.
        sampler: temperature, top-p, top-k and seed.
        stop: texts that end the answer.
        show_special: the answer has the text of special tokens.
    """

    prompt_ids: list[int]
    limit: int
    sampler: Sampler
    stop: tuple[str, ...] = ()
    show_special: bool = True


def read_turn(request: Mapping[str, Any], generator: TextGenerator) -> Turn:
    """Checks a request of the protocol.

    Raises:
        RequestError: a field that is missing or not what it should be, or a prompt that does not fit.
    """
    try:
        ids = _prompt_ids(request, generator)
        temperature, top_p = float(request.get("temperature", 0.0)), float(request.get("top_p", 1.0))
        top_k = int(request.get("top_k", 0))
        seed = int(request.get("seed", 0)) or (fresh_seed() if temperature > 0 else 0)
        sampler = Sampler(temperature, seed, top_p, top_k)
        wanted = int(request.get("max_new_tokens", -1))
        generator.check_sampler(sampler)
        stop = request.get("stop") or []
        if not isinstance(stop, list) or not all(isinstance(text, str) for text in stop):
            raise ValueError("stop must be a list of texts")
    except (TypeError, ValueError) as error:
        raise RequestError(str(error)) from None
    room = generator.max_context - len(ids) + 1
    if room < 1:
        raise RequestError(
            f"the prompt has {len(ids)} tokens, but the model's context has {generator.max_context}",
            "context_length_exceeded",
        )
    return Turn(ids, room if wanted < 1 else min(wanted, room), sampler, tuple(text for text in stop if text))


def _prompt_ids(request: Mapping[str, Any], generator: TextGenerator) -> list[int]:
    """Token ids of `prompt`, or of `prompt_segments`: {"text": ...} and {"ids": [...]} in turn."""
    segments = request.get("prompt_segments")
    if segments is None:
        segments = [{"text": request.get("prompt")}]
    if not isinstance(segments, list) or not segments:
        raise ValueError("prompt_segments must be a list with at least one segment")
    ids: list[int] = []
    for segment in segments:
        if not isinstance(segment, dict):
            raise ValueError("a segment must be an object with text or ids")
        if "ids" in segment:
            ids += [int(token) for token in segment["ids"]]
            continue
        if not isinstance(text := segment.get("text"), str):
            raise ValueError("the prompt must be text")
        check_text(text)
        # A chat template has the special tokens already.
        ids += generator.tokenizer.encode(text, add_special_tokens=False).ids
    if not ids:
        raise ValueError("the prompt has no tokens: give at least one character")
    if not 0 <= min(ids) <= max(ids) < generator.vocabulary:
        raise ValueError(f"the prompt has tokens outside the vocabulary of {generator.vocabulary}")
    return ids


def run_turn(
    state: State,
    generator: TextGenerator,
    turn: Turn,
    emit: Callable[[str], None],
    canceled: Callable[[], bool],
) -> dict[str, Any]:
    """Generates an answer and updates the tokens in the state.

    Args:
        state: lent to this request. generator: its program.
        emit: called with each piece of text, never empty.
        canceled: asked before each call of the program.

    Returns:
        The fields of the protocol's `done` message.
    """
    cached, reason = state.reusable(turn.prompt_ids)
    resident, state.resident = state.resident[:cached], []  # an error leaves nothing to resume
    done: dict[str, Any] = {"finish_reason": "length", "cancelled": False}
    answer: list[int] = []
    # ExecuTorch's server cuts special tokens out, after it has looked for tool calls, which may be some.
    text = StopText(TextStream(generator.tokenizer, show_special=turn.show_special), turn.stop)
    start = prefilled = time.perf_counter()

    def check(position: int) -> None:
        resident[:] = turn.prompt_ids[:position]
        if canceled():
            raise Canceled

    try:
        tokens = generator.resume(turn.prompt_ids, turn.sampler, cached, check)
        token = int(next(tokens))
        prefilled = time.perf_counter()
        resident[:] = turn.prompt_ids
        while True:
            if token in generator.eos_ids:
                done["finish_reason"] = "stop"
                break
            answer.append(token)
            if piece := text.push(token):
                emit(piece)
            if text.stopped:
                done["finish_reason"] = "stop"
                break
            if len(answer) >= turn.limit:
                break
            if canceled():
                raise Canceled
            following = int(next(tokens))
            resident.append(token)
            token = following
    except Canceled:
        done["cancelled"] = True
    if piece := text.end():
        emit(piece)
    # The stream may have been asked for one token more than it computed; what is in the cache is what was fed.
    state.resident = resident
    times = start, prefilled, time.perf_counter()
    return {
        **done,
        **counts(turn, answer, cached, reason, times),
        # Without ids the server renders the text of this answer again: a stop text may end within a token.
        **({} if text.stopped or done["cancelled"] else {"generated_token_ids": answer}),
    }


def counts(
    turn: Turn, answer: list[int], cached: int, reason: str, times: tuple[float, float, float]
) -> dict[str, Any]:
    """Counts and rates of the protocol's `done` message.

    Args:
        answer: new tokens. cached: tokens of the prompt that were not computed, for `reason` (`State.reusable`).
        times: of start, first new token and end, seconds.
    """
    start, prefilled, end = times
    prompt_ms, decode_ms = 1e3 * (prefilled - start), 1e3 * (end - prefilled)
    computed = len(turn.prompt_ids) - cached
    return {
        "prompt_tokens": len(turn.prompt_ids),
        "completion_tokens": len(answer),
        "reused_prompt_tokens": cached,
        "prefilled_prompt_tokens": computed,
        "session_reset_reason": reason,
        "prefill_ms": prompt_ms,
        "decode_ms": decode_ms,
        "total_ms": prompt_ms + decode_ms,
        "prefill_tok_s": 1e3 * computed / prompt_ms if prompt_ms else 0.0,
        "decode_tok_s": 1e3 * max(len(answer) - 1, 0) / decode_ms if decode_ms else 0.0,
    }
