"""A shared expert for one token: one half beside the router, the other one in GEMM2; and the projection of a norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from executorch_moe.kernels import fused_experts
from executorch_moe.kernels.arguments import ExpertArguments
from executorch_moe.kernels.decode import op as ops
from executorch_moe.kernels.decode.aten import one_token_norm_linear_aten, one_token_shared_router_aten
from executorch_moe.kernels.decode.launches import (
    run_one_token_attention,
    run_one_token_norm_linear,
    run_one_token_shared_router,
)
from executorch_moe.kernels.experts.plan import Options, run_fused_experts
from executorch_moe.kernels.gpus import MAX_DYNAMIC_SHARED, Gpu
from executorch_moe.kernels.launch import Launch
from executorch_moe.kernels.measure.compile import compile_launch
from executorch_moe.kernels.packing.experts import PackedExperts

from ..combinations import EXHAUSTIVE
from .cases import BOUNDS, Case, make, relative_error
from .test_memory import same_bits_in_any_order
from .test_one_token import EPS, HIDDEN, _assert_close, projection, random, route_arguments

SHARED = [
    ("int8", 24, True, 12),
    ("bf16", 50, True, 12),  # a width that programs do not divide
    ("int8", 6, False, 130),  # no gate of its own; fewer elements than a power of two; programs of eight warps
]
NAMES = ("kind", "width", "own_gate", "experts_of_router")


def shared_route(kind: str, width: int, own_gate: bool, experts_of_router: int) -> ops.SharedRouteArguments:
    """With a gate of its own, the matrix also has unused rows, as padding."""
    gate_up, scale = projection(2 * width + 5 * own_gate, HIDDEN, kind)
    route = route_arguments(kind, 3, experts=experts_of_router)
    return ops.SharedRouteArguments(*route, gate_up, scale, width)


@pytest.mark.parametrize(NAMES, SHARED)
def test_the_first_half_is_that_of_plain_modules(kind: str, width: int, own_gate: bool, experts_of_router: int) -> None:
    arguments = shared_route(kind, width, own_gate, experts_of_router)
    *route, shared, share = ops.one_token_shared_router(*arguments)
    for one, other in zip(route, ops.one_token_router(*arguments.route), strict=True):
        assert torch.equal(one, other)
    x = torch.nn.functional.rms_norm(route[0][0].float(), (HIDDEN,), arguments.norm.float(), EPS)
    scale = 1.0 if arguments.gate_up_scale is None else arguments.gate_up_scale[:, None]
    y = x @ (arguments.gate_up.float() * scale).T
    expected = torch.nn.functional.silu(y[:, :width]) * y[:, width : 2 * width]
    torch.testing.assert_close(shared.float(), expected, rtol=0.02, atol=0.02)
    own = torch.sigmoid(y[:, 2 * width :][:, :1]) if own_gate else torch.ones(1, 1)
    torch.testing.assert_close(share, own, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("kind", ["int8", "bf16"])
@pytest.mark.parametrize("update", [True, False])
def test_a_projection_of_a_norm(kind: str, update: bool) -> None:
    hidden, add, norm = random(1, 1, HIDDEN), random(1, 1, HIDDEN, seed=3) if update else None, random(HIDDEN)
    weight, scale = projection(77, HIDDEN, kind)
    summed, out = ops.one_token_norm_linear(hidden, add, norm, weight, scale, EPS)
    assert torch.equal(summed, hidden if add is None else hidden + add)
    x = torch.nn.functional.rms_norm(summed.float(), (HIDDEN,), norm.float(), EPS)
    expected = x @ (weight.float() * (1.0 if scale is None else scale[:, None])).T
    torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.02)


def test_operators_as_torch_wants_them() -> None:
    arguments = (random(1, 1, HIDDEN), None, random(HIDDEN), *projection(77, HIDDEN, "int8"), EPS)
    torch.library.opcheck(torch.ops.executorch_moe.one_token_norm_linear.default, arguments)
    torch.library.opcheck(torch.ops.executorch_moe.fused_experts.default, tuple(experts(EXPERTS[0])[0]))


EXPERTS = [
    ("w4a16", "int8", Case("one token", tokens=1, experts=3, group_size=128)),
    ("w4a16", "bf16", Case("padded sizes", tokens=1, experts=3, hidden=160, intermediate=96)),
    ("mxfp4", "int8", Case("three experts of a token", tokens=1, experts=3, top_k=3)),
]
EXPERT_NAMES = [case[0] + "-" + str(case[2]) for case in EXPERTS]


def experts(case: tuple[str, str, Case], width: int = 72) -> tuple[ExpertArguments, Tensor]:
    """Arguments of `fused_experts` with a shared expert, and the fp32 result."""
    scheme, kind, sizes = case
    problem = make(sizes, scheme)
    down, scale = projection(sizes.hidden, width, kind)
    shared, share = random(1, width, seed=5), torch.tensor([[0.6]])
    arguments = problem.args()._replace(shared=shared, share=share, shared_down=down, shared_down_scale=scale)
    dense = shared.float() @ (down.float() * (1.0 if scale is None else scale[:, None])).T
    return arguments, problem.expected + share * dense


@pytest.mark.parametrize("case", EXPERTS, ids=EXPERT_NAMES)
def test_the_second_half_is_added_to_the_experts(case: tuple[str, str, Case]) -> None:
    arguments, expected = experts(case)
    assert relative_error(fused_experts(*arguments), expected) <= BOUNDS[case[0]]


BAD: list[tuple[str, Callable[[Any], Any], str]] = [
    ("shared", lambda t: t.float(), "shared has dtype float32, expected bfloat16"),
    ("shared", lambda t: t[0], r"shared has shape \[72\], expected \[1, S\]"),
    ("shared", lambda t: t.repeat(1, 15), r"shared has shape \[1, 1080\], expected \[1, S\] with S from 1 to 1024"),
    ("shared", lambda t: None, "shared, share and shared_down must be given together"),
    ("share", lambda t: t[0], r"share has shape \[1\], expected \[1, 1\]"),
    ("share", lambda t: t.bfloat16(), "share has dtype bfloat16, expected float32"),
    ("share", lambda t: None, "shared, share and shared_down must be given together"),
    ("shared_down", lambda t: t[:5], r"shared_down has shape \[5, 72\], expected \[128, 72\]"),
    ("shared_down", lambda t: t.T.contiguous().T, "shared_down must be contiguous"),
    ("shared_down_scale", lambda t: t[:5], r"shared_down_scale has shape \[5\], expected \[128\]"),
    ("shared_down_scale", lambda t: t.to("meta"), "shared_down_scale is on meta but hidden_states is on cpu"),
]


@pytest.mark.parametrize(("argument", "change", "message"), BAD, ids=[f"{row[0]}-{row[2][-20:]}" for row in BAD])
def test_bad_arguments_of_the_second_half(argument: str, change: Callable[[Any], Any], message: str) -> None:
    arguments, _ = experts(EXPERTS[0])
    with pytest.raises(ValueError, match=message):
        fused_experts(*arguments._replace(**{argument: change(getattr(arguments, argument))}))


def test_the_second_half_is_for_one_token() -> None:
    one, _ = experts(EXPERTS[0])
    several = make(Case("several", tokens=2, group_size=128), "w4a16").args()
    with pytest.raises(ValueError, match="shared was given for T=2 tokens: pass one token"):
        fused_experts(*several[:14], *one[14:])


WIDTHS = [(0, "gate_up has 53 rows, expected at least 2"), (27, "gate_up has 53 rows, .* width=27")]


@pytest.mark.parametrize(("width", "message"), WIDTHS)
def test_bad_widths(width: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.one_token_shared_router(*shared_route(*SHARED[0])._replace(width=width))


# ------------------------------------------------------------------ the kernels


@pytest.mark.interpreter
@pytest.mark.parametrize(NAMES, SHARED)
def test_interpreted_first_half(kind: str, width: int, own_gate: bool, experts_of_router: int) -> None:
    arguments = shared_route(kind, width, own_gate, experts_of_router)
    _assert_close(run_one_token_shared_router(arguments), one_token_shared_router_aten(arguments))
    same_bits_in_any_order(lambda: run_one_token_shared_router(arguments))


@pytest.mark.interpreter
@pytest.mark.parametrize("update", [True, False])
def test_interpreted_projection_of_a_norm(update: bool) -> None:
    add = random(1, 1, HIDDEN, seed=3) if update else None
    arguments = (random(1, 1, HIDDEN), add, random(HIDDEN), *projection(77, HIDDEN, "int8"), EPS)
    _assert_close(run_one_token_norm_linear(*arguments), one_token_norm_linear_aten(*arguments))
    same_bits_in_any_order(lambda: run_one_token_norm_linear(*arguments))


@pytest.mark.interpreter
@pytest.mark.parametrize("path", ["matvec", "few_tokens"])
@pytest.mark.parametrize("case", EXPERTS, ids=EXPERT_NAMES)
def test_interpreted_second_half(case: tuple[str, str, Case], path: str) -> None:
    """The few-token path adds it with a launch of its own."""
    arguments, expected = experts(case)
    out = run_fused_experts(arguments, options=Options(path))
    assert relative_error(out, expected) <= BOUNDS[case[0]]
    if path == "matvec" and case is EXPERTS[0]:
        same_bits_in_any_order(lambda: run_fused_experts(arguments, options=Options(path)))


def launches_of_qwen35(capability: int, kind: str) -> list[Launch]:
    """A token through the parts of a layer of Qwen3.5-35B-A3B, on meta tensors."""
    launches: list[Launch] = []
    options: dict[str, Any] = {
        "gpu": Gpu(capability, 132, MAX_DYNAMIC_SHARED[capability]),
        "submit": launches.append,
    }
    h, bf16 = 2048, {"dtype": torch.bfloat16}

    def matrix(rows: int, columns: int) -> tuple[Tensor, Tensor | None]:
        int8 = kind == "int8"
        return torch.empty(rows, columns, dtype=torch.int8 if int8 else torch.bfloat16), (
            torch.empty(rows) if int8 else None
        )

    with torch.device("meta"):
        row, norm, wave = torch.empty(1, 1, h, **bf16), torch.empty(h), torch.empty(1, 1, 128, **bf16)
        run_one_token_norm_linear(row, row, norm, *matrix(12352, h), EPS, **options)
        cache = torch.empty(1, 2, 2048, 256, **bf16)
        attention = ops.AttentionArguments(
            row, row, norm, *matrix(36 * 256, h), torch.empty(256), torch.empty(256), wave, wave,
            torch.empty(1, dtype=torch.int64), cache, cache, 0.0625, EPS, True,
        )  # fmt: skip
        run_one_token_attention(attention, **options)
        route = ops.SharedRouteArguments(
            torch.empty(1, 1, 4096, **bf16), *matrix(h, 4096), row, norm, torch.empty(256, h, **bf16), 8, EPS,
            *matrix(1040, h), 512,
        )  # fmt: skip
        _, normed, weights, ids, shared, share = run_one_token_shared_router(route, **options)
        weight, scale = torch.empty(256, 16, 1024, 64, dtype=torch.uint8), torch.empty(256, 16, 1024, **bf16)
        w2, w2_scale = torch.empty(256, 4, h, 64, dtype=torch.uint8), torch.empty(256, 4, h, **bf16)
        packed = PackedExperts(weight, w2, scale, w2_scale, None, None, None, None, "w4a16", 128, h, 512)
        arguments = packed.arguments(normed, ids, weights)
        down, down_scale = matrix(h, 512)
        arguments = arguments._replace(shared=shared, share=share, shared_down=down, shared_down_scale=down_scale)
        run_fused_experts(arguments, **options)
    return launches


@pytest.mark.compiler
@pytest.mark.parametrize("capability", [80, 90, 120, *(pytest.param(sm, marks=EXHAUSTIVE) for sm in (89, 100))])
def test_qwen35_compiles_without_spills(capability: int) -> None:
    launches = launches_of_qwen35(capability, "bf16" if capability in (89, 120) else "int8")
    assert [launch.kernel.__name__ for launch in launches] == [
        "moe_one_token_matvec", "moe_one_token_matvec", "moe_one_token_attention", "moe_one_token_matvec",
        "moe_one_token_shared_router", "moe_matvec", "moe_matvec",
    ]  # fmt: skip
    for launch in launches[1:]:
        report = compile_launch(launch, capability)
        assert report.shared <= MAX_DYNAMIC_SHARED[capability] and report.registers <= 255, report
        # ptxas gives the product of a norm in fp32 80 registers, and puts two values into memory.
        norm = launch.constexprs.get("HAS_NORM")
        assert report.spill_bytes <= (8 if norm else 0), report


# ------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(NAMES, [*SHARED, ("int8", 512, True, 256)])
def test_first_half_on_a_gpu(kind: str, width: int, own_gate: bool, experts_of_router: int) -> None:
    arguments = shared_route(kind, width, own_gate, experts_of_router)
    there = [part.cuda() if isinstance(part, Tensor) else part for part in arguments]
    found = ops.one_token_shared_router(*there)
    _assert_close(tuple(part.cpu() for part in found), ops.one_token_shared_router(*arguments))
    again = ops.one_token_shared_router(*there)
    assert all(torch.equal(one, other) for one, other in zip(again, found, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["matvec", "few_tokens"])
@pytest.mark.parametrize("case", EXPERTS, ids=EXPERT_NAMES)
def test_second_half_on_a_gpu(case: tuple[str, str, Case], path: str) -> None:
    arguments, expected = experts(case)
    there = ExpertArguments(*(part.cuda() if isinstance(part, Tensor) else part for part in arguments))
    out = run_fused_experts(there, options=Options(path))
    assert relative_error(out.cpu(), expected) <= BOUNDS[case[0]]
    assert torch.equal(run_fused_experts(there, options=Options(path)), out)


@pytest.mark.gpu
def test_projection_of_a_norm_on_a_gpu() -> None:
    arguments = (random(1, 1, HIDDEN), random(1, 1, HIDDEN, seed=3), random(HIDDEN), *projection(5000, HIDDEN, "int8"))
    found = ops.one_token_norm_linear(*(part.cuda() for part in arguments), EPS)
    _assert_close(tuple(part.cpu() for part in found), ops.one_token_norm_linear(*arguments, EPS))
