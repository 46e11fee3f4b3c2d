"""`generate` and `bench`: their output, and refusals in one line."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from executorch_moe.backends.artifact.files import save
from executorch_moe.backends.lower import lower
from executorch_moe.export.cli.app import app
from executorch_moe.export.generate.generator import Generation
from executorch_moe.export.models.pretrained import resolve

from .refusals import refused, runner


@pytest.mark.parametrize("command", [("bench", "model", "x.pte", "--profile"), ("bench", "kernel")])
def test_bench_pictures_that_cannot_be_written(command: tuple[str, ...], tmp_path: Path) -> None:
    assert "must end in .png or .svg: give for example" in refused(*command, "--plot", tmp_path / "x.gif")
    (tmp_path / "x.svg").mkdir()
    assert "is a folder: give a file name" in refused(*command, "--plot", tmp_path / "x.svg")


def test_generate_missing_and_foreign_files(tmp_path: Path) -> None:
    pte = tmp_path / "x.pte"
    assert "is not a file: give the .pte" in refused("generate", pte, "-p", "a")
    pte.write_bytes(b"not a program" * 100)
    assert "tokenizer.json is missing" in refused("generate", pte, "-p", "a")
    shutil.copy(resolve("tiny") / "tokenizer.json", tmp_path / "x.tokenizer.json")
    assert "x.pte" in refused("generate", pte, "-p", "a")


def test_generate_takes_text_only(tmp_path: Path) -> None:
    (tmp_path / "x.pte").touch()
    assert "is not valid UTF-8" in refused("generate", tmp_path / "x.pte", "-p", "a\udcff")


class OneToken:
    """Replaces a `TextGenerator` that generates one token."""

    program = SimpleNamespace(runtime="a test", note="")
    tokenizer = None

    @classmethod
    def load(cls, *_: object, **__: object) -> OneToken:
        return cls()

    def encode(self, prompt: str) -> list[int]:
        return [1]

    def check_length(self, *_: object) -> None: ...

    def check_sampler(self, *_: object) -> None: ...

    def warm_up(self, *_: object) -> None: ...

    def generate(self, *_: object, **__: object) -> Generation:
        return Generation(1, [5], 0.5, 0.0, "max_new_tokens")


def test_generate_of_one_token_has_no_speed_of_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("executorch_moe.export.generate.generator.TextGenerator", OneToken)
    monkeypatch.setattr("executorch_moe.export.generate.generator.TextStream._decode", lambda self, ids: "a" * len(ids))
    result = runner.invoke(app, ["generate", "x.pte", "-p", "a", "--max-new-tokens", "1"], terminal_width=200)
    assert result.exit_code == 0, result.output
    assert "prefill 2.0 tok/s (1 tokens in 0.500 s), stopped by --max-new-tokens" in result.stderr
    assert "nan" not in result.stderr


@pytest.mark.slow
def test_generate_refuses_what_does_not_fit(exported: Callable[[str, str], Path]) -> None:
    pte = exported("w4a16", "cpu")
    assert "--prompt '' has no tokens" in refused("generate", pte, "-p", "")
    line = refused("generate", pte, "-p", "x" * 129)
    assert "the prompt has 129 tokens but the model was exported with --max-context 128" in line
    assert line.endswith(
        "shorten the prompt, or export again with a larger --max-context, up to the model's limit of 512"
    )
    assert "ask for 126 at most" in refused("generate", pte, "-p", "abc", "--max-new-tokens", 127)
    assert "--temperature -1.0" in refused("generate", pte, "-p", "abc", "--temperature", -1)
    assert "runtime 'tvm' is unknown" in refused("generate", pte, "-p", "abc", "--runtime", "tvm")
    assert "delegate" in refused("generate", pte, "-p", "abc", "--runtime", "delegate-host")
    assert "--prompt-tokens 'a,b' must be positive whole numbers" in refused(
        "bench", "model", pte, "--prompt-tokens", "a,b"
    )
    assert "--format 'xml' is unknown" in refused("bench", "model", pte, "--format", "xml")
    assert "--repeats 0 must be at least 1" in refused("bench", "model", pte, "--repeats", 0)
    assert "--max-context 128" in refused("bench", "model", pte, "--prompt-tokens", "100,200")
    assert "leave --profile out" in refused(
        "bench", "model", pte, "--prompt-tokens", "4", "-n", "2", "-r", "1", "--profile"
    )
    assert "is the picture of a profile: add --profile" in refused("bench", "model", pte, "--plot", "x.png")
    assert "--top-p 0.0" in refused("generate", pte, "-p", "abc", "--top-p", 0)
    assert "--prefill-chunk 0 must be" in refused("generate", pte, "-p", "abc", "--prefill-chunk", 0)
    assert "leave CUDA graphs off" in refused("generate", pte, "-p", "abc", "--cuda-graph")


@pytest.mark.slow
@pytest.mark.parametrize("other", ["model", pytest.param("scheme", marks=pytest.mark.exhaustive)])
def test_generate_refuses_files_that_do_not_belong_together(
    other: str, exported: Callable[[str, str], Path], tmp_path: Path
) -> None:
    pte = exported("w4a16", "cpu")
    if other == "scheme":
        another = exported("w4a8", "cpu")
    else:
        program = torch.export.export(torch.nn.Linear(4, 3), (torch.randn(2, 4),))
        another = save(lower({"forward": program}, "cpu"), tmp_path / "another").pte
    for suffix in (".pte", ".tokenizer.json"):
        shutil.copy(pte.with_suffix(suffix), tmp_path / f"x{suffix}")
    assert "x.ptd" in refused("generate", tmp_path / "x.pte", "-p", "a")
    tokenizer = tmp_path / "x.tokenizer.json"
    text = tokenizer.read_text()
    tokenizer.write_text(text.replace('"a"', '"~"', 1).replace('"b"', '"a"', 1))
    shutil.copy(pte.with_suffix(".ptd"), tmp_path / "x.ptd")
    assert "x.tokenizer.json is damaged or does not belong to the .pte beside it" in refused(
        "generate", tmp_path / "x.pte", "-p", "a"
    )
    tokenizer.write_text(text)
    shutil.copy(another.with_suffix(".ptd"), tmp_path / "x.ptd")
    assert "does not belong to" in refused("generate", tmp_path / "x.pte", "-p", "a")
    data = pte.with_suffix(".ptd").read_bytes()
    (tmp_path / "x.ptd").write_bytes(data[: len(data) // 2])
    assert "x.ptd" in refused("generate", tmp_path / "x.pte", "-p", "a")


@pytest.mark.slow
def test_generate_prints_text_to_stdout_and_the_rest_to_stderr(exported: Callable[[str, str], Path]) -> None:
    command = ["generate", str(exported("w4a16", "cpu")), "-p", "The import", "--max-new-tokens", "12"]
    result = runner.invoke(app, command)
    assert result.exit_code == 0, result.output
    assert re.fullmatch(r"The import.{12}\n", result.stdout, re.DOTALL)
    assert "runtime: executorch (CPU)" in result.stderr
    assert re.search(r"prefill [\d,.]+ tok/s \(10 tokens in .*decode [\d,.]+ tok/s \(11", result.stderr, re.DOTALL)
    sampled = [runner.invoke(app, [*command, "--temperature", "0.8", "--seed", seed]).stdout for seed in "112"]
    assert sampled[0] == sampled[1] != sampled[2]
    assert "seed" not in result.stderr  # nothing is drawn at temperature 0
    fresh = [runner.invoke(app, [*command, "--temperature", "0.8"]) for _ in range(2)]
    seeds = [re.search(r"--seed (\d+) gives", run.stderr) for run in fresh]
    assert seeds[0] and seeds[1] and seeds[0][1] != seeds[1][1]
    again = runner.invoke(app, [*command, "--temperature", "0.8", "--seed", seeds[0][1]])
    assert again.stdout == fresh[0].stdout


@pytest.mark.slow
def test_bench_model(exported: Callable[[str, str], Path]) -> None:
    command = ["bench", "model", str(exported("w4a16", "cpu")), "--prompt-tokens", "8,1", "--new-tokens", "4"]
    table = runner.invoke(app, [*command, "--repeats", "2"]).stdout
    assert "runtime: executorch (CPU)" in table and "picked on the device" in table
    assert "experts ours, dense none" in table and "| prefill 8 | " in table and "| decode 4 after 1 | " in table
    assert re.search(
        r"\.pte .*; \.ptd .*; expert weights .*; export .* s \(check .*\); .*"
        r"loaded in \d+\.\d s; peak of this run: host",
        table,
    )
    result = json.loads(runner.invoke(app, [*command, "-r", "3", "--format", "json", "--prefill-chunk", "3"]).stdout)
    assert result["prefill_chunk"] == 3 and result["export"]["options"]["output"] == "token"
    assert result["bytes"][".ptd"] > result["bytes"]["expert weights"] > 0 and result["peak_bytes"]["host"] > 1e8
    speeds = result["speeds"]
    assert [len(speed["decode"]) for speed in speeds] == [3, 3]
    assert all(rate > 0 for speed in speeds for rate in speed["prefill"] + speed["decode"])


@pytest.mark.parametrize("command", [("generate", "-p", "a"), ("bench", "model"), ("inspect",)])
@pytest.mark.parametrize("suffix", [".ptd", ".tokenizer.json"])
def test_files_beside_the_program_are_refused(command: tuple[str, ...], suffix: str, tmp_path: Path) -> None:
    line = refused(*command, tmp_path / f"x.y{suffix}")
    assert line.endswith(f"is a file beside the program: give the .pte, {tmp_path / 'x.y.pte'}")
