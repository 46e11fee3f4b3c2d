"""The one-token operators and their fakes refuse the same arguments; NaN, gradients and autocast."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from executorch_moe.kernels.decode import op as ops
from executorch_moe.kernels.decode.aten import one_token_router_aten
from executorch_moe.kernels.decode.launches import run_one_token_router

from .test_one_token import (
    CONTEXT,
    EXPERTS,
    attention_arguments,
    linear_arguments,
    projection,
    random,
    route_arguments,
)

Change = Callable[[Any], Any]
OPERATORS = (
    "one_token_attention", "one_token_router", "one_token_linear", "one_token_norm_linear", "one_token_shared_router",
)  # fmt: skip


def wider(t: Tensor) -> Tensor:
    """The same values in a tensor that is not contiguous."""
    return torch.stack([t, t], -1)[..., 0]


ATTENTION: list[tuple[str, Change, str]] = [
    ("hidden", lambda t: t.float(), "hidden has dtype float32, expected bfloat16: convert"),
    ("hidden", lambda t: t[0], r"hidden has shape \[1, 192\], expected \[1, 1, columns\]"),
    ("hidden", lambda t: t.repeat(1, 2, 1), r"hidden has shape \[1, 2, 192\].* one token"),
    ("update", lambda t: t[..., :64], r"update has shape \[1, 1, 64\], expected \[1, 1, 192\]"),
    ("update", lambda t: t.float(), "update has dtype float32"),
    ("norm", lambda t: t[:64], r"norm has shape \[64\], expected 192 elements"),
    ("norm", lambda t: t.long(), "norm has dtype int64"),
    ("weight", lambda t: t[:, :64].contiguous(), r"weight has shape .* expected \[N, 192\]"),
    ("weight", lambda t: t.float(), "weight has dtype float32, expected int8 or bfloat16"),
    ("weight", wider, "weight must be contiguous, strides are"),
    ("scale", lambda t: t[:5], r"scale has shape \[5\], expected"),
    ("scale", lambda t: t.bfloat16(), "scale has dtype bfloat16, expected float32"),
    ("scale", lambda t: t.to("meta"), "scale is on meta but hidden is on cpu: move both"),
    ("q_norm", lambda t: t[:1], r"q_norm has shape \[1, 16\], expected 32 elements"),
    ("k_norm", lambda t: t.long(), "k_norm has dtype int64"),
    ("cos", lambda t: t.repeat(1, 1, 2), r"cos has shape \[1, 1, 32\], expected 16 elements: .* first half"),
    ("sin", lambda t: t[..., :8], r"sin has shape \[1, 1, 8\], expected 16 elements"),
    ("position", lambda t: t.int(), "position has dtype int32, expected int64"),
    ("position", lambda t: t.repeat(2), r"position has shape \[2\], expected \[1\]"),
    ("key", lambda t: t[0], r"key has shape .* expected \[1, kv_heads, C, D\]"),
    ("key", lambda t: t.float(), "key has dtype float32"),
    ("value", lambda t: t[:, :, 1:], r"value has shape .* expected \[1, 2, 200, 32\]"),
    ("scaling", lambda _: math.nan, "scaling=nan must be a finite number"),
    ("eps", lambda _: -1.0, r"eps=-1.0 must be a finite number, 0 or more"),
]
ROUTE: list[tuple[str, Change, str]] = [
    ("x", lambda t: t.float(), "x has dtype float32, expected bfloat16"),
    ("x", lambda t: t[..., :32], r"weight has shape \[192, 96\], expected \[N, 32\]"),
    ("weight", lambda t: t[:64], r"weight has 64 rows, expected H=192"),
    ("scale", lambda t: t[:64], r"scale has shape \[64\], expected \[192\]"),
    ("residual", lambda t: t[0], r"residual has shape \[1, 192\]"),
    ("norm", lambda t: t[:64], r"norm has shape \[64\], expected 192 elements"),
    ("router", lambda t: t[:, :64], r"router has shape \[12, 64\], expected \[E, H=192\]"),
    ("router", lambda t: t.float(), "router has dtype float32"),
    ("router", lambda t: t.repeat(100, 1), "router has E=1200 experts, expected 1024 at most"),
    ("router", wider, "router must be contiguous"),
    ("top_k", lambda _: 0, "top_k=0 must be from 1 to the E=12 experts"),
    ("top_k", lambda _: EXPERTS + 1, "top_k=13 must be from 1 to the E=12 experts"),
    ("eps", lambda _: math.inf, "eps=inf must be a finite number"),
]
LINEAR: list[tuple[str, Change, str]] = [
    ("x", lambda t: t.float(), "x has dtype float32"),
    ("x", lambda t: t.repeat(1, 2, 1), r"x has shape \[1, 2, 96\], expected one row"),
    ("weight", lambda t: t.T.contiguous(), r"weight has shape \[96, 50\], expected \[N, 96\]"),
    ("weight", wider, "weight must be contiguous"),
    ("scale", lambda t: t[:7], r"scale has shape \[7\], expected \[50\]"),
    ("scale", lambda t: t.to("meta"), "scale is on meta but x is on cpu"),
]


NORM_LINEAR: list[tuple[str, Change, str]] = [
    ("hidden", lambda t: t[0], r"hidden has shape \[1, 96\], expected \[1, 1, columns\]"),
    ("update", lambda t: t[..., :64], r"update has shape \[1, 1, 64\], expected \[1, 1, 96\]"),
    ("update", lambda t: t.float(), "update has dtype float32"),
    ("norm", lambda t: t[:64], r"norm has shape \[64\], expected 96 elements"),
    ("weight", lambda t: t[:, :64].contiguous(), r"weight has shape .* expected \[N, 96\]"),
    ("weight", wider, "weight must be contiguous"),
    ("scale", lambda t: t[:7], r"scale has shape \[7\], expected \[50\]"),
    ("eps", lambda _: -1.0, r"eps=-1.0 must be a finite number, 0 or more"),
]
SHARED_ROUTE: list[tuple[str, Change, str]] = [
    ("router", lambda t: t[:, :64], r"router has shape \[12, 64\], expected \[E, H=192\]"),
    ("gate_up", lambda t: t[:, :64].contiguous(), r"gate_up has shape .* expected \[N, 192\]"),
    ("gate_up", wider, "gate_up must be contiguous"),
    ("gate_up_scale", lambda t: t[:7], r"scale has shape \[7\], expected \[43\]"),
    ("width", lambda _: 22, "gate_up has 43 rows, expected at least 2 .* width=22"),
]


def arguments_of(name: str) -> tuple[Any, dict[str, Any]]:
    if name == "one_token_attention":
        fields, values = ops.AttentionArguments._fields, attention_arguments("int8", 4, 5, True)
    elif name == "one_token_router":
        fields, values = ops.RouteArguments._fields, route_arguments("int8", 3)
    elif name == "one_token_shared_router":
        matrix = projection(43, 192, "int8")
        fields, values = ops.SharedRouteArguments._fields, (*route_arguments("int8", 3), *matrix, 21)
    elif name == "one_token_norm_linear":
        fields = ("hidden", "update", "norm", "weight", "scale", "eps")
        values = (random(1, 1, 96), random(1, 1, 96, seed=1), random(96), *projection(50, 96, "int8"), 1e-6)
    else:
        fields, values = ("x", "weight", "scale"), linear_arguments("int8", 50, 96)
    return getattr(torch.ops.executorch_moe, name), dict(zip(fields, values, strict=True))


CASES = [
    (operator, *case)
    for operator, cases in (
        ("one_token_attention", ATTENTION),
        ("one_token_router", ROUTE),
        ("one_token_linear", LINEAR),
        ("one_token_norm_linear", NORM_LINEAR),
        ("one_token_shared_router", SHARED_ROUTE),
    )
    for case in cases
]


def case_name(part: object) -> str:
    """Part of a test's name. It must be the same in every process, so it contains no address of a function."""
    return "changed" if callable(part) else str(part)[:30]


@pytest.mark.parametrize(("operator", "argument", "change", "message"), CASES, ids=case_name)
def test_bad_arguments_get_a_reason(operator: str, argument: str, change: Change, message: str) -> None:
    run, arguments = arguments_of(operator)
    arguments[argument] = change(arguments[argument])
    with pytest.raises(ValueError, match=message):
        run(*arguments.values())
    if any(isinstance(a, Tensor) and a.is_meta for a in arguments.values()):
        return  # fake tensors have devices of their own
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments.values()]
    with mode, pytest.raises(ValueError, match=message):
        run(*fakes)


@pytest.mark.parametrize("heads", [0, 3])
def test_rows_that_are_no_heads(heads: int) -> None:
    run, arguments = arguments_of("one_token_attention")
    rows = (heads + 4) * 32  # four of them are for two key/value heads
    arguments["weight"], arguments["scale"] = arguments["weight"][:rows], arguments["scale"][:rows]
    with pytest.raises(ValueError, match=f"weight has {rows} rows, expected .* kv_heads=2, D=32"):
        run(*arguments.values())


@pytest.mark.parametrize("position", [-1, CONTEXT + 1, 2**40])
def test_positions_outside_the_cache(position: int) -> None:
    run, arguments = arguments_of("one_token_attention")
    arguments["position"].fill_(position)
    with pytest.raises(ValueError, match=f"position={position} must be from 0 to the C={CONTEXT} positions"):
        run(*arguments.values())


def test_tokens_that_are_not_contiguous_are_taken() -> None:
    """Activations may be strided, because they are new for each token. Only weights and caches must be contiguous."""
    for name in OPERATORS:
        run, arguments = arguments_of(name)
        first = next(iter(arguments))
        expected = run(*arguments.values())
        arguments[first] = wider(arguments[first])
        found = run(*arguments.values())
        pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
        assert all(torch.equal(one.nan_to_num(), other.nan_to_num()) for one, other in pairs)


@pytest.mark.parametrize("name", OPERATORS)
def test_all_checks_of_torch(name: str) -> None:
    run, arguments = arguments_of(name)
    for cache in ("key", "value"):  # opcheck compares results, and NaN is not equal to itself
        if cache in arguments:
            arguments[cache].nan_to_num_()
    torch.library.opcheck(run.default, tuple(arguments.values()))


@pytest.mark.parametrize("name", OPERATORS)
def test_backward_says_that_there_is_none(name: str) -> None:
    run, arguments = arguments_of(name)
    first = next(iter(arguments))
    arguments[first] = arguments[first].requires_grad_()
    out = run(*arguments.values())
    with pytest.raises(NotImplementedError, match=f"{name} is for inference only and has no gradient: .*no_grad"):
        (out[0] if isinstance(out, tuple) else out).sum().backward()


def broken_route(logits: str) -> tuple[object, ...]:
    """Arguments of `one_token_router` whose logits are all NaN, or NaN for three experts, or all infinite."""
    x, weight, scale, residual, norm, router, _, eps = route_arguments("bf16", 4)
    if logits == "all":
        residual = torch.full_like(residual, torch.nan)
    elif logits == "some":
        router[[2, 5, 11]] = torch.nan
    else:
        router[:] = torch.finfo(torch.bfloat16).max
        norm = torch.full_like(norm, 3e38)
    return x, weight, scale, residual, norm, router, 4, eps


def check_ids(ids: Tensor, logits: str) -> None:
    assert ids.shape == (1, 4) and len(set(ids[0].tolist())) == 4
    assert ids.min() >= 0 and ids.max() < EXPERTS
    if logits == "all":
        assert ids.tolist() == [[0, 1, 2, 3]]
    if logits == "some":
        assert ids[0, :3].tolist() == [2, 5, 11]


@pytest.mark.parametrize("logits", ["all", "some", "infinite"])
def test_experts_are_chosen_whatever_the_logits_are(logits: str) -> None:
    *_, weights, ids = ops.one_token_router(*broken_route(logits))
    check_ids(ids, logits)
    assert weights.isnan().all()  # NaN stays visible


@pytest.mark.interpreter
@pytest.mark.parametrize("logits", ["all", "some", "infinite"])
def test_interpreted_experts_are_chosen_whatever_the_logits_are(logits: str) -> None:
    arguments = ops.RouteArguments(*broken_route(logits))
    *_, weights, ids = run_one_token_router(arguments)
    check_ids(ids, logits)
    assert ids.tolist() == one_token_router_aten(arguments)[3].tolist() and weights.isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("logits", ["all", "some", "infinite"])
def test_experts_are_chosen_whatever_the_logits_are_on_a_gpu(logits: str) -> None:
    arguments = broken_route(logits)
    # Memory that the allocator reuses must not hold a right answer by chance.
    torch.full((4096,), -1, dtype=torch.int64, device="cuda")
    *_, weights, ids = ops.one_token_router(*(t.cuda() if isinstance(t, Tensor) else t for t in arguments))
    check_ids(ids.cpu(), logits)
    assert ids.tolist() == ops.one_token_router(*arguments)[3].tolist() and weights.isnan().all()


def test_the_hidden_size_of_a_row_is_bounded() -> None:
    hidden = 8320
    row = random(1, 1, hidden)
    with pytest.raises(ValueError, match="residual has H=8320, expected 8192 at most"):
        ops.one_token_router(
            random(1, 1, 32), random(hidden, 32), None, row, random(hidden), random(4, hidden), 2, 1e-6
        )
