"""All kernels keep the rules of memory_rules.py, with their programs in any order."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from executorch_moe.kernels._device import launches_before
from executorch_moe.kernels.decode import op as ops
from executorch_moe.kernels.decode.launches import run_one_token_attention, run_one_token_linear, run_one_token_router
from executorch_moe.kernels.delta_rule.launches import run_gated_delta_net
from executorch_moe.kernels.experts.plan import Options, run_fused_experts
from executorch_moe.kernels.launch import Launch
from executorch_moe.kernels.routed.op import TokenExpertArguments, run_one_token_experts
from executorch_moe.kernels.tuning.choose import MAX_PAIRS, Variant
from executorch_moe.kernels.tuning.configs import GemmConfig

from ..combinations import combinations
from .cases import CASES, ZERO_CASE, Case, make
from .delta_rule_cases import TINY
from .delta_rule_cases import make as make_delta_rule
from .memory_rules import MemoryRuleError, check_memory
from .test_one_token import (
    ATTENTION,
    ATTENTION_NAMES,
    EPS,
    LINEAR,
    attention_arguments,
    linear_arguments,
    random,
    route_arguments,
)

pytestmark = pytest.mark.interpreter

TILE = GemmConfig(block_m=8, block_n=64, group_size_m=8)
OF_EACH_SCHEME = ("hidden size not a multiple of 128", "one past a block", "dropped ids")


def same_bits_in_any_order(run: Callable[[], Tensor | tuple[Tensor, ...]]) -> None:
    """Checks that `run` keeps the rules, and that its results do not depend on the order of programs."""
    assert os.environ.get("TRITON_INTERPRET") == "1"
    found = []
    for shuffle in (None, 1):
        with check_memory(shuffle) as rules:
            results = run()
        assert rules.loads > 0 and rules.stores > 0
        found.append(results if isinstance(results, tuple) else (results,))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


PROBLEMS = [(case, "w4a16") for case in CASES if case.tokens <= 17]
PROBLEMS += [(case, scheme) for case in CASES for scheme in ("bf16", "w4a8", "mxfp4") if case.why in OF_EACH_SCHEME]
NAMED = {f"{case}-{scheme}": (case, scheme) for case, scheme in PROBLEMS}


@pytest.mark.parametrize(("problem", "path"), combinations(NAMED, ["grouped", "few_tokens"], one_of=2))
def test_experts(problem: tuple[Case, str], path: str) -> None:
    arguments = make(*problem).args()
    same_bits_in_any_order(lambda: run_fused_experts(arguments, options=Options(path=path, gemm1=TILE, gemm2=TILE)))


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("split_k", [1, 3])
def test_parts_of_k_are_summed_by_whoever_is_last(split_k: int, tokens: int) -> None:
    arguments = make(Case("split", tokens=tokens, experts=3, intermediate=384, group_size=128), "w4a16").args()
    tile = GemmConfig(8, 64, split_k=split_k, scale_after=True)
    same_bits_in_any_order(lambda: run_fused_experts(arguments, options=Options("few_tokens", gemm1=tile, gemm2=tile)))


@pytest.mark.parametrize("path", ["grouped", "few_tokens"])
def test_zero_points(path: str) -> None:
    arguments = make(ZERO_CASE, "w4a16").args()
    same_bits_in_any_order(lambda: run_fused_experts(arguments, options=Options(path=path, gemm1=TILE, gemm2=TILE)))


@pytest.mark.parametrize("persistent", [True, False])
def test_several_chunks_of_pairs_and_variants(persistent: bool) -> None:
    arguments = make(Case("chunks", tokens=150, experts=3), "w4a8").args()
    tiles = [GemmConfig(block_m=height, block_n=128) for height in (16, 64)]
    variants = (Variant(0, 100, tiles[0], tiles[0]), Variant(101, MAX_PAIRS, tiles[1], tiles[1]))
    options = Options("grouped", persistent=persistent, variants=variants)
    same_bits_in_any_order(lambda: run_fused_experts(arguments, options=options))


@pytest.mark.parametrize(ATTENTION_NAMES, ATTENTION)
def test_one_token_attention(kind: str, groups: int, position: int, update: bool, gated: bool) -> None:
    arguments = ops.AttentionArguments(*attention_arguments(kind, groups, position, update, gated))
    same_bits_in_any_order(lambda: run_one_token_attention(arguments))


@pytest.mark.parametrize(("kind", "top_k"), [("int8", 4), ("bf16", 1)])
def test_one_token_router(kind: str, top_k: int) -> None:
    arguments = ops.RouteArguments(*route_arguments(kind, top_k))
    same_bits_in_any_order(lambda: run_one_token_router(arguments))


@pytest.mark.parametrize(("kind", "rows", "columns"), LINEAR[1:])
def test_one_token_linear(kind: str, rows: int, columns: int) -> None:
    same_bits_in_any_order(lambda: run_one_token_linear(*linear_arguments(kind, rows, columns)))


@pytest.mark.parametrize(("tokens", "position"), [(1, 0), (1, 5), (2, 1), (65, 0)])
def test_delta_rule(tokens: int, position: int) -> None:
    arguments = make_delta_rule(TINY, tokens, position=position)
    same_bits_in_any_order(lambda: run_gated_delta_net(arguments))


def test_a_token_through_decoder_layers() -> None:
    """No launch reads data of the previous launch before its wait, for operators in any sequence."""
    hidden, heads, head_dim, context, experts = 128, 4, 32, 40, 4
    packed = make(Case("layer", tokens=1, experts=experts, group_size=128), "w4a16").packed

    def codes(rows: int, columns: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(rows)
        weight = torch.randint(-127, 128, (rows, columns), generator=generator, dtype=torch.int8)
        return weight, torch.full((rows,), 1 / (73 * columns**0.5))

    def layers() -> Tensor:
        row, update = random(1, 1, hidden), None
        for layer in range(2):
            cache = [random(1, heads, context, head_dim, seed=seed) for seed in (layer, layer + 9)]
            norms = random(head_dim), random(head_dim)
            wave = random(1, 1, head_dim // 2)
            attention = ops.AttentionArguments(
                row, update, random(hidden), *codes(3 * heads * head_dim, hidden), *norms, wave, wave,
                torch.tensor([17]), *cache, head_dim**-0.5, EPS,
            )  # fmt: skip
            summed, out, _ = run_one_token_attention(attention)
            weight = codes(hidden, heads * head_dim)
            router = random(experts, hidden, deviation=hidden**-0.5)
            route = ops.RouteArguments(out, *weight, summed, random(hidden), router, 2, EPS)
            if layer == 0:
                row, normed, weights, ids = run_one_token_router(route)
                out = run_fused_experts(packed.arguments(normed, ids, weights))
            else:  # the experts' kernels rank the logits
                kind = packed.scheme, "silu", packed.group_size
                row, out = run_one_token_experts(TokenExpertArguments(*route, *packed.tensors().values(), *kind))
            update = out[None]
        assert update is not None
        return run_one_token_linear(row + update, *codes(64, hidden))

    same_bits_in_any_order(layers)


@triton.jit
def write_cache(position_ptr, key_ptr, value_ptr, POSITION: tl.constexpr, SIZE: tl.constexpr, PTX: tl.constexpr):
    """What the previous decode step does: writes a position, and the keys and values of earlier positions."""
    zero = launches_before(False, PTX)
    offs = tl.arange(0, SIZE)
    tl.store(position_ptr + zero, POSITION)
    tl.store(key_ptr + zero + offs, 0.5)
    tl.store(value_ptr + zero + offs, 0.25)


@pytest.mark.parametrize("between", [False, True])
def test_the_cache_is_written_before_the_first_launch_of_attention(between: bool) -> None:
    """Attention reads position, keys and values before its wait.

    A write directly before the operator is safe, because the operator's first launch waits for it. A write between its
    two launches is not. Inductor puts none there, because the first launch takes the three tensors too.
    """
    arguments = ops.AttentionArguments(*attention_arguments("int8", 2, 64, True))
    position, key, value = arguments.position, arguments.key, arguments.value
    names: list[str] = []

    def submit(launch: Launch) -> None:
        if launch.kernel.__name__ == ("moe_one_token_attention" if between else "moe_one_token_matvec"):
            assert launch.args["position_ptr"] is position
            assert launch.args["key_ptr"] is key and launch.args["value_ptr"] is value
            write_cache[(1,)](position, key, value, 64, 1 << (key.numel() - 1).bit_length() - 1, 0)
        names.append(launch.kernel.__name__)
        launch.run_now()

    if between:
        message = r"overlap: moe_one_token_attention, .* reads position_ptr before its wait"
        with pytest.raises(MemoryRuleError, match=message), check_memory():
            run_one_token_attention(arguments, submit=submit)
        return
    with check_memory():
        run_one_token_attention(arguments, submit=submit)
    assert names == ["moe_one_token_matvec", "moe_one_token_attention"]


# ------------------------------------------------------------------ the rules: each finds kernels that break it


@triton.jit
def copy_one_ahead(x_ptr, out_ptr, counter_ptr, SIZE: tl.constexpr, LIMIT: tl.constexpr):
    out_ptr += launches_before(False, 0)
    offs = tl.arange(0, SIZE)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs + 1, mask=offs < LIMIT, other=0.0))


@triton.jit
def write_beyond(x_ptr, out_ptr, counter_ptr, SIZE: tl.constexpr, LIMIT: tl.constexpr):
    out_ptr += launches_before(False, 0)
    offs = tl.arange(0, SIZE)
    tl.store(out_ptr - 1 + offs, tl.load(x_ptr + offs))


@triton.jit
def all_write_the_same(x_ptr, out_ptr, counter_ptr, SIZE: tl.constexpr, LIMIT: tl.constexpr):
    out_ptr += launches_before(False, 0)
    tl.store(out_ptr, 1.0)


@triton.jit
def write_what_others_read(x_ptr, out_ptr, counter_ptr, SIZE: tl.constexpr, LIMIT: tl.constexpr):
    out_ptr += launches_before(False, 0)
    others = tl.load(x_ptr + tl.arange(0, SIZE))
    tl.store(x_ptr + tl.program_id(0), tl.sum(others, axis=0))


@triton.jit
def sum_by_the_last(
    x_ptr, out_ptr, counter_ptr, SIZE: tl.constexpr, LIMIT: tl.constexpr,
    BARRIER: tl.constexpr, SEM: tl.constexpr, SCOPE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    out_ptr += launches_before(False, 0)
    tl.store(out_ptr + program, tl.load(x_ptr + program))
    if BARRIER:
        tl.debug_barrier()
    if tl.atomic_add(counter_ptr, 1, sem=SEM, scope=SCOPE) == tl.num_programs(0) - 1:
        tl.store(out_ptr + LIMIT, tl.sum(tl.load(out_ptr + tl.arange(0, SIZE)), axis=0))


@triton.jit
def write_early(x_ptr, out_ptr, counter_ptr, SIZE: tl.constexpr, LIMIT: tl.constexpr):
    tl.store(out_ptr, 1.0)
    launches_before(False, 0)


@triton.jit
def wait_in_one_program(x_ptr, out_ptr, counter_ptr, SIZE: tl.constexpr, LIMIT: tl.constexpr):
    if tl.program_id(0) == 0:
        tl.store(out_ptr + launches_before(False, 0), 1.0)


@triton.jit
def read_early(x_ptr, out_ptr, counter_ptr, SIZE: tl.constexpr, LIMIT: tl.constexpr):
    offs = tl.arange(0, SIZE)
    x = tl.load(x_ptr + offs)
    zero = launches_before(False, 0)
    if tl.program_id(0) == 0:
        tl.store(out_ptr + zero + offs, x)


def launch(kernel: Any, *, size: int = 8, limit: int = 8, programs: int = 4, **more: Any) -> Tensor:
    x, out = torch.arange(float(size)), torch.zeros(size + 1)
    kernel[(programs,)](x, out, torch.zeros(1, dtype=torch.int32), size, limit, **more)
    return out


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (copy_one_ahead, r"bounds: copy_one_ahead, program \(0, 0, 0\): reads byte 32 of x_ptr, which has 32"),
        (write_beyond, r"bounds: write_beyond, program \(0, 0, 0\): writes byte -4 of out_ptr, which has 36"),
        (
            all_write_the_same,
            r"races: .*, program \(1, 0, 0\): writes what was written by program 0, .*, out_ptr byte 0",
        ),
        (write_what_others_read, r"races: .*, program \(1, 0, 0\): reads what was written by program 0"),
        (write_early, "overlap: .* writes out_ptr before its wait"),
        (wait_in_one_program, r"overlap: .*, program \(1, 0, 0\): a program ends without waiting"),
    ],
)
def test_a_broken_rule_is_found(kernel: Any, message: str) -> None:
    with pytest.raises(MemoryRuleError, match=message), check_memory():
        launch(kernel)


def test_a_mask_keeps_to_the_bounds() -> None:
    with check_memory():
        assert launch(copy_one_ahead, limit=7, programs=1)[:8].tolist() == [1, 2, 3, 4, 5, 6, 7, 0]


def test_a_write_after_reads_of_others_is_found() -> None:
    """The program that writes runs last, so that no other program reads what it wrote."""

    @triton.jit
    def kernel(x_ptr, out_ptr, counter_ptr, SIZE: tl.constexpr, LIMIT: tl.constexpr):
        program = tl.program_id(0)
        zero = launches_before(False, 0)
        if program == LIMIT:
            tl.store(x_ptr + zero, 1.0)
        else:
            tl.store(out_ptr + zero + program, tl.load(x_ptr))

    with pytest.raises(MemoryRuleError, match=r"races: .* writes what was read by several programs"), check_memory():
        launch(kernel, limit=3)


def test_atomics_put_programs_in_order() -> None:
    with check_memory(shuffle=3):
        out = launch(sum_by_the_last, size=4, limit=4, BARRIER=True, SEM="acq_rel", SCOPE="gpu")
    assert out.tolist() == [0, 1, 2, 3, 6]


@pytest.mark.parametrize(
    ("barrier", "sem", "scope"), [(False, "acq_rel", "gpu"), (True, "relaxed", "gpu"), (True, "acq_rel", "cta")]
)
def test_atomics_that_do_not(barrier: bool, sem: str, scope: str) -> None:
    with pytest.raises(MemoryRuleError, match=r"races: .* reads what was written by program"), check_memory():
        launch(sum_by_the_last, size=4, limit=4, BARRIER=barrier, SEM=sem, SCOPE=scope)


def test_a_read_before_the_wait() -> None:
    """It is an error for data of the previous launch, and allowed for older data."""
    x, between, out, last, counter = torch.arange(8.0), *(torch.empty(8) for _ in range(3)), torch.zeros(1)
    with check_memory():
        read_early[(2,)](x, between, counter, 8, 8)
        read_early[(2,)](x, out, counter, 8, 8)
        read_early[(2,)](between, last, counter, 8, 8)
    assert last.tolist() == x.tolist()
    with pytest.raises(MemoryRuleError, match=r"overlap: .* reads x_ptr before its wait, which"), check_memory():
        read_early[(2,)](x, between, counter, 8, 8)
        read_early[(2,)](between, out, counter, 8, 8)


def test_a_read_of_what_nobody_wrote() -> None:
    with pytest.raises(MemoryRuleError, match=r"written: .* reads byte 16 of x_ptr, never written"), check_memory():
        x, out, counter = torch.empty(8), torch.empty(8), torch.zeros(1)
        read_early[(1,)](torch.arange(4.0), x, counter, 4, 4)
        copy_one_ahead[(1,)](x, out, counter, 4, 4)
