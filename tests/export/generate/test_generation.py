"""Prompt checks, sampling, the decode loop and text streaming, with a fake runtime."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from executorch_moe.export.generate.generator import TextGenerator, TextStream, pte_path
from executorch_moe.export.generate.tokenizer_file import read_tokenizer
from executorch_moe.export.models.pretrained import resolve
from executorch_moe.export.models.sampling import Sampler

EOS = 257


class CountingProgram:
    """A fake program that returns the token after the last input; records its calls."""

    runtime = "stand-in"
    device = torch.device("cpu")
    method_names = ("prefill", "decode")

    def __init__(self, max_context: int = 16, **constants: Any) -> None:
        self.constants = {"get_max_context_len": max_context, "get_vocab_size": 264, "get_eos_ids": [EOS], **constants}
        self.calls: list[tuple[str, list[int], list[int]]] = []

    @property
    def constant_names(self) -> list[str]:
        return list(self.constants)

    def constant(self, name: str) -> Any:
        return self.constants[name]

    def run(self, method: str, input_ids: torch.Tensor, cache_position: torch.Tensor) -> list[torch.Tensor]:
        self.calls.append((method, input_ids[0].tolist(), cache_position.tolist()))
        logits = torch.zeros(1, 264)
        logits[0, int(input_ids[0, -1]) + 1] = 5.0
        return [logits]

    def reset(self) -> None:
        self.calls.append(("reset", [], []))


class PickingProgram(CountingProgram):
    """The same for an artifact whose methods sample the token; records their settings."""

    def __init__(self, max_context: int = 16, **constants: Any) -> None:
        super().__init__(max_context, get_method_output="token", **constants)
        self.told: set[tuple[float, float, int]] = set()

    def run(  # type: ignore[override]
        self, method: str, input_ids: torch.Tensor, cache_position: torch.Tensor, *sampling: torch.Tensor
    ) -> list[torch.Tensor]:
        assert [tensor.dtype for tensor in sampling] == [torch.float32, torch.float32, torch.int64]
        assert all(tensor.shape == (1,) for tensor in sampling) and input_ids.dtype == torch.int64
        self.told.add(tuple(tensor.item() for tensor in sampling))  # type: ignore[arg-type]
        (logits,) = super().run(method, input_ids, cache_position)
        return [logits.argmax(-1, keepdim=True)]


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


@pytest.mark.parametrize("program", [CountingProgram(), PickingProgram()])
@pytest.mark.parametrize("looked_at", [False, True])
def test_tokens_are_the_same_wherever_they_are_picked_and_read(
    tokenizer: Tokenizer, program: CountingProgram, looked_at: bool
) -> None:
    program.calls.clear()
    seen: list[int] = []
    generator = TextGenerator(program, tokenizer)  # type: ignore[arg-type]
    result = generator.generate([10, 20], 4, ignore_eos=True, on_token=seen.append if looked_at else None)
    assert result.tokens == [21, 22, 23, 24] and (seen == result.tokens) == looked_at
    assert program.calls == [
        ("reset", [], []),
        ("prefill", [10, 20], [0, 1]),
        ("decode", [21], [2]),
        ("decode", [22], [3]),
        ("decode", [23], [4]),
    ]
    assert result.decode_seconds > 0 and result.stopped_by == "max_new_tokens"


def test_greedy_methods_take_no_settings(tokenizer: Tokenizer) -> None:
    class Greedy(CountingProgram):
        def run(self, *inputs: Any) -> list[torch.Tensor]:
            return [super().run(*inputs)[0].argmax(-1, keepdim=True)]

    program = Greedy(get_method_output="greedy")
    generator = TextGenerator(program, tokenizer)  # type: ignore[arg-type]
    assert generator.generate([10, 20], 3, ignore_eos=True).tokens == [21, 22, 23]
    with pytest.raises(ValueError, match=r"temperature=0\.5 does not apply to this artifact"):
        generator.generate([10, 20], 3, Sampler(0.5))


def test_methods_that_pick_are_told_how(tokenizer: Tokenizer) -> None:
    program = PickingProgram()
    TextGenerator(program, tokenizer).generate([10, 20], 3, Sampler(0.5, 7, 0.25))  # type: ignore[arg-type]
    assert program.told == {(0.5, 0.25, 7)}


@pytest.mark.parametrize(
    ("chunk", "calls"),
    [
        (2, [("prefill", [10, 20], [0, 1]), ("prefill", [30, 40], [2, 3]), ("decode", [50], [4])]),
        (3, [("prefill", [10, 20, 30], [0, 1, 2]), ("prefill", [40, 50], [3, 4])]),
        (1, [("decode", [10 * n], [n - 1]) for n in range(1, 6)]),
        (5, [("prefill", [10, 20, 30, 40, 50], [0, 1, 2, 3, 4])]),
        (16, [("prefill", [10, 20, 30, 40, 50], [0, 1, 2, 3, 4])]),
    ],
)
def test_a_prompt_in_chunks(tokenizer: Tokenizer, chunk: int, calls: list[tuple[str, list[int], list[int]]]) -> None:
    program = PickingProgram()
    generator = TextGenerator(program, tokenizer, prefill_chunk=chunk)  # type: ignore[arg-type]
    result = generator.generate([10, 20, 30, 40, 50], 2)
    assert result.tokens == [51, 52] and result.prompt_tokens == 5
    assert program.calls == [("reset", [], []), *calls, ("decode", [51], [5])]


def test_top_k_samples_from_logits_and_is_refused_where_methods_pick(tokenizer: Tokenizer) -> None:
    class Uniform(CountingProgram):
        def run(self, method: str, input_ids: torch.Tensor, cache_position: torch.Tensor) -> list[torch.Tensor]:
            return [torch.arange(264.0)[None] / 1000]

    drawn = TextGenerator(Uniform(64), tokenizer).generate([1], 60, Sampler(1.0, 3, top_k=4), ignore_eos=True)  # type: ignore[arg-type]
    assert set(drawn.tokens) == {260, 261, 262, 263}
    picking = TextGenerator(PickingProgram(), tokenizer)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="top_k=4 does not apply to this artifact, which picks tokens on the device"):
        picking.generate([1], 2, Sampler(top_k=4))
    assert picking.generate([1], 2, Sampler(0.9, top_k=1)).tokens == [2, 3]


class EngineProgram(CountingProgram):
    """The same for an artifact of --output engine."""

    def run(  # type: ignore[override]
        self, method: str, input_ids: torch.Tensor, cache_position: torch.Tensor, temperature: torch.Tensor
    ) -> list[torch.Tensor]:
        assert (temperature.dtype, temperature.tolist()) == (torch.float32, [0.5])
        self.calls.append((method, input_ids[0].tolist(), cache_position.tolist()))
        return [input_ids[:, -1:].float() + 1]


def test_methods_of_the_engine_take_a_temperature_and_return_numbers_in_fp32(tokenizer: Tokenizer) -> None:
    generator = TextGenerator(EngineProgram(get_method_output="engine"), tokenizer)  # type: ignore[arg-type]
    assert generator.generate([1, 2], 3, Sampler(0.5)).tokens == [3, 4, 5]
    with pytest.raises(ValueError, match=r"top_p=0.9 does not apply to this artifact, which draws from all tokens"):
        generator.generate([1], 2, Sampler(0.5, top_p=0.9))


def test_an_artifact_of_a_later_version(tokenizer: Tokenizer) -> None:
    with pytest.raises(
        ValueError, match="the program's methods return 'beams', this version of the package runs token"
    ):
        TextGenerator(CountingProgram(get_method_output="beams"), tokenizer)  # type: ignore[arg-type]


def test_a_chunk_of_nothing(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="prefill_chunk=0 must be at least 1"):
        TextGenerator(CountingProgram(), tokenizer, prefill_chunk=0)  # type: ignore[arg-type]


def test_a_chunk_over_the_cache(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="prefill_chunk=17 is more than the artifact's max_context=16: leave it out"):
        TextGenerator(CountingProgram(), tokenizer, prefill_chunk=17)  # type: ignore[arg-type]


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
        # The artifact does not record the model's own limit.
        (
            17,
            None,
            "the prompt has 17 tokens but the model was exported with max_context=16: shorten the prompt, or export "
            "again with a larger --max-context, up to the model's own limit",
        ),
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
    assert len(generator.generate([40] * prompt).tokens) == new  # by default, as many as fit


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


def test_a_prompt_that_is_no_text(tokenizer: Tokenizer) -> None:
    """Python's string for the argument `$'a\\xff'` of a command line."""
    generator, _ = make(tokenizer)
    with pytest.raises(
        ValueError, match=r"prompt='a\\udcff' is not valid UTF-8 at character 1: give the text in UTF-8"
    ):
        generator.encode("a\udcff")
    assert generator.encode("naïve 😀")


def test_an_artifact_is_named_with_or_without_its_ending(tmp_path: Path) -> None:
    for name in ("x.pte", "model.v1.pte"):
        (tmp_path / name).touch()
        assert pte_path(tmp_path / name) == pte_path(tmp_path / name.removesuffix(".pte")) == tmp_path / name
    with pytest.raises(FileNotFoundError, match=r"y\.pte' is not a file: give the \.pte"):
        TextGenerator.load(tmp_path / "y")


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


@pytest.mark.usefixtures("executorch_runtime")
def test_a_second_text_takes_the_loaded_program(exported: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each text starts from an empty cache: another text in between changes nothing."""
    from executorch.runtime import Runtime

    stock, loaded = Runtime.load_program, []

    def load_program(self: Any, *args: Any, **kwargs: Any) -> Any:
        loaded.append(args)
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(Runtime, "load_program", load_program)
    generator = TextGenerator.load(exported("w4a16", "cpu"), "executorch")
    prompt, other = generator.encode("The import statement"), generator.encode("Numbers are created by literals")
    first = generator.generate(prompt, 12).tokens
    assert generator.generate(prompt, 12).tokens == first
    assert generator.generate(other, 30).tokens[:12] != first
    assert generator.generate(prompt, 12).tokens == first
    assert len(loaded) == 1
    settings = Sampler().inputs(torch.device("cpu"))
    for position in (-1, generator.max_context):
        with pytest.raises(ValueError, match=f"method 'decode' got position {position}, but its cache has positions"):
            generator.program.run("decode", torch.tensor([[5]]), torch.tensor([position]), *settings)
