"""The Gluon kernel (kernels/gluon): what its machine code must show, what it refuses, and on a GPU its results."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from executorch_moe.kernels.experts.plan import Options, run_fused_experts
from executorch_moe.kernels.gpus import MAX_DYNAMIC_SHARED, find_model
from executorch_moe.kernels.launch import Launch
from executorch_moe.kernels.measure.compile import compile_kernel, compile_launch, cuobjdump, record_launches
from executorch_moe.kernels.measure.timing import make_layers
from executorch_moe.kernels.shapes import SHAPES, LayerShape
from executorch_moe.kernels.tuning.configs import GemmConfig, GluonConfig

from .cases import BOUNDS, CASES, ZERO_CASE, Case, make, relative_error
from .wgmma_registers import hazards, parse

TILES = {
    "32 by 256": GluonConfig(32, 256, 8, 8),
    "64 by 256": GluonConfig(64, 256, 8, 6),
    "64 by 128, two programs": GluonConfig(64, 128, 4, 4, ctas_per_sm=2),
    "128 by 256": GluonConfig(128, 256, 8, 4, 4),
}


def gemms(tile: GluonConfig, shape: LayerShape = SHAPES["qwen35"], bias: bool = False) -> list[Launch]:
    options = Options(path="gluon", gluon=(tile, tile))
    launches = record_launches(find_model("h200").gpu, "w4a16", 1642, shape, options, bias=bias)
    found = [launch for launch in launches if launch.constexprs.get("GEMM")]
    assert [launch.kernel.__name__ for launch in found] == ["moe_gluon_grouped_gemm"] * 2
    return found


@pytest.mark.compiler
@pytest.mark.parametrize(
    "tile",
    [pytest.param(t, id=name, marks=() if t.block_m == 64 else pytest.mark.exhaustive) for name, t in TILES.items()],
)
def test_warps_multiply_while_they_decode(tile: GluonConfig) -> None:
    """One group of wgmmas runs while the next weights are decoded, into registers that it does not read.

    ptxas makes each wgmma wait for itself if it finds too few registers, so waits must be fewer than wgmmas.
    """
    for launch in gemms(tile):
        compiled, report = compile_kernel(launch, 90), compile_launch(launch, 90)
        code = parse(cuobjdump(compiled.asm["cubin"], "-sass"))
        assert set(re.findall(r"wgmma\.wait_group\S*\s+(\d+)", compiled.asm["ptx"])) == {"0", "1"}
        assert sum(i.is_wgmma for i in code) >= 8
        assert sum(i.waits_down_to() is not None for i in code) == tile.pieces + 1
        assert not list(hazards(code))
        # With 128 tokens, Triton 3.7 spills two values.
        assert report.spill_bytes <= (0 if tile.block_m <= 64 else 16), report
        programs, threads = tile.ctas_per_sm, 32 * (tile.num_warps + 4)
        assert programs * (report.shared + 1024) <= MAX_DYNAMIC_SHARED[90] + 1024, report
        assert programs * threads * report.registers <= 65536, report


@pytest.mark.compiler
@pytest.mark.parametrize("group_size", [32, 64])
def test_small_groups_padding_and_biases_fit(group_size: int) -> None:
    tile = TILES["64 by 128, two programs"]
    for launch in gemms(tile, LayerShape(8, 2, 192, 320, group_size), bias=True):
        report = compile_launch(launch, 90)
        assert report.spill_bytes <= 128 and 2 * (report.shared + 1024) <= MAX_DYNAMIC_SHARED[90] + 1024, report


@pytest.mark.compiler
def test_memory_of_other_launches_is_accessed_after_the_wait() -> None:
    """The wait comes before the warps part, and before every load, copy and store of the machine code's order."""
    for launch in gemms(TILES["64 by 256"]):
        ptx = compile_kernel(launch, 90).asm["ptx"]
        accesses = [m.start() for m in re.finditer(r"ld\.global|st\.global|cp\.async\.c[ag]", ptx)]
        start = ptx.index("griddepcontrol.wait")
        # Warps that load run code that stands before it, but only after the first warps told them to, through memory.
        told = ptx.index("st.shared", start)
        assert "griddepcontrol" not in ptx[start + 20 :] and accesses
        assert re.search(r"barrier\.sync|bar\.sync", ptx[told:])
        first_of_the_first_warps = min(a for a in accesses if a > start)
        assert start < first_of_the_first_warps


def run(options: Options, gpu: str = "h200", scheme: str = "w4a16", shape: LayerShape = SHAPES["qwen35"]) -> None:
    record_launches(find_model(gpu).gpu, scheme, 64, shape, options)


@pytest.mark.parametrize("gpu", ["sm_80", "sm_100", "sm_120"])
def test_other_gpus_are_refused(gpu: str) -> None:
    with pytest.raises(ValueError, match=f"only sm_90 has, but the GPU is {gpu}: use path='grouped', or None"):
        run(Options(path="gluon"), gpu)


@pytest.mark.parametrize("scheme", ["bf16", "w4a8", "mxfp4"])
def test_other_schemes_are_refused(scheme: str) -> None:
    with pytest.raises(
        ValueError, match="supports scheme w4a16 without zero points, not this scheme: use path='grouped'"
    ):
        run(Options(path="gluon"), scheme=scheme)


def test_zero_points_are_refused() -> None:
    arguments = make(ZERO_CASE, "w4a16").args()
    with pytest.raises(ValueError, match="supports scheme w4a16 without zero points, not zero points"):
        run_fused_experts(
            arguments, options=Options(path="gluon"), gpu=find_model("h200").gpu, submit=lambda launch: None
        )


def test_tokens_that_are_not_aligned_are_refused() -> None:
    arguments = make(Case("unaligned", tokens=4), "w4a16").args()
    moved = torch.empty(arguments.hidden_states.numel() + 4, dtype=torch.bfloat16)[4:]
    arguments = arguments._replace(hidden_states=moved.view_as(arguments.hidden_states))
    with pytest.raises(ValueError, match="the tokens start 4 values into their memory, not a multiple of 8"):
        run_fused_experts(
            arguments, options=Options(path="gluon"), gpu=find_model("h200").gpu, submit=lambda launch: None
        )


def test_tiles_must_fit_the_layer() -> None:
    wide, low = GluonConfig(64, 256, 8), GluonConfig(32, 256, 8)
    with pytest.raises(ValueError, match="block_n=256 must divide N=384 of GEMM2: use 128"):
        run(Options(path="gluon", gluon=(wide, wide)), shape=LayerShape(4, 2, 384, 256, 128))
    with pytest.raises(ValueError, match="block_m=64 of GEMM1 and 32 of GEMM2 differ: both walk the same row blocks"):
        run(Options(path="gluon", gluon=(wide, low)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"block_m": 8}, "block_m=8 must be one of"),
        ({"block_n": 32}, "block_n=32 must be one of"),
        ({"num_warps": 2}, "num_warps=2 must be one of"),
        ({"pieces": 1}, "pieces=1 must be one of"),
        ({"num_stages": 1}, "num_stages=1 must be at least 2"),
    ],
)
def test_configurations_are_checked(values: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(GluonConfig(64, 128), **values)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_operator_against_the_oracle(case: Case) -> None:
    problem = make(case, "w4a16")
    out = run_fused_experts(problem.args("cuda"), options=Options(path="gluon"))
    assert relative_error(out, problem.expected) <= BOUNDS["w4a16"]


@pytest.mark.gpu
@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
def test_results_have_the_bits_of_the_triton_kernel(tile: GluonConfig) -> None:
    """Both decode to the same numbers and add them in the same order, and no run differs from another."""
    layer = make_layers(SHAPES["qwen35"], "w4a16", 700, 1)[0]
    same = GemmConfig(min(tile.block_m, 64), 128, 1, 4, 3)
    expected = layer.run(Options(path="grouped", gemm1=same, gemm2=same))
    options = Options(path="gluon", gluon=(tile, tile))
    assert all(torch.equal(layer.run(options), expected) for _ in range(20))
