"""Records which configurations ExecuTorch's autotuned kernels choose on this GPU, for `export --kernel-configs`.

    python examples/upstream_configs.py configs.json       (on a GPU, about half a minute)

It uses the shapes of Qwen3-30B-A3B: one token and a prompt of 1642 tokens through `triton::fused_moe` and its batched
form, and a prompt through `triton::sdpa`. Each kernel times its configurations when it first runs, and the script reads
the fastest from the kernel's cache. It needs ExecuTorch's wheel and a CUDA build of torch.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from executorch_moe.backends.atomic_files import check_writable, write_text

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, GROUP = 128, 8, 2048, 768, 128
HEADS, KV_HEADS, HEAD_DIM, CONTEXT = 32, 4, 128, 2304
PROMPT = 1642
MODULES = ("fused_moe", "sdpa")


def load(name: str) -> ModuleType:
    """Imports a module of ExecuTorch's Triton kernels, which registers its operators."""
    return importlib.import_module(f"executorch.backends.cuda.triton.kernels.{name}")


def chosen(module: ModuleType) -> dict[str, dict[str, int]]:
    """Kernel -> the configuration that it chose last, for kernels of a module that have run."""
    from triton.runtime.autotuner import Autotuner

    found = {}
    for value in vars(module).values():
        if isinstance(value, Autotuner) and value.cache:
            config = list(value.cache.values())[-1]
            name = value.base_fn.__name__
            found[name] = {**config.kwargs, "num_warps": config.num_warps, "num_stages": config.num_stages}
    return found


def packed(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Random weights of experts in ExecuTorch's layout: two codes per byte, one scale per group of a row."""
    codes = torch.randint(-128, 128, (EXPERTS, rows, columns // 2), dtype=torch.int8, device="cuda")
    scale = torch.rand(EXPERTS, rows, columns // GROUP, device="cuda") * columns**-0.5 / 4.6
    return codes, scale.bfloat16()


def run_experts(operator: Any, tokens: int) -> None:
    """Calls an expert operator once."""
    x = torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
    ids = torch.rand(tokens, EXPERTS, device="cuda").topk(TOP_K).indices
    weights = torch.rand(tokens, TOP_K, device="cuda")
    gate_up, down = packed(2 * INTERMEDIATE, HIDDEN), packed(HIDDEN, INTERMEDIATE)
    operator(x, *gate_up, *down, weights, ids, TOP_K, EXPERTS, GROUP)


def run_attention() -> None:
    """Calls attention over a cache once, with the mask of a prompt."""
    shape = (1, KV_HEADS, CONTEXT, HEAD_DIM)
    key, value = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    query = torch.randn(1, HEADS, PROMPT, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    at, asking = torch.arange(CONTEXT, device="cuda"), torch.arange(PROMPT, device="cuda")
    mask = (at <= asking.unsqueeze(1)).view(1, 1, PROMPT, CONTEXT)
    torch.ops.triton.sdpa(query, key, value, mask, 0.0, False, HEAD_DIM**-0.5, True)


STEPS: dict[str, Callable[[], None]] = {
    "one token": lambda: run_experts(torch.ops.triton.fused_moe, 1),
    "a prompt": lambda: run_experts(torch.ops.triton.fused_moe_batched_gemm, PROMPT),
    "attention": run_attention,
}


def main(path: Path) -> None:
    """Runs the kernels and writes their choices."""
    console = Console()
    check_writable("out", path)
    if not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} finds no GPU: run this on the GPU that the export is for")
    modules = [load(name) for name in MODULES]
    for name, step in STEPS.items():
        with console.status(f"timing the kernels of {name}"):
            step()
            torch.cuda.synchronize()
    found = {name: config for module in modules for name, config in chosen(module).items()}
    write_text(path, json.dumps(found, indent=2) + "\n")
    console.print(f"wrote {path}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} configs.json")
    main(Path(sys.argv[1]))
