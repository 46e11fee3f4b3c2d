"""On a GPU: each way to export a model x scheme x storage of dense layers, against eager after each token.

`here` is an export for the GPU of this machine (target "cuda"). `elsewhere` is an export for its architecture that does
not use the GPU, or, if EXECUTORCH_MOE_CROSS names a folder, one that matrix.py made on a machine without a GPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from executorch_moe.backends.runtime.loader import LoadedProgram, load

from ..matrix import CELLS, Cell
from .test_families_on_gpu import MODES, files

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[3]
HOST = "delegate-host"
TEXT = list(b"The import statement combines two operations; it searches for the named module")
"""More than 64 tokens: with fewer, eager takes `rows_linear` for int8, and an export of any length does not."""
STEPS = 16
WAYS = ("here", "elsewhere")
LATE_WAYS = [pytest.param("here", marks=pytest.mark.late), "elsewhere"]
# Both round to bf16, at different places; in a near-tie a router may choose another expert.
MEDIAN_ERROR, LARGEST_ERROR = 0.01, 0.05
# Logits between 8 and 16 are 1/16 apart in bf16: four such steps.
LARGEST_GAP = 0.25
ROUNDS = 2000

Artifact = Callable[[str, Cell], Path]
"""Type of the fixture `artifact` of conftest.py."""


def follow(program: LoadedProgram, ids: list[int]) -> Tensor:
    """Logits after TEXT, and after each of `ids`, fp32 [1 + len(ids), V]."""
    program.reset()
    logits = [program.run("prefill", torch.tensor([TEXT]), torch.arange(len(TEXT)))[0]]
    for position, token in enumerate(ids, len(TEXT)):
        logits.append(program.run("decode", torch.tensor([[token]]), torch.tensor([position]))[0])
    return torch.cat([part.cuda() for part in logits])


@torch.no_grad()
def eagers_text(model: torch.nn.Module) -> tuple[list[int], Tensor]:
    """STEPS greedy tokens of the eager model, and its logits before each and after the last."""
    logits = [model(torch.tensor([TEXT]).cuda(), torch.arange(len(TEXT)).cuda())]
    ids: list[int] = []
    for position in range(len(TEXT), len(TEXT) + STEPS):
        ids.append(int(logits[-1].argmax()))
        logits.append(model(torch.tensor([[ids[-1]]]).cuda(), torch.tensor([position]).cuda()))
    return ids, torch.cat(logits)


@pytest.mark.parametrize("cell", CELLS, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_every_export_is_eager(way: str, cell: Cell, artifact: Artifact, record_property) -> None:
    pte = artifact(way, cell)
    ids, expected = eagers_text(cell.eager(pte.parent))
    first = load(pte, runtime=HOST)
    got = follow(first, ids)
    errors = ((got - expected).norm(dim=-1) / expected.norm(dim=-1)).tolist()
    record_property("matrix", f"{way} {cell}: relative errors up to {max(errors):.4f}")
    assert sorted(errors)[len(errors) // 2] < MEDIAN_ERROR and max(errors) < LARGEST_ERROR, errors
    # The same tokens except for near-ties: each of the program's tokens must have nearly eager's best logit.
    gaps = expected.max(-1).values - expected.gather(-1, got.argmax(-1, keepdim=True))[:, 0]
    assert float(gaps.max()) <= LARGEST_GAP, gaps
    # A second load, and one that replays decode as a CUDA graph, give the same bits.
    for other in (load(pte, runtime=HOST), load(pte, runtime=HOST, cuda_graph=("decode",))):
        assert torch.equal(follow(other, ids), got)
    assert torch.equal(follow(first, ids), got)


@pytest.mark.parametrize("way", LATE_WAYS)
def test_bits_stay_the_same_beside_other_kernels(way: str, artifact: Artifact) -> None:
    """Between calls, other kernels on the same stream fill caches, registers and freed memory."""
    program = load(artifact(way, Cell("w4a16", "int8")), runtime=HOST)
    ids, positions = torch.tensor([TEXT]).cuda(), torch.arange(len(TEXT)).cuda()
    token, position = torch.tensor([[32]]).cuda(), torch.tensor([len(TEXT)]).cuda()
    generator = torch.Generator("cuda").manual_seed(0)
    expected: list[Tensor] = []
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for round_ in range(ROUNDS):
        program.reset()
        noise = torch.randn(64 + 37 * (round_ % 29), 128, device="cuda", generator=generator)
        got = program.run("prefill", ids, positions)
        torch.full((1 + round_ % 4096, 33), float("nan"), device="cuda").add_(1)
        (noise @ noise.T).softmax(-1)
        got += program.run("decode", token, position)
        expected = expected or [part.clone() for part in got]
        wrong += sum((one != other).any().long() for one, other in zip(got, expected, strict=True))
    assert int(wrong) == 0


def sanitized(tool: str, pte_files: list[Path], report: Path) -> None:
    """Runs artifacts under compute-sanitizer, without a caching allocator, and asserts that it finds no errors."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    assert Path(program).is_file(), "compute-sanitizer is not on PATH: it comes with the CUDA toolkit"
    command = [program, "--tool", tool, "--log-file", str(report), "--error-exitcode", "9"]
    command += [sys.executable, "-m", "tests.export.gpu.run_artifacts", *map(str, pte_files)]
    # No other tensor's memory directly follows an allocation.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    found = report.read_text() if report.is_file() else ""
    assert run.returncode == 0, f"{found[-3000:]}\n{run.stdout[-500:]}\n{run.stderr[-1500:]}"
    assert "ERROR SUMMARY: 0 errors" in found, found[-3000:]
    assert run.stdout.count("ran ") == len(pte_files)


@pytest.mark.parametrize("scheme", ["w4a16", "w4a8", "bf16"])
@pytest.mark.parametrize("way", LATE_WAYS)
def test_no_export_reads_or_writes_outside(way: str, scheme: str, artifact: Artifact, tmp_path: Path) -> None:
    paths = [artifact(way, cell) for cell in CELLS if cell.scheme == scheme]
    sanitized("memcheck", paths, tmp_path / "memcheck.txt")


@pytest.mark.late
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
def test_no_familys_export_reads_or_writes_outside(dynamic: bool, made_once, tmp_path: Path) -> None:
    paths = [files(mode, made_once)[0] for mode in MODES if mode.dynamic == dynamic]
    sanitized("memcheck", paths, tmp_path / "memcheck.txt")
