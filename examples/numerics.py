"""Prints the error of int8 activations in one expert layer, by GEMM and by how many activations share a scale.

    python examples/numerics.py            (CPU, about ten seconds)

This is the table of docs/numerics.md. The oracle has the same 4-bit weights as all rows, so that the relative L2 error
is that of the activations alone.
"""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from executorch_moe.kernels import pack_experts, unpack_experts
from executorch_moe.kernels.experts.aten import quantize_activations
from executorch_moe.kernels.reference import reference_experts

TOKENS, EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, GROUP = 33, 8, 8, 2048, 512, 128


def rounded(x: Tensor, act_group: int) -> Tensor:
    """Rounds to int8 in groups of `act_group` activations, or to bf16 if it is 0; returns fp32."""
    return quantize_activations(x, act_group) if act_group else x.bfloat16().float()


def layer(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, groups: tuple[int, int]) -> Tensor:
    """An expert layer in fp32 with rounded inputs of both GEMMs: x fp32 [T, H] -> bf16 [T, H]."""
    out = torch.zeros_like(x)
    for expert in range(gate_up.shape[0]):
        token, slot = (ids == expert).nonzero(as_tuple=True)
        gate, up = (rounded(x[token], groups[0]) @ gate_up[expert].T).chunk(2, dim=-1)
        y = rounded(torch.nn.functional.silu(gate) * up, groups[1]) @ down[expert].T
        out.index_add_(0, token, weights[token, slot][:, None] * y)
    return out.bfloat16()


def main() -> None:
    torch.manual_seed(0)
    gate_up = torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN) / HIDDEN**0.5
    down = torch.randn(EXPERTS, HIDDEN, INTERMEDIATE) / INTERMEDIATE**0.5
    gate_up, down = unpack_experts(pack_experts(gate_up, down, scheme="w4a16", group_size=GROUP))
    x = torch.randn(TOKENS, HIDDEN).bfloat16().float()
    ids = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(TOKENS)])
    weights = torch.randn(TOKENS, TOP_K).softmax(-1)
    exact = reference_experts(x, ids, weights, gate_up, down)

    title = f"relative L2 error; {TOKENS} tokens, H={HIDDEN}, I={INTERMEDIATE}, torch {torch.__version__}"
    table = Table("GEMM1 input", "GEMM2 input", "error", title=title)
    for first in (0, 32, 64, 128, 512, 1024, HIDDEN):
        for second in (0, 32, 64, 128, INTERMEDIATE):
            out = layer(x, ids, weights, gate_up, down, (first, second)).float()
            error = float((out - exact).norm() / exact.norm())
            names = (f"int8 per {g}" if g else "bf16" for g in (first, second))
            table.add_row(*names, f"{error:.2e}")
    Console().print(table)


if __name__ == "__main__":
    main()
