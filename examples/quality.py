"""Prints the perplexity of the tiny model with 4-bit experts, by scheme, algorithm and group size.

    python examples/quality.py [--windows N]      (CPU, about 15 minutes)

This is the table of docs/quality.md. Each model runs in PyTorch and as an exported program in ExecuTorch, and the two
must agree. The model was trained on Python's language reference (`pydoc_data.topics`). The text for the perplexity is
held out: docstrings of Python's standard library. One token is one byte.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import math
import platform
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from executorch_moe.backends.artifact.files import save
from executorch_moe.backends.fusion.modules import find_experts
from executorch_moe.backends.lower import lower
from executorch_moe.backends.runtime.loader import load
from executorch_moe.export.checkpoint.whole import load_model
from executorch_moe.export.models.pretrained import resolve
from executorch_moe.export.quantize.experts import quantize_experts_
from executorch_moe.export.quiet import quiet
from executorch_moe.kernels import ALGORITHMS, FusedExperts, Int4Codes, pack_codes, unpack_experts
from executorch_moe.kernels.packing.rounding import round_weights
from executorch_moe.kernels.schemes import get_scheme

MODULES = (
    "argparse", "ast", "bisect", "calendar", "collections", "configparser", "contextlib", "copy", "csv", "datetime",
    "decimal", "difflib", "fractions", "functools", "heapq", "inspect", "itertools", "json", "logging", "os", "pathlib",
    "pickle", "random", "re", "shutil", "socket", "statistics", "string", "subprocess", "tempfile", "textwrap",
    "threading", "types", "typing", "unittest", "uuid",
)  # fmt: skip
WINDOW = 256
WINDOWS = 256


@dataclass(frozen=True)
class Recipe:
    """How to round the experts; scheme bf16 ignores algorithm and group size, mxfp4 the algorithm."""

    scheme: str
    algorithm: str = "minmax"
    group_size: int = 0

    def apply(self, model: nn.Module) -> nn.Module:
        """Quantizes the experts in place; a group is at most a row."""
        widths = [min(p.shape[-1] for p in module.parameters()) for _, module in find_experts(model)]
        if self.group_size <= min(widths):
            return quantize_experts_(model, self.scheme, self.group_size, self.algorithm)
        for name, module in list(find_experts(model)):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, self._whole_rows(module))
        return model

    def _whole_rows(self, experts: nn.Module) -> FusedExperts:
        """Rounds rows that are shorter than a group as one group.

        The operator has one group size for both GEMMs. Longer groups are split: their parts share a scale, so that the
        values stay the same.
        """
        kind = get_scheme(self.scheme)

        def rounded(weight: Tensor, gemm: int) -> Int4Codes:
            group_size = min(weight.shape[-1], self.group_size)
            return round_weights(weight, group_size, self.algorithm, kind.takes_zeros, kind.row_scaled(gemm))

        gate_up, down = rounded(experts.gate_up_proj.detach(), 1), rounded(experts.down_proj.detach(), 2)
        return FusedExperts(pack_codes(gate_up, down, scheme=self.scheme))


RECIPES = (
    Recipe("bf16"),
    *(Recipe(scheme, algorithm, g) for scheme in ("w4a16", "w4a8") for algorithm in ALGORITHMS for g in (32, 64, 128)),
    Recipe("mxfp4", group_size=32),
)


class Logits(nn.Module):
    """Token ids [1, T] -> logits [1, T, V], without a cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


def held_out() -> bytes:
    """Docstrings of the modules and their public members, each paragraph once, without those of the training text."""
    seen = "\n".join(topics.topics.values())
    found: dict[str, None] = {}
    for name in MODULES:
        module = importlib.import_module(name)
        members = [module, *(getattr(module, member) for member in sorted(getattr(module, "__all__", ())))]
        for member in members:
            # The docstring of an instance or constant is that of its type.
            if inspect.ismodule(member) or inspect.isclass(member) or inspect.isroutine(member):
                for paragraph in (inspect.getdoc(member) or "").split("\n\n"):
                    if paragraph.strip() and paragraph.strip() not in seen:
                        found.setdefault(paragraph)
    return "\n\n".join(found).encode()


def windows(count: int) -> Tensor:
    """[count, WINDOW + 1] bytes, spread evenly over the held-out text."""
    text = held_out()
    starts = torch.linspace(0, len(text) - WINDOW - 1, count).long().tolist()
    return torch.tensor([list(text[start : start + WINDOW + 1]) for start in starts])


@torch.no_grad()
def perplexity(logits: Callable[[Tensor], Tensor], data: Tensor) -> float:
    """exp of the mean loss per token over windows [N, T + 1]; each window starts without context."""
    losses = [nn.functional.cross_entropy(logits(window[None, :-1])[0].float(), window[1:]).double() for window in data]
    return math.exp(float(torch.stack(losses).mean()))


def quantized(recipe: Recipe) -> nn.Module:
    """The tiny model in fp32, the dtype of the CPU target, with quantized experts."""
    return Logits(recipe.apply(load_model(resolve("tiny"), torch.float32)))


@torch.no_grad()
def weight_error(model: nn.Module) -> float:
    """Relative L2 error of all expert weights together."""
    original = dict(find_experts(Logits(load_model(resolve("tiny"), torch.float32))))
    change = size = 0.0
    for name, experts in original.items():
        stored = unpack_experts(model.get_submodule(name).packed())
        for weight, value in zip((experts.gate_up_proj, experts.down_proj), stored, strict=True):
            change += float((value - weight).square().sum())
            size += float(weight.square().sum())
    return math.sqrt(change / size)


@torch.no_grad()
def exported(model: nn.Module, folder: Path, tokens: int) -> Callable[[Tensor], Tensor]:
    """Exports a model for inputs [1, tokens] and loads it in ExecuTorch's CPU runtime."""
    program = torch.export.export(model, (torch.zeros(1, tokens, dtype=torch.int64),), strict=False)
    loaded = load(save(lower({"forward": program}, "cpu"), folder / "model.pte").pte)
    return lambda ids: loaded.run("forward", ids)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints the perplexity of the tiny model with 4-bit experts.")
    parser.add_argument("--windows", type=int, default=WINDOWS, help=f"windows of {WINDOW} bytes; default {WINDOWS}")
    quiet()
    data = windows(parser.parse_args().windows)
    console = Console()
    baseline = perplexity(Logits(load_model(resolve("tiny"), torch.bfloat16)), data)
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    title = f"perplexity per byte; {data.shape[0]} windows of {WINDOW} bytes, {versions}"
    columns = ("experts", "algorithm", "group", "weights' error", "PyTorch", "ExecuTorch", "apart", "to bf16")
    table = Table(*columns, title=title)
    table.add_row("eager, all in bf16", "", "", "", f"{baseline:.4f}", "", "", "")
    for recipe in RECIPES:
        with tempfile.TemporaryDirectory() as folder, console.status(str(recipe)):
            model = quantized(recipe)
            eager = perplexity(model, data)
            run = perplexity(exported(model, Path(folder), WINDOW), data)
        algorithm = "" if recipe.scheme == "mxfp4" else recipe.algorithm
        how = (algorithm, str(recipe.group_size)) if recipe.group_size else ("", "")
        apart, worse = run / eager - 1, run / baseline - 1
        error = f"{weight_error(model):.2%}"
        table.add_row(recipe.scheme, *how, error, f"{eager:.4f}", f"{run:.4f}", f"{apart:+.4%}", f"{worse:+.2%}")
    console.print(table)


if __name__ == "__main__":
    main()
