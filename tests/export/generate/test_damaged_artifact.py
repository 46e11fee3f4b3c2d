"""Damaged artifacts of the tiny model: the command line refuses them in one line, before native code reads them."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from executorch_moe.backends.artifact.ptd import PtdFile
from executorch_moe.backends.runtime import loader as runtime_module
from executorch_moe.export.cli import app as cli
from executorch_moe.export.generate.generator import TextGenerator
from executorch_moe.export.report.metadata import TOKENIZER_SUFFIX

pytestmark = pytest.mark.slow
runner = CliRunner()
SUFFIXES = (".pte", ".ptd", TOKENIZER_SUFFIX)


class Reached(BaseException):
    """Raised in place of a call of native code."""


@pytest.fixture
def pte(exported: Callable[[str, str], Path], tmp_path: Path) -> Path:
    """A copy of the artifact, for a test to damage."""
    whole = exported("w4a16", "cpu")
    for suffix in SUFFIXES:
        shutil.copy(whole.with_suffix(suffix), tmp_path / f"x{suffix}")
    return tmp_path / "x.pte"


def damaged(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    rand = random.Random(seed)
    for number in range(count):
        at, other = sorted(rand.sample(range(len(data) - 600), 2))
        length = rand.choice((1, 16, 512))
        noise = bytes([data[at] ^ 1 << rand.randrange(8)])
        yield {
            0: data[:at] + noise + data[at + 1 :],
            1: data[:at],
            2: data[:at] + bytes(length) + data[at + length :],
            3: data[:at] + data[other : other + length] + data[at + length :],
            4: data + noise * length,
            5: data[:at] + noise + data[at:],
        }[number % 6]


def flip_a_weight(ptd: Path) -> None:
    """Flips the last bit of a weight's first number, which changes no text."""
    data = bytearray(ptd.read_bytes())
    weights = PtdFile(ptd)
    name = max(weights.sizes(), key=lambda name: weights.sizes()[name])
    data[data.index(bytes(weights.data(name)))] ^= 1
    ptd.write_bytes(data)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_damaged_file_reaches_native_code(pte: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*_: object) -> None:
        raise Reached

    monkeypatch.setattr(runtime_module.ExecutorchEngine, "__init__", reached)
    monkeypatch.setattr(runtime_module, "why_not_executorch", lambda backends: "")
    path = pte.with_suffix(suffix)
    whole = path.read_bytes()
    with pytest.raises(Reached):
        TextGenerator.load(pte)
    # Few for other files, because each message needs the program; tests/backends/artifact/test_digests.py has more.
    for content in damaged(whole, 120 if suffix == ".pte" else 6, 1):
        if content == whole:
            continue
        path.write_bytes(content)
        with pytest.raises(ValueError) as refused:
            TextGenerator.load(pte)
        assert "\n" not in str(refused.value) and path.name in str(refused.value)
        assert cli.is_users(refused.value)


@pytest.mark.parametrize("suffix", [pytest.param(".pte", marks=pytest.mark.exhaustive), ".ptd"])
def test_in_a_process_of_its_own(pte: Path, suffix: str) -> None:
    path = pte.with_suffix(suffix)
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)
    command = [sys.executable, "-m", "executorch_moe.export.cli", "generate", str(pte), "-p", "a"]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "80"})
    assert result.returncode == 2 and result.stdout == "", result
    (line,) = [line for line in result.stderr.splitlines() if "cpuinfo" not in line]
    assert line.startswith("error: ") and f"x{suffix} is damaged: its bytes differ" in line


def test_inspect_verify(pte: Path) -> None:
    result = runner.invoke(cli.app, ["inspect", "--verify", str(pte)])
    assert result.exit_code == 0 and result.stdout.endswith("are whole: all bytes are those that were exported\n")
    assert result.stdout.count("\n") == 1
    ptd = pte.with_suffix(".ptd")
    flip_a_weight(ptd)
    assert runner.invoke(cli.app, ["inspect", str(pte)]).exit_code == 0  # inspect does not read the weights
    result = runner.invoke(cli.app, ["inspect", "--verify", str(pte)])
    assert result.exit_code == 2 and "x.ptd is damaged: its bytes differ" in result.stderr and not result.stdout
    result = runner.invoke(cli.app, ["inspect", "--verify", str(pte), "--target", "sm_90"])
    assert result.exit_code == 2 and "leave --target and --format out" in result.stderr


def test_verifying_can_be_left_out(pte: Path) -> None:
    ptd = pte.with_suffix(".ptd")
    flip_a_weight(ptd)
    command = ["generate", str(pte), "-p", "The", "--max-new-tokens", "2"]
    assert runner.invoke(cli.app, command).exit_code == 2
    assert runner.invoke(cli.app, [*command, "--no-verify"]).exit_code == 0
    bench = ["bench", "model", str(pte), "--prompt-tokens", "2", "-n", "2", "-r", "1"]
    assert runner.invoke(cli.app, bench).exit_code == 2
    assert runner.invoke(cli.app, [*bench, "--no-verify"]).exit_code == 0
    ptd.write_bytes(ptd.read_bytes()[:-1])
    result = runner.invoke(cli.app, [*command, "--no-verify"])
    assert result.exit_code == 2 and "x.ptd is cut short" in result.stderr


def test_a_link_to_an_artifact(pte: Path, tmp_path: Path) -> None:
    link = tmp_path / "elsewhere" / "latest.pte"
    link.parent.mkdir()
    link.symlink_to("../x.pte")
    result = runner.invoke(cli.app, ["generate", str(link), "-p", "The", "--max-new-tokens", "2"])
    assert result.exit_code == 0 and result.stdout.startswith("The"), result.output
    assert runner.invoke(cli.app, ["inspect", "--verify", str(link)]).exit_code == 0
