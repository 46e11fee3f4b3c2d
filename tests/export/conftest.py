"""Exports of the tiny model, made once for all tests and processes of a run."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._inductor import config as inductor_config

from executorch_moe.backends.runtime.pybindings import why_not_pybindings
from executorch_moe.export.build import load_whole
from executorch_moe.export.models.causal_lm import CausalLM
from executorch_moe.export.models.pretrained import resolve
from executorch_moe.export.options import Context, Experts, ExportOptions, Target
from executorch_moe.export.pipeline import export_model
from executorch_moe.export.quantize.experts import quantize_experts_
from executorch_moe.kernels.experts.plan import Options
from executorch_moe.kernels.op import forced

from .matrix import Cell

MAX_CONTEXT = 128
GROUP_SIZE = 32


def tiny_options(out: Path | None, scheme: str, target: str, dtype: str) -> ExportOptions:
    return ExportOptions(
        "tiny",
        out,
        experts=Experts(scheme, GROUP_SIZE),
        target=Target(target, dtype),
        context=Context(MAX_CONTEXT),
    )


@pytest.fixture(scope="session")
def executorch_runtime() -> None:
    """Skips tests that need ExecuTorch's own runtime if it is missing."""
    if why := why_not_pybindings():
        pytest.skip(why)


MadeOnce = Callable[[str, Callable[[Path], None]], Path]


def tiny_artifact(made_once: MadeOnce, scheme: str, target: str, dtype: str = "auto") -> Path:
    """The .pte of the tiny model with MAX_CONTEXT positions."""

    def make(folder: Path) -> None:
        # All GEMMs, see `few_gemms`, where the speed is compared.
        with inductor_config.patch({"test_configs.max_mm_configs": None if dtype == "auto" else 2}):
            export_model(tiny_options(folder / "tiny.pte", scheme, target, dtype))

    return made_once(f"tiny-{scheme}-{target}-{dtype}", make) / "tiny.pte"


@pytest.fixture(scope="session")
def exported(made_once: MadeOnce) -> Callable[..., Path]:
    """exported(scheme, target, dtype="auto") -> see `tiny_artifact`."""
    return functools.partial(tiny_artifact, made_once)


@pytest.fixture(scope="session")
def artifact(made_once: MadeOnce) -> Callable[[str, Cell], Path]:
    """artifact(way, cell) -> the .pte of a cell of the matrix, exported "here", on this GPU, or "elsewhere".

    "elsewhere" is taken from the folder that EXECUTORCH_MOE_CROSS names, if it has the file; otherwise it is an export
    for this GPU's architecture that does not use the GPU.
    """

    def get(way: str, cell: Cell) -> Path:
        folder = os.environ.get("EXECUTORCH_MOE_CROSS", "")
        if way == "elsewhere" and folder and cell.file(Path(folder)).is_file():
            return cell.file(Path(folder))
        major, minor = torch.cuda.get_device_capability()
        target = "cuda" if way == "here" else f"sm_{major}{minor}"
        return cell.file(made_once(f"matrix-{way}-{cell}", lambda folder: cell.write(target, folder)))

    return get


def eager_model(scheme: str, target: str, dtype: str = "auto") -> CausalLM:
    """The quantized tiny model in PyTorch, as the export of the same scheme, target and dtype has it."""
    options = tiny_options(None, scheme, target, dtype)
    model = quantize_experts_(load_whole(options, resolve("tiny")), scheme, GROUP_SIZE)
    return CausalLM(model.to(target), MAX_CONTEXT)


@torch.no_grad()
def eager_greedy(model: CausalLM, prompt_ids: list[int], new_tokens: int) -> list[int]:
    """Greedy tokens after a prompt, with the calls of exported methods: the whole prompt, then token by token.

    An exported prefill takes any length, and so has only the experts' grouped path. Eager would take the few-token path
    for short prompts, which rounds at other places.
    """
    model.reset()
    device = next(model.parameters()).device
    ids, fed = list(prompt_ids), 0
    while len(ids) < len(prompt_ids) + new_tokens:
        with forced(Options(path="grouped")) if len(ids) - fed > 1 else contextlib.nullcontext():
            logits = model(torch.tensor([ids[fed:]], device=device), torch.arange(fed, len(ids), device=device))
        fed = len(ids)
        ids.append(int(logits.argmax()))
    return ids[len(prompt_ids) :]
