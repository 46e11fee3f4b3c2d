"""Prompt checks, sampling, the decode loop and text streaming, on a stand-in for the runtime."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from executorch_moe.export.generation import Sampler, TextGenerator, TextStream, read_tokenizer
from executorch_moe.export.pretrained import resolve

EOS = 257


class CountingProgram:
    """Answers with the token that follows the last one given; keeps every call."""

    runtime = "stand-in"
    device = torch.device("cpu")
    method_names = ("prefill", "decode")

    def __init__(self, max_context: int = 16, **constants: Any) -> None:
        self.constants = {"get_max_context_len": max_context, "get_vocab_size": 264, "get_eos_ids": [EOS], **constants}
        self.calls: list[tuple[str, list[int], list[int]]] = []

    def constant(self, name: str) -> Any:
        return self.constants[name]

    def run(self, method: str, input_ids: torch.Tensor, cache_position: torch.Tensor) -> list[torch.Tensor]:
        self.calls.append((method, input_ids[0].tolist(), cache_position.tolist()))
        logits = torch.zeros(1, 264)
        logits[0, int(input_ids[0, -1]) + 1] = 5.0
        return [logits]

    def reset(self) -> None:
        self.calls.append(("reset", [], []))


@pytest.fixture
def tokenizer() -> Tokenizer:
    return read_tokenizer(resolve("tiny") / "tokenizer.json")


def make(tokenizer: Tokenizer, **constants: Any) -> tuple[TextGenerator, CountingProgram]:
    program = CountingProgram(**constants)
    return TextGenerator(program, tokenizer), program  # type: ignore[arg-type]


def test_prompt_at_once_then_token_by_token(tokenizer: Tokenizer) -> None:
    generator, program = make(tokenizer)
    result = generator.generate([10, 20, 30], 4)
    assert result.tokens == [31, 32, 33, 34] and result.stopped_by == "max_new_tokens"
    assert program.calls == [
        ("reset", [], []),
        ("prefill", [10, 20, 30], [0, 1, 2]),
        ("decode", [31], [3]),
        ("decode", [32], [4]),
        ("decode", [33], [5]),
    ]


def test_one_token_prompt_goes_through_decode(tokenizer: Tokenizer) -> None:
    generator, program = make(tokenizer)
    generator.generate([10], 2)
    assert [call[0] for call in program.calls] == ["reset", "decode", "decode"]


def test_stops_at_end_of_text(tokenizer: Tokenizer) -> None:
    generator, _ = make(tokenizer)
    result = generator.generate([EOS - 3], 10)
    assert result.tokens == [EOS - 2, EOS - 1, EOS] and result.stopped_by == "end of text"
    assert len(generator.generate([EOS - 3], 5, ignore_eos=True).tokens) == 5


def test_one_end_of_text_id_may_be_a_number(tokenizer: Tokenizer) -> None:
    generator, _ = make(tokenizer, get_eos_ids=EOS)
    assert generator.eos_ids == {EOS}


@pytest.mark.parametrize(
    ("prompt", "new", "message"),
    [
        (17, None, "the prompt has 17 tokens but the model was exported with max_context=16: shorten"),
        (16, 2, "max_new_tokens=2 after a prompt of 16 tokens .* ask for 1 at most"),
        (1, 17, "ask for 16 at most"),
        (4, 0, "max_new_tokens=0 must be at least 1"),
        (0, 4, "prompt_ids is empty"),
    ],
)
def test_lengths_are_refused_before_the_runtime_is_called(
    tokenizer: Tokenizer, prompt: int, new: int | None, message: str
) -> None:
    generator, program = make(tokenizer)
    with pytest.raises(ValueError, match=message):
        generator.generate([40] * prompt, new)
    assert program.calls == []


@pytest.mark.parametrize(("prompt", "new"), [(16, 1), (1, 16), (8, 9)])
def test_no_call_writes_beyond_the_cache(tokenizer: Tokenizer, prompt: int, new: int) -> None:
    generator, program = make(tokenizer)
    assert len(generator.generate([40] * prompt, new).tokens) == new
    assert max(position for _, _, positions in program.calls for position in positions) == 15
    assert len(generator.generate([40] * prompt).tokens) == new  # the default is what fits


def test_speed_counts_prompt_and_further_tokens(tokenizer: Tokenizer) -> None:
    generator, _ = make(tokenizer)
    result = generator.generate([40] * 4, 5)
    assert result.prefill_rate == pytest.approx(4 / result.prefill_seconds)
    assert result.decode_rate == pytest.approx(4 / result.decode_seconds)


def test_a_foreign_program(tokenizer: Tokenizer) -> None:
    program = CountingProgram()
    program.method_names = ("forward",)  # type: ignore[assignment]
    with pytest.raises(ValueError, match="has the methods forward, but not prefill, decode"):
        TextGenerator(program, tokenizer)  # type: ignore[arg-type]


def test_empty_prompt_and_foreign_tokenizer(tokenizer: Tokenizer) -> None:
    generator, _ = make(tokenizer)
    with pytest.raises(ValueError, match="prompt='' has no tokens"):
        generator.encode("")
    generator, _ = make(tokenizer, get_vocab_size=100)
    with pytest.raises(ValueError, match="token 122 but the model's vocabulary ends at 99"):
        generator.encode("z")


def test_greedy_takes_the_likeliest_and_sampling_repeats_with_its_seed() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    assert Sampler()(logits) == 1
    draws = [Sampler(1.0, seed)(logits) for seed in range(200)]
    assert draws == [Sampler(1.0, seed)(logits) for seed in range(200)]
    # softmax(3, 1, 0) = 0.84, 0.11, 0.04
    assert 140 <= draws.count(1) <= 190 and set(draws) == {0, 1, 2}


@pytest.mark.parametrize("temperature", [-1.0, float("nan"), float("inf")])
def test_temperature_out_of_range(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature="):
        Sampler(temperature)


@pytest.mark.parametrize("text", ["plain", "naïve café", "emoji 😀 and 中文", "tab\tnew\nline  spaces"])
def test_streaming_gives_whole_characters_and_the_whole_text(tokenizer: Tokenizer, text: str) -> None:
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer.encode(text).ids]
    assert "".join(pieces) + stream.end() == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_streaming_does_not_hold_back_bytes_that_are_no_text(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    shown = "".join(stream.push(token) for token in [0xFF, 0xFE, 0xFF, 0xFE, ord("a"), ord("b")]) + stream.end()
    assert shown.endswith("ab") and "\ufffd" in shown


def test_missing_and_broken_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "x.tokenizer.json"
    with pytest.raises(FileNotFoundError, match=r"x\.tokenizer\.json is missing: copy it beside the \.pte"):
        read_tokenizer(path)
    path.write_text('{"version": ')
    with pytest.raises(ValueError, match="is not a tokenizer"):
        read_tokenizer(path)
    shutil.copy(resolve("tiny") / "tokenizer.json", path)
    assert read_tokenizer(path).encode("a").ids == [97]
