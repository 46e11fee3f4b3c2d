"""Problems that every kernel path must solve, with the reference's result for each."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from executorch_moe.kernels import PackedExperts, pack_experts, unpack_experts
from executorch_moe.kernels.arguments import ExpertArguments
from executorch_moe.kernels.packing.fragments import deinterleave_gate_up
from executorch_moe.kernels.reference import reference_experts


@dataclass(frozen=True)
class Case:
    """One problem; `why` is the reason for it."""

    why: str
    tokens: int
    experts: int = 8
    top_k: int = 2
    hidden: int = 128
    intermediate: int = 128
    group_size: int = 32
    routing: str = "uniform"
    bias: bool = False
    zero: bool = False
    activation: str = "silu"
    spread: float = 1.0  # of the tokens

    def __str__(self) -> str:
        return self.why.replace(" ", "-")


CASES = (
    Case("one token", tokens=1),
    Case("one token and scales of whole K blocks", tokens=1, hidden=256, group_size=128),
    Case("a partial block", tokens=15, experts=3),
    Case("one past a block", tokens=17, experts=3, top_k=1),
    Case("hidden size not a multiple of 128", tokens=9, experts=3, hidden=160, intermediate=96),
    Case("several K blocks and N tiles", tokens=12, experts=3, hidden=384, intermediate=256, group_size=128),
    Case("group size 64", tokens=12, experts=3, hidden=256, intermediate=192, group_size=64),
    Case("prime number of experts, most of them empty", tokens=3, experts=13, top_k=1),
    Case("one hot expert", tokens=40, experts=5, top_k=1, routing="hot"),
    Case("top_k equals E", tokens=6, experts=4, top_k=4),
    Case("dropped ids", tokens=11, routing="dropped"),
    Case("every id dropped", tokens=5, routing="all dropped"),
    Case("biases", tokens=7, bias=True),
    Case("clamped swiglu beyond its limits", tokens=7, bias=True, activation="swiglu_oai", spread=4.0),
    Case("clamped swiglu with padding", tokens=5, hidden=160, intermediate=96, activation="swiglu_oai"),
)

ZERO_CASE = Case("zero points", tokens=13, hidden=256, zero=True)


@dataclass
class Problem:
    """Inputs of a case and the fp32 result."""

    packed: PackedExperts
    hidden_states: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    expected: Tensor
    activation: str = "silu"

    def args(self, device: str = "cpu") -> ExpertArguments:
        tensors = (t.to(device) for t in (self.hidden_states, self.topk_ids, self.topk_weights))
        return self.packed.to(device).arguments(*tensors, activation=self.activation)


def first_tokens(problem: Problem, tokens: int) -> Problem:
    """The problem with at most `tokens` tokens, for paths that are meant for few."""
    names = ("hidden_states", "topk_ids", "topk_weights", "expected")
    return replace(problem, **{name: getattr(problem, name)[:tokens] for name in names})


def routing_of(case: Case) -> Tensor:
    """Expert ids, int64 [T, top_k]; those of a token differ unless they are dropped."""
    if case.routing == "hot":
        return torch.full((case.tokens, case.top_k), case.experts - 1)
    ids = torch.stack([torch.randperm(case.experts)[: case.top_k] for _ in range(case.tokens)])
    if case.routing == "dropped":
        ids[::3, 0] = -1
        ids[1::3, 1] = case.experts
        ids[2::5] = 2**40
    elif case.routing == "all dropped":
        ids.fill_(-1)
    return ids


def make(case: Case, scheme: str) -> Problem:
    """Random weights, tokens and routing of a case; the expected result is that of the dequantized weights.

    The group size of mxfp4 is 32 in every case.
    """
    torch.manual_seed(1)
    e, h, i = case.experts, case.hidden, case.intermediate
    group_size = 32 if scheme == "mxfp4" else case.group_size
    gate_up = torch.randn(e, 2 * i, h) / h**0.5
    down = torch.randn(e, h, i) / i**0.5
    bias = (torch.randn(e, 2 * i) * 0.2, torch.randn(e, h) * 0.2) if case.bias else (None, None)
    packed = pack_experts(gate_up, down, scheme=scheme, group_size=group_size, gate_up_bias=bias[0], down_bias=bias[1])
    if case.zero:
        packed.w13_zero, packed.w2_zero = zero_points(packed.w13_scale), zero_points(packed.w2_scale)
    x = (torch.randn(case.tokens, h) * case.spread).bfloat16()
    ids = routing_of(case)
    weights = torch.randn(case.tokens, case.top_k).softmax(-1)
    dequantized = unpack_experts(packed)
    expected = reference_experts(x, ids, weights, *dequantized, *bias, activation=case.activation)
    return Problem(packed, x, ids, weights, expected, case.activation)


def zero_points(scale: Tensor | None) -> Tensor:
    """Random zero points for these scales; in padding, scale and zero point stay zero."""
    assert scale is not None
    return torch.where(scale == 0, 0.0, torch.randn(scale.shape) * 0.02).bfloat16()


def stored_bias(packed: PackedExperts) -> Tensor:
    """The gate-up bias of a packed layer in gate-then-up order, fp32 [E, 2*Ip]."""
    assert packed.w13_bias is not None
    return deinterleave_gate_up(packed.w13_bias)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||; 0 if both are zero."""
    norm = expected.norm()
    difference = (actual.float().cpu() - expected).norm()
    return float(difference / norm) if norm > 0 else float(difference)


# Error bounds: bf16 rounding of inputs, intermediate, pair outputs and result; for 4 bits also of decoded weights.
BOUNDS = {"bf16": 4.0e-3, "w4a16": 4.5e-3, "w4a8": 1.2e-2, "mxfp4": 4.5e-3}
