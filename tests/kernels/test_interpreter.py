"""The Triton kernels in Triton's interpreter: portable forms of the inline PTX, and fp32 dots of bf16 values.

Needs TRITON_INTERPRET=1, which `make test` sets. These tests cover indexing, masking, decoding and order of the
kernels; test_gpu.py covers PTX and tensor cores.
"""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from executorch_moe.kernels import SCHEMES, unpack_experts
from executorch_moe.kernels.arguments import ExpertArguments
from executorch_moe.kernels.experts.aten import fused_experts_cpu
from executorch_moe.kernels.experts.plan import (
    Heights,
    Options,
    Problem,
    Routing,
    run_fused_experts,
    run_routing,
)
from executorch_moe.kernels.gpus import INTERPRETER_GPU
from executorch_moe.kernels.launch import Launch
from executorch_moe.kernels.reference import reference_experts
from executorch_moe.kernels.schemes import Scheme
from executorch_moe.kernels.tuning.choose import MAX_PAIRS, Variant
from executorch_moe.kernels.tuning.configs import GemmConfig

from ..combinations import combinations
from .cases import BOUNDS, CASES, ZERO_CASE, Case, make, relative_error

pytestmark = pytest.mark.interpreter

SMALL = GemmConfig(block_m=16, block_n=64, group_size_m=8)


def grouped(config1: GemmConfig = SMALL, config2: GemmConfig = SMALL, persistent: bool = True) -> Options:
    return Options(path="grouped", persistent=persistent, gemm1=config1, gemm2=config2)


def test_the_interpreter_is_on() -> None:
    assert os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.parametrize(("case", "scheme"), combinations(CASES, list(SCHEMES), one_of=3))
def test_grouped_path_against_the_oracle(case: Case, scheme: str) -> None:
    problem = make(case, scheme)
    out = run_fused_experts(problem.args(), options=grouped())
    assert relative_error(out, problem.expected) <= BOUNDS[scheme]


@pytest.mark.parametrize(("case", "scheme"), combinations(CASES, list(SCHEMES), one_of=3))
def test_the_configurations_that_users_get(case: Case, scheme: str) -> None:
    problem = make(case, scheme)
    out = run_fused_experts(problem.args(), options=Options(path="grouped"))
    assert relative_error(out, problem.expected) <= BOUNDS[scheme]


def test_a_tile_that_does_not_divide_n_is_refused() -> None:
    problem = make(Case("tile", tokens=20), "w4a16")
    with pytest.raises(ValueError, match="block_n=256 must divide N=128 of GEMM2: use block_n=128"):
        run_fused_experts(problem.args(), options=grouped(config2=GemmConfig(block_m=16, block_n=256)))


@pytest.mark.parametrize(
    ("case", "scheme"), combinations([c for c in CASES if c.tokens <= 11], list(SCHEMES), one_of=3)
)
def test_few_tokens_path_against_the_oracle(case: Case, scheme: str) -> None:
    problem = make(case, scheme)
    out = run_fused_experts(problem.args(), options=Options(path="few_tokens"))
    assert relative_error(out, problem.expected) <= min(BOUNDS[scheme], 4.5e-3)


@pytest.mark.parametrize(
    ("tokens", "variant"), combinations([2, 16, 18], [(1, 64, False), (3, 64, True), (1, 32, False)], one_of=3)
)
def test_few_tokens_of_which_several_share_an_expert(tokens: int, variant: tuple[int, int, bool]) -> None:
    """More pairs than experts, more rows than a tile, and K in several parts."""
    split_k, block_n, bias = variant
    problem = make(Case("shared", tokens=tokens, experts=3, intermediate=384, group_size=128, bias=bias), "w4a16")
    tile = GemmConfig(8, block_n, unroll=2, split_k=split_k, scale_after=True)
    out = run_fused_experts(problem.args(), options=Options(path="few_tokens", gemm1=tile, gemm2=tile))
    assert relative_error(out, problem.expected) <= BOUNDS["w4a16"]


@pytest.mark.parametrize("experts", [2, 5])
def test_a_token_that_names_an_expert_twice(experts: int) -> None:
    problem = make(Case("twice", tokens=1, experts=experts, top_k=2), "w4a16")
    twice = torch.ones_like(problem.topk_ids)
    args = problem.args()._replace(topk_ids=twice)
    expected = reference_experts(args.hidden_states, twice, args.topk_weights, *unpack_experts(problem.packed))
    for path in ("matvec", "few_tokens", "grouped"):
        out = run_fused_experts(args, options=Options(path=path))
        assert relative_error(out, expected) <= BOUNDS["w4a16"]


@pytest.mark.parametrize(
    ("weights", "sizes", "scale_after", "path"),
    combinations(
        {"w4a16": ("w4a16", False), "w4a16 zero": ("w4a16", True), "w4a8": ("w4a8", False)},
        [(256, 256, 32), (256, 256, 64), (256, 256, 128), (256, 256, 256), (160, 96, 32)],
        {"scale before": False, "scale after": True},
        ["grouped", "few_tokens"],
        one_of=5,
    ),
)
def test_every_way_of_scaling(
    weights: tuple[str, bool], sizes: tuple[int, int, int], scale_after: bool, path: str
) -> None:
    """Each order of the codes with each place of the scales, because these are separate code paths."""
    (scheme, zero), (hidden, intermediate, group_size) = weights, sizes
    case = Case("ways", tokens=3, experts=3, hidden=hidden, intermediate=intermediate, group_size=group_size, zero=zero)
    problem = make(case, scheme)
    tile = GemmConfig(block_m=8, block_n=128, scale_after=scale_after)
    out = run_fused_experts(problem.args(), options=Options(path=path, gemm1=tile, gemm2=tile))
    # The CPU kernel rounds activations as this path does, which allows a bound a third of that of w4a8.
    rounded = path == "grouped" and scheme == "w4a8"
    expected = fused_experts_cpu(problem.args()).float() if rounded else problem.expected
    assert relative_error(out, expected) <= BOUNDS["w4a16"]


@pytest.mark.parametrize("path", ["grouped", "few_tokens"])
def test_zero_points(path: str) -> None:
    problem = make(ZERO_CASE, "w4a16")
    options = Options(path=path, gemm1=SMALL, gemm2=SMALL)
    assert relative_error(run_fused_experts(problem.args(), options=options), problem.expected) <= BOUNDS["w4a16"]


@pytest.mark.parametrize(
    ("scheme", "block_n", "group_size_m"), combinations(["w4a16", "w4a8", "mxfp4"], [64, 128], [1, 8, 16, 32], one_of=4)
)
def test_both_schedules_give_the_same_bits(scheme: str, block_n: int, group_size_m: int) -> None:
    problem = make(Case("schedules", tokens=45, experts=3, hidden=256), scheme)
    config = GemmConfig(block_m=8, block_n=block_n, group_size_m=group_size_m)
    args = problem.args()
    persistent = run_fused_experts(args, options=grouped(config, config))
    one_cta_a_tile = run_fused_experts(args, options=grouped(config, config, persistent=False))
    assert torch.equal(persistent, one_cta_a_tile)
    assert relative_error(persistent, problem.expected) <= BOUNDS[scheme]


def test_blocks_of_the_two_gemms_must_agree() -> None:
    problem = make(Case("blocks", tokens=30, experts=3), "w4a16")
    with pytest.raises(ValueError, match="block_m=32 of GEMM1 and 8 of GEMM2 differ"):
        run_fused_experts(
            problem.args(), options=grouped(GemmConfig(block_m=32, block_n=128), GemmConfig(block_m=8, block_n=64))
        )


@pytest.mark.parametrize("tokens", [3, 8, 9, 16, 17, 40])
def test_the_variant_is_chosen_by_the_number_of_pairs(tokens: int) -> None:
    """An export for any number of tokens launches all variants; one of them has row blocks of its height."""
    tiles = [GemmConfig(block_m=height, block_n=64) for height in (8, 16, 32)]
    limits = (16, 32, MAX_PAIRS)  # pairs, at top_k = 2
    variants = tuple(
        Variant(first, last, tile, tile) for first, last, tile in zip((0, 17, 33), limits, tiles, strict=True)
    )
    problem = make(Case("variants", tokens=tokens, experts=3), "w4a16")
    ran: list[int] = []

    def submit(launch: Launch) -> None:
        launch.run()
        if launch.kernel.__name__ == "moe_route_scatter":
            ran.append(int(launch.args["num_row_blocks_ptr"][0]))

    out = run_fused_experts(problem.args(), options=Options(path="grouped", variants=variants), submit=submit)
    assert relative_error(out, problem.expected) <= BOUNDS["w4a16"]
    height = tiles[0 if tokens <= 8 else 1 if tokens <= 16 else 2].block_m
    counts = problem.topk_ids.flatten().bincount()
    assert ran == [int((-(-counts // height)).sum())]


@pytest.mark.parametrize(("act_group", "group_size"), [(128, 32), (256, 64), (1024, 128)])
def test_int8_activations_in_both_gemms(monkeypatch: pytest.MonkeyPatch, act_group: int, group_size: int) -> None:
    """No scheme has GEMM2 in int8, because it costs too much accuracy, but the mainloop supports it."""
    from executorch_moe.kernels import schemes

    monkeypatch.setitem(schemes.SCHEMES, "all-int8", Scheme("all-int8", 4, act_group, act_group))
    case = Case("int8", tokens=19, hidden=384, intermediate=256, group_size=group_size)
    problem = make(case, "all-int8")
    out = run_fused_experts(problem.args(), options=grouped())
    assert relative_error(out, problem.expected) <= 2.5e-2


@pytest.mark.parametrize("largest", [0, 1, 2])
def test_activation_groups_of_very_different_size(monkeypatch: pytest.MonkeyPatch, largest: int) -> None:
    """Sums are converted from each group's units to larger or smaller ones; a group may be all zero."""
    from executorch_moe.kernels import schemes

    monkeypatch.setitem(schemes.SCHEMES, "grouped-int8", Scheme("grouped-int8", 4, 128, 0))
    problem = make(Case("int8", tokens=9, experts=3, hidden=384), "grouped-int8")
    x = problem.hidden_states.reshape(9, 3, 128)
    x[:, largest] *= 1000
    x[4:, (largest + 1) % 3] = 0
    gate_up, down = unpack_experts(problem.packed)
    expected = reference_experts(problem.hidden_states, problem.topk_ids, problem.topk_weights, gate_up, down)
    out = run_fused_experts(problem.args(), options=grouped())
    assert relative_error(out, expected) <= BOUNDS["w4a8"]
    exact = fused_experts_cpu(problem.args())  # rounds activations like the kernels
    assert relative_error(out, exact.float()) <= BOUNDS["bf16"]


def test_no_tokens() -> None:
    args = make(Case("none", tokens=2), "w4a16").args()
    none = ExpertArguments(args[0][:0], args[1][:0], args[2][:0], *args[3:])
    out = run_fused_experts(none)
    assert out.shape == (0, 128)


def test_dropped_pairs_are_never_read() -> None:
    """Results must not depend on uninitialized memory: buffers are filled with NaN."""
    problem = make(next(c for c in CASES if c.routing == "dropped"), "w4a16")

    class Poisoned(Problem):
        def empty(self, shape, dtype):  # type: ignore[no-untyped-def]
            fill = float("nan") if dtype.is_floating_point else -(2**30)
            return torch.full(shape, fill, dtype=dtype) if dtype != torch.int8 else torch.full(shape, 127, dtype=dtype)

    from executorch_moe.kernels.experts.plan import run_few_tokens, run_grouped

    for run in (run_grouped, run_few_tokens):
        options = Options(gemm1=SMALL, gemm2=SMALL)
        poisoned = Poisoned(problem.args(), INTERPRETER_GPU, False, options)
        assert relative_error(run(poisoned), problem.expected) <= BOUNDS["w4a16"], run.__name__


# ------------------------------------------------------------------ routing


def route(ids: torch.Tensor, experts: int, block_m: int) -> Routing:
    packed_rows = torch.zeros(experts, 1, 256, 64, dtype=torch.uint8)
    down = torch.zeros(experts, 1, 128, 64, dtype=torch.uint8)
    arguments = ExpertArguments(
        torch.zeros(ids.shape[0], 128).bfloat16(), ids, torch.zeros(ids.shape), packed_rows, down,
        None, None, None, None, None, None, "w4a16", "silu", 128,
    )  # fmt: skip
    return run_routing(Problem(arguments, INTERPRETER_GPU, False), Heights(block_m))


def check_routing(ids: torch.Tensor, experts: int, block_m: int) -> None:
    r = route(ids, experts, block_m)
    flat = ids.reshape(-1)
    valid = [i for i in range(flat.numel()) if 0 <= int(flat[i]) < experts]
    wanted = sorted(valid, key=lambda i: int(flat[i]))  # Python's sort is stable, as routing must be
    offsets = r.expert_offsets.tolist()
    assert r.sorted_pair_ids[: len(valid)].tolist() == wanted
    assert offsets[0] == 0 and offsets[experts] == len(valid)
    assert [b - a for a, b in itertools.pairwise(offsets)] == [
        sum(int(flat[i]) == e for i in valid) for e in range(experts)
    ]
    blocks = [(e, row) for e in range(experts) for row in range(offsets[e], offsets[e + 1], block_m)]
    count = int(r.num_row_blocks)
    assert count == len(blocks) <= r.block_expert.numel()
    assert list(zip(r.block_expert[:count].tolist(), r.block_row[:count].tolist(), strict=True)) == blocks


@given(st.data())
@settings(deadline=None, max_examples=30)
def test_routing_properties(data: st.DataObject) -> None:
    """Pairs with a valid id occur once, stably sorted by expert; the block list is exact; other ids are dropped."""
    experts = data.draw(st.integers(1, 40))
    top_k = data.draw(st.integers(1, min(4, experts)))
    tokens = data.draw(st.integers(1, 40))
    low, high = data.draw(st.sampled_from([(0, experts - 1), (-3, experts + 3), (0, 0), (-5, -1)]))
    values = data.draw(st.lists(st.integers(low, high), min_size=tokens * top_k, max_size=tokens * top_k))
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
    check_routing(
        torch.tensor(values, dtype=dtype).reshape(tokens, top_k), experts, data.draw(st.sampled_from([8, 16, 64]))
    )


@pytest.mark.parametrize(
    ("why", "tokens", "experts", "top_k"),
    [
        ("several chunks of pairs", 300, 7, 2),
        ("one hot expert over chunks", 600, 3, 1),
        ("more experts than a power of two", 90, 257, 4),
    ],
)
def test_routing_cases(why: str, tokens: int, experts: int, top_k: int) -> None:
    if why.startswith("one hot"):
        ids = torch.full((tokens, top_k), 1)
    else:
        ids = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])
    check_routing(ids, experts, 16)


def test_ids_beyond_32_bits_are_dropped() -> None:
    check_routing(torch.tensor([[2**32], [1], [2**40 + 2], [-(2**35)]]), 4, 16)
