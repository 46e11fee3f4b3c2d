"""The operators for rows of several texts: CPU kernels against single texts, and Triton kernels against CPU kernels."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from executorch_moe.kernels.batch import op as ops
from executorch_moe.kernels.batch.aten import rows_attention_aten, rows_router_aten
from executorch_moe.kernels.batch.launches import run_rows_attention, run_rows_linear, run_rows_router, splits_of
from executorch_moe.kernels.decode.op import one_token_attention
from executorch_moe.kernels.gpus import MAX_DYNAMIC_SHARED, Gpu, find_model
from executorch_moe.kernels.measure.compile import compile_kernel, compile_launch, cuobjdump
from executorch_moe.kernels.prefill.aten import linear_aten

from ..combinations import combinations
from .batch_launches import launches_of_rows
from .test_memory import same_bits_in_any_order
from .test_one_token import projection, random
from .wgmma_registers import hazards, parse

EPS = 1e-6
HIDDEN = 160
CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_static")


def attention_arguments(
    positions: list[int], kind: str = "int8", heads: int = 4, kv_heads: int = 2, head_dim: int = 32, context: int = 200
) -> ops.RowsAttentionArguments:
    """Rows at `positions`; row i has slot len(positions) - i, and the cache holds NaN wherever no row may look."""
    rows = len(positions)
    weight, scale = projection((heads + 2 * kv_heads) * head_dim, HIDDEN, kind)
    at, slots = torch.tensor(positions), torch.arange(rows, 0, -1)
    angle = at.clamp(min=0)[None, :, None] * torch.linspace(0.1, 1.0, head_dim // 2)
    key, value = (random(rows + 1, kv_heads, context, head_dim, seed=seed) for seed in (1, 2))
    for cache in (key, value):
        cache[0] = torch.nan
        for position, slot in zip(positions, slots, strict=True):
            cache[slot, :, max(position, 0) :] = torch.nan
    return ops.RowsAttentionArguments(
        random(1, rows, HIDDEN), weight, scale, random(2, head_dim // 2), random(2, head_dim // 2, seed=1),
        angle.cos().bfloat16(), angle.sin().bfloat16(), at, slots, key, value, head_dim**-0.5, EPS,
    )  # fmt: skip


ROWS = {
    "one row": ([5], {}),
    "the start and the end of a slot": ([0, 199, 200], {}),
    "empty rows": ([-1, 70, -1, 3], {"kind": "bf16"}),
    "several blocks, uneven heads": ([150, 64, 1, 63, 65], {"heads": 3, "kv_heads": 1, "head_dim": 64}),
    "one query head a head": ([130, 2], {"heads": 2}),
}
LINEAR = [(1, 64, 96, "int8"), (5, 100, 130, "int8"), (16, 33, 300, "bf16"), (40, 150, 128, "int8")]
ROUTER = [([4, 0, 7], 12, 5), ([-1, 3, -1, 9, 2], 100, 8)]


def close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    torch.testing.assert_close(found.float(), expected.float(), rtol=0.01, atol=0.01)


def on_gpu(arguments: tuple[object, ...]) -> list[object]:
    return [part.cuda() if isinstance(part, Tensor) else part for part in arguments]


@pytest.mark.parametrize("name", ROWS)
def test_attention_of_rows_is_that_of_each_text_alone(name: str) -> None:
    positions, sizes = ROWS[name]
    a = attention_arguments(positions, **sizes)
    out, new = ops.rows_attention(*a)
    for row, position in enumerate(positions):
        if position < 0:
            continue
        slot = int(a.slots[row])
        hidden = a.x[:, row : row + 1]
        # The norm of the single operator divides by the root of the mean square: undone by the input's scale.
        length = hidden.float().pow(2).mean().add(EPS).sqrt()
        alone = one_token_attention(
            hidden, None, torch.full((HIDDEN,), float(length)), a.weight, a.scale, a.q_norm, a.k_norm, a.cos[:, row],
            a.sin[:, row], a.positions[row : row + 1], a.key[slot : slot + 1], a.value[slot : slot + 1], a.scaling,
            a.eps,
        )  # fmt: skip
        close(out[:, row : row + 1], alone[1])
        close(new[:, row : row + 1], alone[2])


@pytest.mark.parametrize(("positions", "experts", "top_k"), ROUTER)
def test_router_of_rows(positions: list[int], experts: int, top_k: int) -> None:
    x, router = random(1, len(positions), HIDDEN), random(experts, HIDDEN, deviation=HIDDEN**-0.5)
    weights, ids = ops.rows_router(x, router, torch.tensor(positions), top_k)
    values, chosen = torch.nn.functional.linear(x[0], router).float().topk(top_k, dim=-1)
    used = torch.tensor(positions) >= 0
    torch.testing.assert_close(weights[used], values[used].softmax(-1), rtol=0.02, atol=0.01)
    assert (ids[~used] == -1).all() and (ids[used] == chosen[used]).float().mean() > 0.8  # ties of bf16 logits


def test_operators_keep_the_rules_of_torch() -> None:
    arguments = attention_arguments([3, -1, 20], context=24)
    for cache in (arguments.key, arguments.value):  # opcheck compares results, and NaN is not equal to itself
        cache.nan_to_num_()
    router = random(12, HIDDEN)
    for operator, given in (
        (torch.ops.executorch_moe.rows_attention, tuple(arguments)),
        (torch.ops.executorch_moe.rows_linear, (random(2, 3, HIDDEN), arguments.weight, arguments.scale)),
        (torch.ops.executorch_moe.rows_router, (arguments.x, router, arguments.positions, 4)),
    ):
        torch.library.opcheck(operator, given, test_utils=CHECKS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 3, HIDDEN)}, "x has dtype float32, expected bfloat16"),
        ({"x": random(3, 1, HIDDEN)}, r"x has shape \[3, 1, 160\], expected \[1, T, columns\] with T from 1 to 64"),
        ({"x": random(1, 65, HIDDEN)}, r"x has shape \[1, 65, 160\], expected \[1, T, columns\] with T from 1 to 64"),
        (
            {"weight": random(255, HIDDEN), "scale": None},
            r"weight has 255 rows, expected \(heads \+ 2 \* kv_heads\) \* D",
        ),
        ({"scale": torch.ones(3)}, r"scale has shape \[3\], expected \[256\]"),
        ({"cos": random(1, 2, 16)}, r"cos has shape \[1, 2, 16\], expected \[1, 3, 16\]"),
        ({"q_norm": random(16)}, r"q_norm has shape \[16\], expected 32 elements"),
        ({"positions": torch.zeros(3)}, "positions has dtype float32, expected int64"),
        ({"positions": torch.tensor([0, 201, 1])}, "positions has 201, expected at most the C=200 positions"),
        ({"slots": torch.tensor([0, 4, 1])}, "slots has numbers from 0 to 4, expected 0 to 3"),
        ({"slots": torch.tensor([0, 1])}, r"slots has shape \[2\], expected \[3\]"),
        ({"value": random(4, 2, 100, 32)}, r"value has shape \[4, 2, 100, 32\], expected \[4, 2, 200, 32\]"),
        ({"scaling": 0.0}, "scaling=0.0 must be a positive number"),
        ({"key": random(2, 4, 200, 32).transpose(0, 1)}, "key must be contiguous"),
    ],
)
def test_wrong_arguments_of_attention_are_named(change: dict[str, object], message: str) -> None:
    arguments = attention_arguments([3, -1, 20])
    with pytest.raises(ValueError, match=message):
        ops.rows_attention(*arguments._replace(**change))


def test_wrong_arguments_of_linear_and_router_are_named() -> None:
    x, router, positions = random(1, 3, HIDDEN), random(12, HIDDEN), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"x has shape \[65, 160\], expected \[\.\.\., K\] with 1 to 64 rows"):
        ops.rows_linear(random(65, HIDDEN), router, None)
    with pytest.raises(ValueError, match=r"weight has shape \[12, 160\], expected \[N, 96\]"):
        ops.rows_linear(random(2, 96), router, None)
    with pytest.raises(ValueError, match=r"router has shape \[2000, 160\], expected \[E, H=160\] with E from 1 to"):
        ops.rows_router(x, random(2000, HIDDEN), positions, 4)
    with pytest.raises(ValueError, match="top_k=13 must be from 1 to the E=12 experts"):
        ops.rows_router(x, router, positions, 13)


def test_parts_of_positions() -> None:
    gpu = find_model("h200").gpu
    assert [splits_of(gpu, rows, 4, 1024) for rows in (1, 2, 8, 16, 64)] == [32, 32, 16, 8, 8]
    assert splits_of(gpu, 64, 1, 32768) == 1


@pytest.mark.interpreter
@pytest.mark.parametrize(("rows", "columns", "k", "kind"), LINEAR)
def test_interpreted_linear(rows: int, columns: int, k: int, kind: str) -> None:
    x, (weight, scale) = random(rows, k), projection(columns, k, kind)
    close(run_rows_linear(x, weight, scale), linear_aten(x, weight, scale))
    same_bits_in_any_order(lambda: run_rows_linear(x, weight, scale))


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ROWS)
def test_interpreted_attention(name: str) -> None:
    positions, sizes = ROWS[name]
    arguments = attention_arguments(positions, **sizes)
    used = torch.tensor(positions) >= 0
    for found, expected in zip(run_rows_attention(arguments), rows_attention_aten(arguments), strict=True):
        close(found[:, used], expected[:, used])
    same_bits_in_any_order(lambda: run_rows_attention(arguments))


@pytest.mark.interpreter
@pytest.mark.parametrize(("positions", "experts", "top_k"), ROUTER)
def test_interpreted_router(positions: list[int], experts: int, top_k: int) -> None:
    x, router = random(1, len(positions), HIDDEN), random(experts, HIDDEN, deviation=HIDDEN**-0.5)
    at = torch.tensor(positions)
    (weights, ids), expected = run_rows_router(x, router, at, top_k), rows_router_aten(x, router, at, top_k)
    assert torch.equal(ids, expected[1])
    close(weights[at >= 0], expected[0][at >= 0])
    same_bits_in_any_order(lambda: run_rows_router(x, router, at, top_k))


@pytest.mark.compiler
@pytest.mark.parametrize(
    ("capability", "layer"),
    combinations(
        [80, 89, 90, 100, 120],
        {"64 rows": (64, 128, torch.int8), "16 rows": (16, 256, torch.bfloat16)},
        chosen=lambda capability, layer: capability == 90 or (capability in (80, 100)) == (layer[0] == 64),
    ),
)
def test_kernels_compile_without_spills(capability: int, layer: tuple[int, int, torch.dtype]) -> None:
    rows, head_dim, dtype = layer
    gpu = Gpu(capability, 132, MAX_DYNAMIC_SHARED[capability])
    for launch in launches_of_rows(gpu, rows, head_dim, dtype):
        report = compile_launch(launch, capability)
        assert report.spill_bytes == 0 and report.shared <= gpu.max_shared, (launch.kernel.__name__, report)


@pytest.mark.compiler
def test_few_rows_compile_fast() -> None:
    """With few rows positions have many parts, and the last program's loops over them are unrolled."""
    launches = launches_of_rows(find_model("h200").gpu, 2, 128, torch.int8)
    (attention,) = (launch for launch in launches if launch.kernel.__name__ == "moe_rows_attention")
    assert attention.constexprs["SPLITS"] == 32
    start = time.process_time()
    compile_launch(attention, 90)
    assert time.process_time() - start < 20


@pytest.mark.compiler
def test_no_register_of_a_running_product_is_written() -> None:
    """As `test_compile.py` checks for experts: large weights are the first operand of a wgmma, in registers."""
    found = 0
    for rows in (16, 64):
        for launch in launches_of_rows(find_model("h200").gpu, rows, 128, torch.int8):
            if launch.kernel.__name__ != "moe_rows_linear" or launch.constexprs["BLOCK_N"] < 64:
                continue
            compiled = compile_kernel(launch, 90)
            code = parse(cuobjdump(compiled.asm["cubin"], "-sass"))
            found += any(instruction.is_wgmma for instruction in code)
            assert not list(hazards(code))
    assert found == 2


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "columns", "k", "kind"), [*LINEAR, (64, 5120, 2048, "int8"), (16, 2048, 4096, "bf16")]
)
def test_linear_on_a_gpu(rows: int, columns: int, k: int, kind: str) -> None:
    x, (weight, scale) = random(rows, k), projection(columns, k, kind)
    found = ops.rows_linear(*on_gpu((x, weight, scale)))
    close(found.cpu(), ops.rows_linear(x, weight, scale))
    assert torch.equal(ops.rows_linear(*on_gpu((x, weight, scale))), found)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*ROWS, "64 rows", "long texts"])
def test_attention_on_a_gpu(name: str) -> None:
    large = {"heads": 32, "kv_heads": 4, "head_dim": 128}
    longer = {
        "64 rows": ([37 * row % 400 - 1 for row in range(64)], {**large, "context": 400}),
        "long texts": ([16000, 1, 9999], {**large, "context": 16384}),
    }
    positions, sizes = longer.get(name) or ROWS[name]
    arguments = attention_arguments(positions, **sizes)
    there, used = on_gpu(tuple(arguments)), torch.tensor(positions) >= 0
    found = ops.rows_attention(*there)
    for one, expected in zip(found, ops.rows_attention(*arguments), strict=True):
        close(one.cpu()[:, used], expected[:, used])
    for one, again in zip(found, ops.rows_attention(*there), strict=True):
        assert torch.equal(one[:, used.cuda()], again[:, used.cuda()])


@pytest.mark.gpu
@pytest.mark.parametrize(("positions", "experts", "top_k"), [*ROUTER, (list(range(-3, 61)), 128, 8)])
def test_router_on_a_gpu(positions: list[int], experts: int, top_k: int) -> None:
    x, router = random(1, len(positions), HIDDEN), random(experts, HIDDEN, deviation=HIDDEN**-0.5)
    at = torch.tensor(positions)
    weights, ids = ops.rows_router(*on_gpu((x, router, at)), top_k)
    expected = ops.rows_router(x, router, at, top_k)
    same = (ids.cpu() == expected[1]).all(1)
    assert same.float().mean() > 0.9  # a near tie of bf16 logits may swap two experts
    close(weights.cpu()[same], expected[0][same])
