"""The one-token operators: CPU kernels against plain torch modules, and Triton kernels against the CPU kernels."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from executorch_moe.kernels.decode import launches as launches_module
from executorch_moe.kernels.decode import op as ops
from executorch_moe.kernels.decode.aten import one_token_attention_aten, one_token_linear_aten, one_token_router_aten
from executorch_moe.kernels.decode.launches import (
    run_one_token_attention,
    run_one_token_linear,
    run_one_token_router,
    splits_of,
)
from executorch_moe.kernels.gpus import MAX_DYNAMIC_SHARED, Gpu, find_model
from executorch_moe.kernels.launch import Launch
from executorch_moe.kernels.measure.compile import compile_kernel, compile_launch

HIDDEN, KV_HEADS, HEAD_DIM, CONTEXT, EXPERTS = 192, 2, 32, 200, 12
EPS = 1e-6


def random(*shape: int, seed: int = 0, deviation: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator) * deviation).bfloat16()


def projection(rows: int, columns: int, kind: str) -> tuple[Tensor, Tensor | None]:
    if kind == "bf16":
        return random(rows, columns, deviation=columns**-0.5), None
    generator = torch.Generator().manual_seed(rows)
    codes = torch.randint(-127, 128, (rows, columns), generator=generator, dtype=torch.int8)
    return codes, (torch.rand(rows, generator=generator) + 0.5) / (73 * columns**0.5)


def attention_arguments(kind: str, groups: int, position: int, update: bool, gated: bool = False) -> tuple[object, ...]:
    """The cache holds NaN from `position` on, because no result may depend on it."""
    weight, scale = projection(((1 + gated) * groups + 2) * KV_HEADS * HEAD_DIM, HIDDEN, kind)
    angle = torch.linspace(0.0, 3.0, HEAD_DIM // 2)[None, None] * position
    key, value = (random(1, KV_HEADS, CONTEXT, HEAD_DIM, seed=seed) for seed in (1, 2))
    key[:, :, position:], value[:, :, position:] = torch.nan, torch.nan
    return (
        random(1, 1, HIDDEN), random(1, 1, HIDDEN, seed=3) if update else None, random(HIDDEN), weight, scale,
        random(2, HEAD_DIM // 2), random(2, HEAD_DIM // 2, seed=1), angle.cos().bfloat16(), angle.sin().bfloat16(),
        torch.tensor([position]), key, value, HEAD_DIM**-0.5, EPS, gated,
    )  # fmt: skip


def route_arguments(kind: str, top_k: int, tied: bool = False, experts: int = EXPERTS) -> tuple[object, ...]:
    weight, scale = projection(HIDDEN, 96, kind)
    router = random(experts, HIDDEN, deviation=HIDDEN**-0.5)
    if tied:
        router[3:] = router[:1]
    return random(1, 1, 96), weight, scale, random(1, 1, HIDDEN), random(HIDDEN), router, top_k, EPS


ATTENTION = [
    ("int8", 4, 150, True, False),
    ("bf16", 4, 64, False, False),  # no update, as in the first layer
    ("int8", 1, 0, True, False),  # an empty cache
    ("int8", 3, 1, True, True),  # not a power of two of query heads; an output gate
    ("int8", 4, CONTEXT - 1, True, False),  # the last position
]
ATTENTION_NAMES = ("kind", "groups", "position", "update", "gated")


@pytest.mark.parametrize(ATTENTION_NAMES, ATTENTION)
def test_attention_is_that_of_plain_modules(kind: str, groups: int, position: int, update: bool, gated: bool) -> None:
    arguments = attention_arguments(kind, groups, position, update, gated)
    hidden, add, norm, weight, scale, q_norm, k_norm, cos, sin, _, key, value, scaling, eps, _ = arguments
    summed, out, new = ops.one_token_attention(*arguments)
    x = hidden if add is None else hidden + add
    assert torch.equal(summed, x)
    x = torch.nn.functional.rms_norm(x.float(), (HIDDEN,), norm.float(), eps)
    rows = (x @ (weight.float() * (1.0 if scale is None else scale[:, None])).T).unflatten(-1, (-1, HEAD_DIM))[0, 0]
    query, fresh, last, gate = rows.split([groups * KV_HEADS, KV_HEADS, KV_HEADS, gated * groups * KV_HEADS])

    def turn(part: Tensor, weight: Tensor) -> Tensor:
        part = torch.nn.functional.rms_norm(part, (HEAD_DIM,), weight.flatten().float(), eps)
        low, high = part.chunk(2, -1)
        cos_both, sin_both = (half.flatten().float().repeat(2) for half in (cos, sin))
        return part * cos_both + torch.cat([-high, low], -1) * sin_both

    fresh = turn(fresh, k_norm)
    keys = torch.cat([key[0, :, :position].float(), fresh[:, None]], 1)
    values = torch.cat([value[0, :, :position].float(), last[:, None]], 1)
    expected = torch.nn.functional.scaled_dot_product_attention(
        turn(query, q_norm)[None, :, None], keys[None], values[None], scale=scaling, enable_gqa=True
    )
    expected = expected[0, :, 0] * torch.sigmoid(gate) if gated else expected
    torch.testing.assert_close(out.float().flatten(), expected.flatten(), rtol=0.02, atol=0.02)
    torch.testing.assert_close(new.float().flatten(), torch.stack([fresh, last]).flatten(), rtol=0.01, atol=0.01)


@pytest.mark.parametrize(("kind", "top_k"), [("int8", 4), ("bf16", 1), ("int8", EXPERTS)])
def test_routing_is_that_of_plain_modules(kind: str, top_k: int) -> None:
    x, weight, scale, residual, norm, router, _, eps = route_arguments(kind, top_k)
    out, normed, weights, ids = ops.one_token_router(x, weight, scale, residual, norm, router, top_k, eps)
    expected = x.float() @ (weight.float() * (1.0 if scale is None else scale[:, None])).T + residual.float()
    torch.testing.assert_close(out.float(), expected, rtol=0.01, atol=0.01)
    row = torch.nn.functional.rms_norm(out[0].float(), (HIDDEN,), norm.float(), eps)
    torch.testing.assert_close(normed.float(), row, rtol=0.01, atol=0.01)
    chosen, best = (normed @ router.T).float().topk(top_k)
    assert ids.tolist() == best.tolist()
    torch.testing.assert_close(weights, chosen.softmax(-1))


def test_of_equal_experts_the_first_are_taken() -> None:
    *_, ids = ops.one_token_router(*route_arguments("bf16", 5, tied=True))
    ties = [expert for expert in ids[0].tolist() if expert not in (1, 2)]
    assert ties == sorted(ties) and ties[0] == 0 and (len(ties) < 2 or ties[1] == 3)


@pytest.mark.parametrize("update", [True, False])
def test_operators_as_torch_wants_them(update: bool) -> None:
    attention = attention_arguments("int8", 2, 5, update, gated=not update)
    for index in (10, 11):  # opcheck compares results, and NaN is not equal to itself
        attention[index].nan_to_num_()  # type: ignore[attr-defined]
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.executorch_moe.one_token_attention, attention, test_utils=checks)
    torch.library.opcheck(torch.ops.executorch_moe.one_token_router, route_arguments("int8", 3), test_utils=checks)


def test_parts_of_the_cache_fill_a_gpu() -> None:
    assert splits_of(Gpu(90, 132, 232448), 4) == 32
    assert splits_of(Gpu(90, 132, 232448), 1) == 32
    assert splits_of(Gpu(90, 132, 232448), 8) == 16
    assert splits_of(Gpu(90, 4, 232448), 8) == 1


LINEAR = [("int8", 5000, 96), ("bf16", 96, 2048), ("int8", 33, 4500)]  # rows and columns that are not powers of two


def linear_arguments(kind: str, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor | None]:
    return random(1, 1, columns), *projection(rows, columns, kind)


@pytest.mark.parametrize(("kind", "rows", "columns"), LINEAR)
def test_linear_is_that_of_a_plain_module(kind: str, rows: int, columns: int) -> None:
    x, weight, scale = linear_arguments(kind, rows, columns)
    expected = torch.nn.functional.linear(x.double(), weight.double() * (1.0 if scale is None else scale[:, None]))
    torch.testing.assert_close(ops.one_token_linear(x, weight, scale).double(), expected, rtol=0.01, atol=0.01)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.executorch_moe.one_token_linear, (x, weight, scale), test_utils=checks)


def _assert_close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        if one.dtype == torch.int64:
            assert one.tolist() == other.tolist()
        else:
            torch.testing.assert_close(one.float(), other.float(), rtol=0.01, atol=0.01)


@pytest.mark.interpreter
@pytest.mark.parametrize(ATTENTION_NAMES, ATTENTION)
def test_interpreted_attention(kind: str, groups: int, position: int, update: bool, gated: bool) -> None:
    assert os.environ.get("TRITON_INTERPRET") == "1"
    arguments = ops.AttentionArguments(*attention_arguments(kind, groups, position, update, gated))
    _assert_close(run_one_token_attention(arguments), one_token_attention_aten(arguments))


@pytest.mark.interpreter
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("kind", "top_k"), [("int8", 4), ("bf16", 1), ("int8", EXPERTS)])
def test_interpreted_routing(kind: str, top_k: int, tied: bool) -> None:
    arguments = ops.RouteArguments(*route_arguments(kind, top_k, tied))
    _assert_close(run_one_token_router(arguments), one_token_router_aten(arguments))


@pytest.mark.interpreter
@pytest.mark.parametrize(("kind", "rows", "columns"), LINEAR)
def test_interpreted_linear(kind: str, rows: int, columns: int) -> None:
    arguments = linear_arguments(kind, rows, columns)
    _assert_close((run_one_token_linear(*arguments),), (one_token_linear_aten(*arguments),))


@pytest.mark.compiler
@pytest.mark.parametrize("capability", [80, 90, 120])
def test_qwen3_30b_compiles_without_spills(capability: int) -> None:
    launches: list[Launch] = []
    gpu = Gpu(capability, 132, MAX_DYNAMIC_SHARED[capability])
    with torch.device("meta"):
        bf16 = {"dtype": torch.bfloat16}
        row, cache = torch.empty(1, 1, 2048, **bf16), torch.empty(1, 4, 2304, 128, **bf16)
        norm, half, wave = torch.empty(2048, **bf16), torch.empty(2, 64, **bf16), torch.empty(1, 1, 64, **bf16)
        weight, scale = torch.empty(5120, 2048, dtype=torch.int8), torch.empty(5120)
        position = torch.empty(1, dtype=torch.int64)
        for update in (None, row):
            arguments = ops.AttentionArguments(
                row, update, norm, weight, scale, half, half, wave, wave, position, cache, cache, 0.1, EPS
            )
            run_one_token_attention(arguments, gpu=gpu, submit=launches.append)
        weight, scale = torch.empty(2048, 4096, dtype=torch.int8), torch.empty(2048)
        router, out = torch.empty(128, 2048, **bf16), torch.empty(1, 1, 4096, **bf16)
        route = ops.RouteArguments(out, weight, scale, row, norm, router, 8, EPS)
        run_one_token_router(route, gpu=gpu, submit=launches.append)
        run_one_token_linear(
            row,
            torch.empty(151936, 2048, dtype=torch.int8),
            torch.empty(151936),
            gpu=gpu,
            submit=launches.append,
        )
    assert [launch.kernel.__name__ for launch in launches[2:]] == [
        "moe_one_token_matvec",
        "moe_one_token_attention",
        "moe_one_token_matvec",
        "moe_one_token_router",
        "moe_one_token_matvec",
    ]
    for launch in launches[1:]:
        report = compile_launch(launch, capability)
        assert report.spill_bytes == 0 and report.shared <= gpu.max_shared, report
        assert report.registers <= 255


@pytest.mark.gpu
@pytest.mark.parametrize(ATTENTION_NAMES, ATTENTION)
def test_attention_on_a_gpu(kind: str, groups: int, position: int, update: bool, gated: bool) -> None:
    arguments = attention_arguments(kind, groups, position, update, gated)
    there = [part.cuda() if isinstance(part, Tensor) else part for part in arguments]
    found = ops.one_token_attention(*there)
    _assert_close(tuple(part.cpu() for part in found), ops.one_token_attention(*arguments))
    assert all(torch.equal(one, other) for one, other in zip(ops.one_token_attention(*there), found, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("kind", "top_k"), [("int8", 4), ("bf16", 1), ("int8", EXPERTS)])
def test_routing_on_a_gpu(kind: str, top_k: int, tied: bool) -> None:
    arguments = route_arguments(kind, top_k, tied)
    there = [part.cuda() if isinstance(part, Tensor) else part for part in arguments]
    found = ops.one_token_router(*there)
    _assert_close(tuple(part.cpu() for part in found), ops.one_token_router(*arguments))
    assert all(torch.equal(one, other) for one, other in zip(ops.one_token_router(*there), found, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "rows", "columns"), LINEAR)
def test_linear_on_a_gpu(kind: str, rows: int, columns: int) -> None:
    x, weight, scale = linear_arguments(kind, rows, columns)
    there = (x.cuda(), weight.cuda(), None if scale is None else scale.cuda())
    found = ops.one_token_linear(*there)
    _assert_close((found.cpu(),), (ops.one_token_linear(x, weight, scale),))
    assert torch.equal(ops.one_token_linear(*there), found)


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.interpreter), pytest.param("cuda", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize(("case", "splits", "at_once"), [(0, 2, 2), (3, 1, 1), (4, 2, 1)])
def test_attention_with_few_parts(
    case: int, splits: int, at_once: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program has several blocks, which it requests early, and the last one combines the parts in several steps."""
    monkeypatch.setattr(launches_module, "MAX_SPLITS", splits)
    monkeypatch.setattr(launches_module, "POSITIONS", 64)
    monkeypatch.setattr(launches_module, "MAX_AT_ONCE", at_once)
    arguments = attention_arguments(*ATTENTION[case])
    there = (part.to(device) if isinstance(part, Tensor) else part for part in arguments)
    launches: list[Launch] = []

    def submit(launch: Launch) -> None:
        launches.append(launch)
        launch.run_now()

    found = run_one_token_attention(ops.AttentionArguments(*there), submit=submit)
    constants = launches[1].constexprs
    assert (constants["SPLITS"], constants["AT_ONCE"], constants["EARLY"]) == (splits, at_once, True)
    expected = one_token_attention_aten(ops.AttentionArguments(*arguments))
    _assert_close(tuple(part.cpu() for part in found), expected)


@pytest.mark.compiler
@pytest.mark.parametrize(("kind", "rows", "columns"), [("int8", 5120, 2048), ("int8", 2048, 4096), ("bf16", 512, 1024)])
def test_no_product_is_summed_across_warps(kind: str, rows: int, columns: int) -> None:
    """Rows whose pieces belong to several warps take ten times as long, with the same results."""
    launches: list[Launch] = []
    with torch.device("meta"):
        weight = torch.empty(rows, columns, dtype=torch.int8 if kind == "int8" else torch.bfloat16)
        run_one_token_linear(
            torch.empty(1, columns, dtype=torch.bfloat16),
            weight,
            torch.empty(rows) if kind == "int8" else None,
            gpu=find_model("h200").gpu,
            submit=launches.append,
        )
    # Five for each of the two rows of a warp, five for the maximum of x, and a few to change layouts.
    assert compile_kernel(launches[0], 90).asm["ptx"].count("shfl.sync.bfly") <= 24
