"""The matrix-vector path in Triton's interpreter. test_gpu.py runs it on a GPU, test_compile.py reads its code."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from executorch_moe.kernels.experts.plan import Options, run_fused_experts
from executorch_moe.kernels.tuning.configs import MatvecConfig

from ..combinations import EXHAUSTIVE, combinations
from .cases import BOUNDS, CASES, ZERO_CASE, Case, first_tokens, make, relative_error
from .test_memory import same_bits_in_any_order

pytestmark = pytest.mark.interpreter

MATVEC = Options(path="matvec")
USUAL = ("one token", "hidden size not a multiple of 128", "dropped ids", "biases")
WAYS = {"w4a16": ("w4a16", False), "w4a16 zero": ("w4a16", True), "w4a8": ("w4a8", False)}
SIZES = [(256, 256, 32), (256, 256, 64), (256, 256, 128), (256, 256, 256), (160, 96, 32)]


def marked(*cases: Case) -> list[Any]:
    """The cases as parameters, all but the usual ones for `make test-full` only: interpretation is slow."""
    return [pytest.param(case, id=str(case), marks=() if case.why in USUAL else EXHAUSTIVE) for case in cases]


@pytest.mark.parametrize("case", marked(*CASES, ZERO_CASE))
def test_against_the_oracle(case: Case) -> None:
    problem = first_tokens(make(case, "w4a16"), 2)
    out = run_fused_experts(problem.args(), options=MATVEC)
    assert relative_error(out, problem.expected) <= BOUNDS["w4a16"]


@pytest.mark.parametrize(("way", "sizes"), combinations(WAYS, SIZES, one_of=3))
def test_every_way_of_scaling(way: tuple[str, bool], sizes: tuple[int, int, int]) -> None:
    """Each order of the codes with each place of the scales, because these are separate code paths."""
    (scheme, zero), (hidden, intermediate, group_size) = way, sizes
    case = Case("ways", tokens=1, experts=3, hidden=hidden, intermediate=intermediate, group_size=group_size, zero=zero)
    problem = make(case, scheme)
    assert relative_error(run_fused_experts(problem.args(), options=MATVEC), problem.expected) <= BOUNDS["w4a16"]


@pytest.mark.parametrize("case", marked(*CASES))
def test_mxfp4_against_the_oracle(case: Case) -> None:
    problem = first_tokens(make(case, "mxfp4"), 2)
    assert relative_error(run_fused_experts(problem.args(), options=MATVEC), problem.expected) <= BOUNDS["mxfp4"]


@pytest.mark.parametrize("sizes", [MatvecConfig(16, 8, 2), MatvecConfig(32, 8, 4), MatvecConfig(64, 16)], ids=str)
def test_chunks_of_k(sizes: MatvecConfig) -> None:
    case = Case("chunks", tokens=1, experts=3, top_k=2, hidden=640, intermediate=384, group_size=128, bias=True)
    problem = make(case, "w4a16")
    out = run_fused_experts(problem.args(), options=Options(path="matvec", matvec=(sizes, sizes)))
    assert relative_error(out, problem.expected) <= BOUNDS["w4a16"]


def test_a_token_that_names_an_expert_twice() -> None:
    problem = make(Case("twice", tokens=2, experts=3, top_k=2), "w4a16")
    args = problem.args()._replace(topk_ids=torch.ones_like(problem.topk_ids))
    expected = run_fused_experts(args, options=Options(path="few_tokens"))
    assert relative_error(run_fused_experts(args, options=MATVEC), expected.float()) <= BOUNDS["w4a16"]


def test_no_nan_and_no_infinity_is_hidden() -> None:
    """Activations become integers, which have neither."""
    problem = make(Case("not finite", tokens=4, group_size=128), "w4a16")
    hidden = problem.hidden_states.clone()
    hidden[1:, 77] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    out = run_fused_experts(problem.args()._replace(hidden_states=hidden), options=MATVEC)
    assert relative_error(out[:1], problem.expected[:1]) <= BOUNDS["w4a16"]
    assert out[1:].isnan().all()


@pytest.mark.parametrize("case", marked(*CASES))
def test_memory_rules_and_any_order_of_programs(case: Case) -> None:
    arguments = first_tokens(make(case, "w4a16"), 1).args()
    same_bits_in_any_order(lambda: run_fused_experts(arguments, options=MATVEC))


def test_memory_rules_with_mxfp4() -> None:
    """Scales of one byte have an addressing of their own."""
    case = Case("bytes", tokens=1, experts=3, hidden=160, intermediate=96)
    arguments = make(case, "mxfp4").args()
    same_bits_in_any_order(lambda: run_fused_experts(arguments, options=MATVEC))


def test_it_is_refused_where_it_cannot_run() -> None:
    problem = make(Case("bf16", tokens=1), "bf16")
    with pytest.raises(ValueError, match=r"scheme bf16 .* has no matrix-vector path: it is for packed 4-bit weights"):
        run_fused_experts(problem.args(), options=MATVEC)
    problem = make(Case("rows", tokens=1), "w4a16")
    sizes = MatvecConfig(8, 4)
    with pytest.raises(ValueError, match="rows=8 must divide N=256 of GEMM1, and be at least 16 in GEMM1: use 16"):
        run_fused_experts(problem.args(), options=Options(path="matvec", matvec=(sizes, sizes)))


def test_tokens_at_an_odd_element_take_another_path() -> None:
    """Pairs of activations are read as words of 32 bits."""
    problem = make(Case("odd", tokens=1), "w4a16")
    storage = torch.zeros(129, dtype=torch.bfloat16)
    storage[1:] = problem.hidden_states[0]
    args = problem.args()._replace(hidden_states=storage[1:].reshape(1, 128))
    assert relative_error(run_fused_experts(args), problem.expected) <= BOUNDS["w4a16"]
    with pytest.raises(ValueError, match="tokens that start at an even element of their storage"):
        run_fused_experts(args, options=MATVEC)
