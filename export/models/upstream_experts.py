"""Experts on ExecuTorch's own `triton::fused_moe` operators, to compare with ours in the same model."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from executorch_moe.kernels.packing.rounding import quantize_int4
from executorch_moe.kernels.shapes import LayerShape

PREFILL = {"w4a16": "fused_moe_batched_gemm", "w4a8": "fused_moe_batched_gemm_int8"}
"""Scheme -> ExecuTorch's operator for several tokens. For one token there is only `fused_moe`."""


@dataclass
class UpstreamWeights:
    """Weights in ExecuTorch's layout: codes int8 [E, N, K/2] and scale bf16 [E, N, K/group_size].

    The low nibble of a byte has the even k. value = (nibble - 8) * scale.
    """

    w13: Tensor
    w13_scale: Tensor
    w2: Tensor
    w2_scale: Tensor

    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.w13.nbytes + self.w13_scale.nbytes + self.w2.nbytes + self.w2_scale.nbytes


class UpstreamMoE(nn.Module):
    """Replaces an experts module as `FusedExperts` does; gate rows come first in w13, then up rows; silu(gate) * up.

    Our partitioners must not fuse it: its name does not end in `Experts`, and its scales are 2-D.
    """

    activation = "silu"
    w2_bias = None

    def __init__(self, weights: UpstreamWeights, top_k: int, scheme: str, group_size: int) -> None:
        """Wraps packed weights.

        Raises:
            ValueError: ExecuTorch has no operator for the scheme, or the installed version has none of these operators.
        """
        super().__init__()
        if scheme not in PREFILL:
            raise ValueError(f"scheme={scheme!r} has no operator upstream: use one of {', '.join(PREFILL)}")
        self.decode, self.prefill = operator("fused_moe"), operator(PREFILL[scheme])
        self.num_experts, rows, half = weights.w13.shape
        self.hidden_size, self.intermediate_size = 2 * half, rows // 2
        self.top_k, self.scheme, self.group_size = top_k, scheme, group_size
        self.register_buffer("w13", weights.w13)
        self.register_buffer("w2", weights.w2)
        self.register_buffer("w13_scale", weights.w13_scale.flatten(0, 1))
        self.register_buffer("w2_scale", weights.w2_scale.flatten(0, 1))

    def packed(self) -> UpstreamWeights:
        """The weights in the operators' shapes, without copies."""

        def by_expert(scale: Tensor) -> Tensor:
            return scale.unflatten(0, (self.num_experts, -1))

        return UpstreamWeights(self.w13, by_expert(self.w13_scale), self.w2, by_expert(self.w2_scale))

    def forward(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Computes what `FusedExperts.forward` does. CUDA only."""
        one = isinstance(hidden_states.shape[0], int) and hidden_states.shape[0] == 1
        w = self.packed()
        out: Tensor = (self.decode if one else self.prefill)(
            hidden_states.to(torch.bfloat16), w.w13, w.w13_scale, w.w2, w.w2_scale, topk_weights.float(),
            topk_ids.to(torch.int64), self.top_k, self.num_experts, self.group_size,
        )  # fmt: skip
        return out.to(hidden_states.dtype)


def operator(name: str) -> Any:
    """One of ExecuTorch's operators, by name.

    Raises:
        ValueError: the installed executorch has no such operator.
    """
    try:
        # By path: in the package, the module's name refers to a function.
        return getattr(importlib.import_module("executorch.backends.cuda.triton.kernels.fused_moe"), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"the installed executorch has no {name} ({error}): install executorch 1.5.1") from None


def pack(gate_up: Tensor, down: Tensor, group_size: int) -> UpstreamWeights:
    """gate_up float [E, 2I, H], down [E, H, I] -> the codes and scales of our packing, in ExecuTorch's layout."""

    def matrix(weight: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale = quantize_int4(weight, group_size)
        nibbles = (codes + 8).to(torch.uint8)
        return (nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)).view(torch.int8), scale

    (w13, s13), (w2, s2) = matrix(gate_up), matrix(down)
    return UpstreamWeights(w13, s13, w2, s2)


def placeholder_weights(experts: int, hidden: int, intermediate: int, group_size: int) -> UpstreamWeights:
    """Uninitialized weights on the CPU, with which a model can be traced."""

    def matrix(n: int, k: int) -> tuple[Tensor, Tensor]:
        codes = torch.empty(experts, n, k // 2, dtype=torch.int8)
        return codes, torch.empty(experts, n, k // group_size, dtype=torch.bfloat16)

    (w13, s13), (w2, s2) = matrix(2 * intermediate, hidden), matrix(hidden, intermediate)
    return UpstreamWeights(w13, s13, w2, s2)


def random_weights(shape: LayerShape, device: str, generator: torch.Generator) -> UpstreamWeights:
    """Random weights, generated on the device; a uniform nibble has a standard deviation of 4.6."""
    e, h, i, g = shape.experts, shape.hidden, shape.intermediate, shape.group_size

    def matrix(n: int, k: int) -> tuple[Tensor, Tensor]:
        words = torch.empty(e, n, k // 16, dtype=torch.int64, device=device)
        codes = words.random_(-(2**63), None, generator=generator).view(torch.int8)
        scale = torch.rand(e, n, k // g, device=device, generator=generator) * (k**-0.5 / 4.6)
        return codes, scale.bfloat16()

    (w13, s13), (w2, s2) = matrix(2 * i, h), matrix(h, i)
    return UpstreamWeights(w13, s13, w2, s2)
