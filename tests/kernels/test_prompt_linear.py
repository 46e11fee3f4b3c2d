"""`prompt_linear`: the CPU kernel against plain torch, and the Triton kernels against the CPU kernel."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from executorch_moe.kernels.gpus import MAX_DYNAMIC_SHARED, MODELS, Gpu, find_model
from executorch_moe.kernels.launch import Launch
from executorch_moe.kernels.measure.compile import compile_launch
from executorch_moe.kernels.prefill import linear
from executorch_moe.kernels.prefill.aten import linear_aten
from executorch_moe.kernels.prefill.linear import LIMIT, LinearTile, run_prompt_linear, tiles_of
from executorch_moe.kernels.prefill.op import prompt_linear

from .test_memory import same_bits_in_any_order
from .test_one_token import random

CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
SMALL = LinearTile(16, 32, 32, 2, 4, 1.0)
SIZES = {
    "one token": (1, 64, 96, "int8"),
    "part of a tile": (5, 100, 130, "int8"),
    "whole tiles": (32, 64, 64, "int8"),
    "several tiles": (70, 90, 130, "int8"),
    "bf16 without scales": (33, 70, 100, "bf16"),
}
H200 = find_model("h200").gpu


def arguments_of(tokens: int, k: int, n: int, kind: str) -> tuple[Tensor, Tensor, Tensor | None]:
    if kind == "bf16":
        return random(1, tokens, k), random(n, k, seed=1), None
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    weight.flatten()[:4] = torch.tensor([-128, 127, -1, 0])
    return random(1, tokens, k), weight, random(n, seed=2).float() / 100


def close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert float((found.float() - expected.float()).norm() / expected.float().norm()) < 3e-3


@pytest.mark.parametrize("name", SIZES)
def test_it_is_the_product_of_plain_torch(name: str) -> None:
    x, weight, scale = arguments = arguments_of(*SIZES[name])
    expected = x.double() @ weight.double().T * (1.0 if scale is None else scale.double())
    close(prompt_linear(*arguments), expected.bfloat16())
    torch.library.opcheck(torch.ops.executorch_moe.prompt_linear, arguments, test_utils=CHECKS)


@pytest.mark.parametrize(
    ("changed", "to", "message"),
    [
        (0, torch.zeros(1, 5, 64), "x has dtype float32, expected bfloat16"),
        (0, random(64), r"x has shape \[64\], expected \[..., T, K\]"),
        (1, torch.zeros(96, 64), "weight has dtype float32, expected int8 or bfloat16"),
        (1, torch.zeros(96, 60, dtype=torch.int8), r"weight has shape \[96, 60\], expected \[N, 64\]"),
        (1, torch.zeros(64, 96, dtype=torch.int8).T, "weight must be contiguous"),
        (2, torch.zeros(95), r"scale has shape \[95\], expected \[96\]"),
    ],
)
def test_wrong_arguments_are_named(changed: int, to: Tensor, message: str) -> None:
    arguments: list[Tensor | None] = list(arguments_of(5, 64, 96, "int8"))
    arguments[changed] = to
    with pytest.raises(ValueError, match=message):
        prompt_linear(*arguments)


@pytest.mark.parametrize("n", [1, 128, 1040, 2048, 5120, 12352, 151_936])
@pytest.mark.parametrize("gpu", sorted(MODELS))
def test_tiles_take_all_numbers_of_tokens(gpu: str, n: int) -> None:
    tiles = tiles_of(find_model(gpu).gpu, n)
    assert tiles[0][1] == 0 and tiles[-1][2] == LIMIT
    for (smaller, above, up_to), (larger, start, _) in pairwise(tiles):
        assert above < up_to == start and smaller.tokens * smaller.columns < larger.tokens * larger.columns


def test_few_tokens_take_small_tiles_and_many_take_large_ones() -> None:
    used: list[Launch] = []
    for tokens in (64, 512, 2048):
        x = torch.empty(tokens, 4096, dtype=torch.bfloat16, device="meta")
        run_prompt_linear(
            x, torch.empty(2048, 4096, dtype=torch.bfloat16, device="meta"), None, gpu=H200, submit=used.append
        )
    assert [(x.constexprs["BLOCK_T"], x.grid) for x in used] == [(64, (32,)), (64, (128,)), (128, (256,))]


def test_one_launch_of_any_number_of_tokens_has_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exported program has a launch of each tile; here the grids are evaluated for numbers of tokens."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    tiles = tiles_of(H200, 2048)
    assert len(tiles) > 1
    environment = ShapeEnv()
    size = environment.create_unbacked_symint()
    launches: list[Launch] = []
    weight = torch.empty(2048, 64, dtype=torch.bfloat16, device="meta")
    x = torch.empty(4, 64, dtype=torch.bfloat16, device="meta")
    monkeypatch.setattr(linear, "_tokens", lambda x, k: size)
    run_prompt_linear(x, weight, None, gpu=H200, submit=launches.append)
    assert len(launches) == len(tiles)
    for tokens in (1, 63, *(edge + step for _, edge, _ in tiles[1:] for step in (-1, 0, 1, 2)), 100_000):
        grids = [int(launch.grid[0].node.expr.subs({size.node.expr: tokens})) for launch in launches]
        chosen = [tile for tile, above, up_to in tiles if above < tokens <= up_to]
        assert [bool(grid) for grid in grids] == [tile in chosen for tile, *_ in tiles]
        assert sum(grids) == -(-tokens // chosen[0].tokens) * -(-2048 // chosen[0].columns)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", SIZES)
def test_interpreted(name: str) -> None:
    arguments = arguments_of(*SIZES[name])
    close(run_prompt_linear(*arguments, tile=SMALL), linear_aten(*arguments))
    same_bits_in_any_order(lambda: run_prompt_linear(*arguments, tile=SMALL))


@pytest.mark.compiler
@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
def test_kernels_compile_without_spills(capability: int) -> None:
    gpu = Gpu(capability, 132, MAX_DYNAMIC_SHARED[capability])
    launches: list[Launch] = []
    with torch.device("meta"):
        weight, scale = torch.empty(1040, 2048, dtype=torch.int8), torch.empty(1040)
        for tile, above, _ in tiles_of(gpu, 1040):
            x = torch.empty(above + 1, 2048, dtype=torch.bfloat16)
            run_prompt_linear(x, weight, scale, tile=tile, gpu=gpu, submit=launches.append)
        odd = torch.empty(300, 1000, dtype=torch.bfloat16), torch.empty(70, 1000, dtype=torch.int8)
        run_prompt_linear(*odd, None, gpu=gpu, submit=launches.append)
    for launch in launches:
        report = compile_launch(launch, capability)
        assert report.spill_bytes == 0 and report.shared <= gpu.max_shared, (launch.kernel.__name__, report)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [*SIZES.values(), (1642, 512, 2048, "int8"), (700, 2048, 1040, "int8")], ids=str)
def test_on_a_gpu(sizes: tuple[int, int, int, str]) -> None:
    arguments = arguments_of(*sizes)
    there = [part if part is None else part.cuda() for part in arguments]
    found = prompt_linear(*there)
    close(found.cpu(), prompt_linear(*arguments))
    assert torch.equal(prompt_linear(*there), found)


@pytest.mark.gpu
def test_every_tile_on_a_gpu() -> None:
    arguments = arguments_of(333, 1000, 700, "int8")
    expected = prompt_linear(*arguments)
    for tile in linear.TILES:
        found = run_prompt_linear(*(part if part is None else part.cuda() for part in arguments), tile=tile)
        close(found.cpu(), expected)
