"""Other implementations of an expert layer, to compare with ours on the same shapes and routing.

Each generates random weights in its own layout, on the device: times do not depend on the values. A `Step` runs one
whole layer, from hidden states and routing to the sum over top_k.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from executorch_moe.export.models.upstream_experts import operator, random_weights
from executorch_moe.kernels.measure.timing import LayerInputs
from executorch_moe.kernels.shapes import LayerShape

Step = Callable[[LayerInputs], Tensor]


def upstream(name: str, shape: LayerShape, generator: torch.Generator) -> Step:
    """A layer with one of ExecuTorch's `triton::fused_moe` operators.

    Args:
        name: "fused_moe", "fused_moe_batched_gemm" or "fused_moe_batched_gemm_int8".

    Raises:
        ValueError: the installed executorch has no such operator.
    """
    function = operator(name)
    w = random_weights(shape, "cuda", generator)

    def step(layer: LayerInputs) -> Tensor:
        out: Tensor = function(
            layer.hidden_states, w.w13, w.w13_scale, w.w2, w.w2_scale, layer.topk_weights, layer.topk_ids, shape.top_k,
            shape.experts, shape.group_size,
        )  # fmt: skip
        return out

    return step


def torch_grouped_mm(shape: LayerShape, generator: torch.Generator) -> Step:
    """A layer with `torch._grouped_mm` on bf16 weights; routing uses plain torch operators."""
    e, h, i = shape.experts, shape.hidden, shape.intermediate

    def matrix(n: int, k: int) -> Tensor:
        w = torch.empty(e, n, k, dtype=torch.bfloat16, device="cuda")
        return w.normal_(0, k**-0.5, generator=generator).transpose(1, 2)

    w1, w2 = matrix(2 * i, h), matrix(h, i)

    def step(layer: LayerInputs) -> Tensor:
        ids = layer.topk_ids.reshape(-1)
        order = torch.argsort(ids, stable=True)
        ends = torch.searchsorted(ids[order], torch.arange(e, device=ids.device), right=True).to(torch.int32)
        token = order // shape.top_k
        gate, up = torch._grouped_mm(layer.hidden_states[token], w1, offs=ends).chunk(2, dim=-1)
        y = torch._grouped_mm(torch.nn.functional.silu(gate) * up, w2, offs=ends)
        weighted = y * layer.topk_weights.reshape(-1)[order, None].to(y.dtype)
        back = torch.empty_like(weighted)
        back[order] = weighted
        return back.reshape(-1, shape.top_k, h).sum(1)

    return step
