"""`one_token_experts`: the operators that it joins, and kernels of the experts that rank logits themselves."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from executorch_moe.kernels.decode import op as ops
from executorch_moe.kernels.decode.device import expert_at, expert_of_key, logit_of_key, next_key
from executorch_moe.kernels.experts.plan import Options
from executorch_moe.kernels.gpus import MAX_DYNAMIC_SHARED, Gpu
from executorch_moe.kernels.launch import Launch
from executorch_moe.kernels.measure.compile import compile_kernel, compile_launch
from executorch_moe.kernels.measure.timing import random_packed
from executorch_moe.kernels.op import forced, fused_experts
from executorch_moe.kernels.routed.op import TokenExpertArguments, one_token_experts, run_one_token_experts
from executorch_moe.kernels.shapes import SHAPES, LayerShape

from .cases import relative_error
from .memory_rules import check_memory
from .test_one_token import HIDDEN, projection, random, route_arguments

RANKED = Options(path="matvec")
CASES = [("w4a16", 12, 4, False, False), ("mxfp4", 40, 2, True, True), ("w4a8", 300, 8, False, True)]
NAMES = ("scheme", "experts", "top_k", "tied", "has_shared")
WIDTH = 72
"""Of the shared expert."""


def arguments_of(
    scheme: str, experts: int, top_k: int, tied: bool, has_shared: bool, device: str = "cpu"
) -> TokenExpertArguments:
    shape = LayerShape(experts, top_k, HIDDEN, 128, 32)
    packed = random_packed(shape, scheme, "cpu", torch.Generator().manual_seed(experts))
    route = route_arguments("int8", top_k, tied, experts)
    shared: tuple[object, ...] = ()
    if has_shared:
        shared = *projection(2 * WIDTH + 1, HIDDEN, "int8"), WIDTH, *projection(HIDDEN, WIDTH, "bf16")
    kind = packed.scheme, "silu", packed.group_size
    parts = (*route, *packed.tensors().values(), *kind, *shared)
    return TokenExpertArguments(*(part.to(device) if isinstance(part, Tensor) else part for part in parts))


def apart(arguments: TokenExpertArguments) -> tuple[Tensor, Tensor]:
    """Results of the operators that `one_token_experts` joins."""
    if arguments.gate_up is None:
        hidden, normed, weights, ids, *halfway = ops.one_token_router(*arguments.route)
    else:
        hidden, normed, weights, ids, *halfway = ops.one_token_shared_router(*arguments.shared_route)
    return hidden, fused_experts(*arguments.experts(normed, ids, weights, *halfway))


def test_the_operator_is_router_and_experts() -> None:
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    for case in CASES[:2]:
        arguments = arguments_of(*case)
        for one, other in zip(one_token_experts(*arguments), apart(arguments), strict=True):
            assert torch.equal(one, other)
        torch.library.opcheck(torch.ops.executorch_moe.one_token_experts, arguments, test_utils=checks)


def test_router_and_experts_must_be_of_one_layer() -> None:
    arguments = arguments_of(*CASES[0])
    with pytest.raises(ValueError, match=r"router has E=11 rows, but w13 has 12 experts: pass"):
        one_token_experts(*arguments._replace(router=arguments.router[:11].contiguous()))
    with pytest.raises(ValueError, match=r"top_k=13 must be from 1 to the E=12 experts"):
        one_token_experts(*arguments._replace(top_k=13))
    with pytest.raises(ValueError, match=r"w13 has rank 4 and w2 rank 3, not the packed layout"):
        one_token_experts(*arguments._replace(w2=arguments.w2[0]))
    with pytest.raises(ValueError, match=r"width was given without gate_up: pass"):
        one_token_experts(*arguments._replace(width=3))
    shared = arguments_of(*CASES[1])
    with pytest.raises(ValueError, match=r"gate_up has 145 rows, expected at least 2 \* width with width=80"):
        one_token_experts(*shared._replace(width=80))
    with pytest.raises(ValueError, match=r"shared, share and shared_down must be given together"):
        one_token_experts(*shared._replace(shared_down=None))


@triton.jit
def rank_all(logits_ptr, ids_ptr, ordered_ptr, E: tl.constexpr, TOP_K: tl.constexpr):
    place = tl.program_id(0)
    tl.store(ids_ptr + place, expert_at(logits_ptr, place, E, TOP_K))
    key = 2147483647
    for i in tl.static_range(TOP_K):
        key = next_key(logits_ptr, key, E)
        if place == 0:
            tl.store(ids_ptr + TOP_K + i, expert_of_key(key))
            tl.store(ordered_ptr + i, logit_of_key(key))


def odd_logits(kind: str, experts: int) -> Tensor:
    """fp32 [E], each a bf16."""
    logits = random(experts, seed=7).float()
    if kind == "ties":
        logits = logits.round()
        logits[1::3] = -0.0
    elif kind == "infinite":
        logits[::2], logits[1::4] = torch.inf, -torch.inf
    elif kind == "NaN":
        logits[3:6] = torch.nan
        logits[4] = -torch.nan
    elif kind == "all -inf":
        logits[:] = -torch.inf
    return logits


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.interpreter), pytest.param("cuda", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("kind", ["usual", "ties", "infinite", "NaN", "all -inf"])
@pytest.mark.parametrize(("experts", "top_k"), [(128, 8), (5, 5), (70, 3)])
def test_ranks_are_those_of_a_stable_sort(device: str, kind: str, experts: int, top_k: int) -> None:
    logits = odd_logits(kind, experts).to(device)
    ids = torch.full((2, top_k), -1, dtype=torch.int32, device=device)
    ordered = torch.empty(top_k, device=device)
    rank_all[(top_k,)](logits, ids, ordered, E=experts, TOP_K=top_k)
    ranked = logits.cpu().masked_fill(logits.cpu().isnan(), torch.inf)
    best = torch.sort(ranked, descending=True, stable=True)
    assert ids.tolist() == [best.indices[:top_k].tolist()] * 2
    assert ordered.tolist() == best.values[:top_k].tolist()


@pytest.mark.interpreter
@pytest.mark.parametrize(NAMES, [pytest.param(*CASES[0], marks=pytest.mark.exhaustive), CASES[1]])
def test_interpreted_kernels_that_rank(scheme: str, experts: int, top_k: int, tied: bool, has_shared: bool) -> None:
    arguments = arguments_of(scheme, experts, top_k, tied, has_shared)
    launches: list[Launch] = []

    def submit(launch: Launch) -> None:
        launches.append(launch)
        launch.run_now()

    with check_memory(shuffle=1):  # GEMM2 reads the logits before its wait
        hidden, out = run_one_token_experts(arguments, options=RANKED, submit=submit)
    router = "moe_one_token_shared_router" if has_shared else "moe_one_token_logits"
    assert [launch.kernel.__name__ for launch in launches] == [
        "moe_one_token_matvec", router, "moe_matvec", "moe_matvec",
    ]  # fmt: skip
    assert not launches[1].constexprs.get("CHOOSES")
    expected = one_token_experts(*arguments)
    assert torch.equal(hidden, expected[0]) and relative_error(out, expected[1]) < 4.5e-3


def launches_of_qwen3(capability: int, options: Options) -> list[Launch]:
    launches: list[Launch] = []
    gpu, shape = Gpu(capability, 132, MAX_DYNAMIC_SHARED[capability]), SHAPES["qwen3"]
    with torch.device("meta"):
        packed = random_packed(shape, "w4a16", "meta", torch.Generator())
        row, h = torch.empty(1, 1, shape.hidden, dtype=torch.bfloat16), shape.hidden
        arguments = TokenExpertArguments(
            torch.empty(1, 1, 4096, dtype=torch.bfloat16), torch.empty(h, 4096, dtype=torch.int8), torch.empty(h), row,
            row[0, 0], torch.empty(shape.experts, h, dtype=torch.bfloat16), 8, 1e-6, *packed.tensors().values(),
            "w4a16", "silu", packed.group_size,
        )  # fmt: skip
        run_one_token_experts(arguments, options=options, gpu=gpu, submit=launches.append)
    return launches


def test_kernels_rank_where_asked_and_possible() -> None:
    names = [launch.kernel.__name__ for launch in launches_of_qwen3(90, Options())]
    assert names == ["moe_one_token_matvec", "moe_one_token_logits", "moe_matvec", "moe_matvec"]
    for options in (Options(ranks_logits=False), Options(path="few_tokens")):
        names = [launch.kernel.__name__ for launch in launches_of_qwen3(90, options)]
        assert names[:2] == ["moe_one_token_matvec", "moe_one_token_router"]


@pytest.mark.compiler
@pytest.mark.parametrize("capability", [80, 90, 120])
def test_kernels_that_rank_compile_without_spills(capability: int) -> None:
    for launch in launches_of_qwen3(capability, Options())[1:]:
        report = compile_launch(launch, capability)
        assert report.spill_bytes == 0 and report.registers <= 128, report
        if launch.kernel.__name__ == "moe_matvec":
            # Each place takes one maximum over a warp, without other warps; each logit is loaded once.
            ptx = compile_kernel(launch, capability).asm["ptx"]
            assert ptx.count("redux.sync.max.s32") == 8


@pytest.mark.gpu
@pytest.mark.parametrize(NAMES, CASES)
def test_kernels_that_rank_on_a_gpu(scheme: str, experts: int, top_k: int, tied: bool, has_shared: bool) -> None:
    arguments = arguments_of(scheme, experts, top_k, tied, has_shared, "cuda")
    hidden, expected = apart(arguments)
    with forced(RANKED):
        found = one_token_experts(*arguments)
        again = one_token_experts(*arguments)
    assert torch.equal(found[0], hidden) and relative_error(found[1], expected.cpu()) < 1.2e-2
    assert torch.equal(found[1], again[1])
