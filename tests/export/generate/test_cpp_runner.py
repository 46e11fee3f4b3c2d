"""examples/cpp, built against the installed ExecuTorch package: its tokens are those of our runner in Python."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import executorch
import pytest

from executorch_moe.export.generate.generator import TextGenerator
from executorch_moe.export.models.sampling import Sampler

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = Path(next(iter(executorch.__path__)))
PROMPTS = ("The import statement", "x", "class Point:\n    def __init__(self")
NEW_TOKENS = 24

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("cmake") and (os.environ.get("CXX") or shutil.which("c++"))),
        reason="needs CMake and a compiler",
    ),
    pytest.mark.skipif(
        not (PACKAGE / "lib" / "libexecutorch.so").is_file(), reason="this ExecuTorch package has no C++ libraries"
    ),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runner."""
    build = tmp_path_factory.mktemp("cpp")
    for command in (
        ["cmake", "-S", str(ROOT / "examples/cpp"), "-B", str(build), "-D", f"CMAKE_PREFIX_PATH={PACKAGE}"],
        ["cmake", "--build", str(build)],
    ):
        ran = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert ran.returncode == 0, ran.stdout + ran.stderr
    return build / "runner"


def run(program: Path, pte: Path, ids: Sequence[int], *options: str) -> subprocess.CompletedProcess[str]:
    command = [str(program), str(pte), str(NEW_TOKENS), *options]
    return subprocess.run(command, input=" ".join(map(str, ids)), capture_output=True, text=True, timeout=120)


def test_tokens_equal_ours(program: Path, exported: Callable[..., Path]) -> None:
    pte = exported("w4a16", "cpu")
    generator = TextGenerator.load(pte)
    for prompt in PROMPTS:
        ids = generator.encode(prompt)
        for sampler, options in (
            (Sampler(), []),
            (Sampler(0.8, 5, 0.9), ["--temperature", "0.8", "--seed", "5", "--top-p", "0.9"]),
        ):
            expected = generator.generate(ids, NEW_TOKENS, sampler).tokens
            for chunk in ("512", "4"):
                ran = run(program, pte, ids, "--chunk", chunk, *options)
                assert ran.returncode == 0, ran.stderr
                assert [int(token) for token in ran.stdout.split()] == expected


@pytest.mark.exhaustive
def test_refusals(program: Path, exported: Callable[..., Path], tmp_path: Path) -> None:
    pte = tmp_path / "x.pte"
    for suffix in (".pte", ".ptd"):
        shutil.copy(exported("w4a16", "cpu").with_suffix(suffix), pte.with_suffix(suffix))

    def refused(*options: str, ids: Sequence[int] = (5,)) -> str:
        ran = run(program, pte, ids, *options)
        assert ran.returncode == 2 and ran.stdout == ""
        return ran.stderr.splitlines()[-1]

    assert "the prompt has 0 tokens: give 1 to" in refused(ids=())
    assert "the prompt has 200 tokens: give 1 to 128" in refused(ids=[5] * 200)
    assert "--speed is unknown" in refused("--speed", "9")
    whole = pte.read_bytes()
    pte.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    assert "x.pte is damaged" in refused()
    pte.write_bytes(whole[:-1])
    assert "x.pte has no digests at its end" in refused()
    pte.write_bytes(whole)
    shutil.copy(exported("w4a8", "cpu").with_suffix(".ptd"), pte.with_suffix(".ptd"))
    assert "x.ptd is damaged or of another export" in refused()
    pte.with_suffix(".ptd").unlink()
    assert "x.ptd cannot be opened" in refused()
