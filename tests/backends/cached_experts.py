"""A small module with fused experts and state, and its exported methods."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram, export

from executorch_moe.kernels import FusedExperts, pack_experts

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 64, 32, 8, 2
CONTEXT = 32


class CachedExperts(torch.nn.Module):
    """Experts that write their outputs to a cache, like a KV cache; returns the cache plus a call counter.

    Routing is an input: the GEMM of a router rounds differently in every library, which would hide whether the experts
    themselves are equal bit for bit.
    """

    def __init__(self, scheme: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        gate_up = torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN, generator=generator) * 0.1
        down = torch.randn(EXPERTS, HIDDEN, INTERMEDIATE, generator=generator) * 0.1
        self.experts = FusedExperts(pack_experts(gate_up, down, scheme=scheme, group_size=32))
        self.register_buffer("cache", torch.zeros(CONTEXT, HIDDEN, dtype=dtype))
        self.register_buffer("calls", torch.full((16,), 3, dtype=torch.int64))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, position: Tensor) -> Tensor:
        self.cache[position] = self.experts(x, ids, weights)
        self.calls.add_(1)
        return self.cache.float() + self.calls[0]


def inputs(tokens: int, dtype: torch.dtype = torch.bfloat16, start: int = 0, seed: int = 1) -> tuple[Tensor, ...]:
    """Inputs of `CachedExperts` for `tokens` tokens at positions from `start`."""
    generator = torch.Generator().manual_seed(seed + 1000 * start + tokens)
    x = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    scores = torch.randn(tokens, EXPERTS, generator=generator).softmax(-1)
    weights, ids = scores.topk(TOP_K, -1)
    return x, ids, weights, torch.arange(start, start + tokens)


def methods(module: CachedExperts, dtype: torch.dtype = torch.bfloat16) -> dict[str, ExportedProgram]:
    """Export prefill (dynamic T in 2..CONTEXT) and decode (T=1) on the same buffers."""
    tokens = Dim("T", min=2, max=CONTEXT)
    return {
        "prefill": export(module, inputs(5, dtype), dynamic_shapes=tuple({0: tokens} for _ in range(4))),
        "decode": export(module, inputs(1, dtype)),
    }
