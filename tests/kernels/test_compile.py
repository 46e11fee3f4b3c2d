"""Every kernel in every scheme compiles for every target without a GPU and fits its shared memory and registers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from executorch_moe.kernels import SCHEMES
from executorch_moe.kernels.experts.plan import Options
from executorch_moe.kernels.gpus import (
    MAX_DYNAMIC_SHARED,
    MODELS,
    USUAL,
    Gpu,
    compile_for,
    find_model,
    gpu_of,
    target_names,
)
from executorch_moe.kernels.measure.compile import (
    KernelReport,
    compile_kernel,
    compile_launch,
    cuobjdump,
    record_launches,
)
from executorch_moe.kernels.measure.tune import PAIRS_PER_EXPERT
from executorch_moe.kernels.shapes import SHAPES, LayerShape
from executorch_moe.kernels.tuning.configs import MatvecConfig
from executorch_moe.kernels.tuning.tables import table_path

from ..combinations import EXHAUSTIVE, combinations
from .conftest import PROPERTY
from .wgmma_registers import hazards, parse

# Numbers of tokens for both paths and for every tile height of the heuristics.
TOKENS = (1, 8, 64, 512, 4096)


def reports(scheme: str, capability: int) -> list[KernelReport]:
    gpu = find_model(f"sm_{capability}").gpu
    compiled: dict[str, KernelReport] = {}
    for tokens in TOKENS:
        choices = [Options(persistent=persistent) for persistent in (True, False)]
        if tokens == 8:  # tables may leave this path out for the layer, but not for all layers
            choices.append(Options(path="few_tokens"))
        for options in choices:
            for launch in record_launches(gpu, scheme, tokens, SHAPES["qwen35"], options):
                key = f"{launch.kernel.__name__} {launch.num_warps} {sorted(launch.constexprs.items())}"
                if key not in compiled:
                    compiled[key] = compile_launch(launch, capability)
    return list(compiled.values())


@pytest.mark.compiler
@pytest.mark.parametrize(
    ("scheme", "capability"),
    combinations(list(SCHEMES), {f"sm_{capability}": capability for capability in USUAL}, one_of=4),
)
def test_kernels_fit_the_target(scheme: str, capability: int, record_property: Callable[[str, object], None]) -> None:
    compiled = reports(scheme, capability)
    names = {r.kernel for r in compiled}
    expected = {"moe_few_tokens_gemm", "moe_grouped_gemm", "moe_route_count", "moe_route_scatter", "moe_sum_pairs"}
    expected |= {"moe_quantize_rows"} if scheme == "w4a8" else set()
    expected |= {"moe_matvec"} if scheme != "bf16" else set()
    assert names >= expected
    limit = MAX_DYNAMIC_SHARED[capability]
    for name in sorted(names):
        mine = [r for r in compiled if r.kernel == name]
        registers, spills, shared = (max(getattr(r, f) for r in mine) for f in ("registers", "spill_bytes", "shared"))
        record_property(
            PROPERTY,
            f"sm_{capability} {scheme} {name}: {registers} registers, {spills} B spilled, "
            f"{shared} of {limit} B shared, {len(mine)} variants",
        )
    for r in compiled:
        assert r.shared <= limit, r
        # A few spilled values outside the K loop have no measurable cost. More means a wrong configuration.
        assert r.spill_bytes <= 128, r


@pytest.mark.compiler
@pytest.mark.parametrize(("tokens", "scheme"), combinations([1, 512], ["w4a16", "mxfp4"], one_of=2))
def test_clamped_swiglu_with_biases(tokens: int, scheme: str) -> None:
    """GPT-OSS's layer on an H100: its hidden size is not a power of two."""
    gpu = find_model("sm_90").gpu
    launches = record_launches(gpu, scheme, tokens, SHAPES["gpt-oss"], Options(), "swiglu_oai", bias=True)
    gemms = [launch for launch in launches if launch.constexprs.get("GEMM")]
    assert [launch.constexprs["ACTIVATION"] for launch in gemms] == [1, 1]
    for launch in gemms:
        report = compile_launch(launch, 90)
        assert report.shared <= MAX_DYNAMIC_SHARED[90] and report.spill_bytes <= 128, report


def test_targets_are_named_by_architecture_or_part() -> None:
    assert find_model("sm_90").gpu == find_model("h200").gpu == Gpu(90, 132, 232448)
    assert find_model("l4").num_sms == 58 and find_model("l4").arch == "sm_89"
    for name in target_names():
        assert find_model(name).name == name
    assert {MODELS[name].capability for name in USUAL.values()} == set(USUAL) == set(MAX_DYNAMIC_SHARED)


@pytest.mark.parametrize("target", ["sm_70", "sm_90a", "90", "H200 ", ""])
def test_unknown_target_is_named(target: str) -> None:
    with pytest.raises(ValueError, match=f"target '{target}' is not a known GPU: use one of sm_80, .*, h200, "):
        find_model(target)


def test_kernels_are_configured_for_the_target() -> None:
    with compile_for(find_model("l4").gpu):
        assert gpu_of(0).num_sms == 58
        with compile_for(find_model("sm_90").gpu):
            assert gpu_of(0).capability == 90
        assert gpu_of(0).capability == 89


OFTEN = {("w4a16", 256), ("w4a8", 60), ("mxfp4", 32)}
"""Schemes and numbers of experts of the layers that `make test` compiles, two of them without an entry."""


def tuned_layers() -> list[tuple[str, LayerShape]]:
    """Scheme and layer of each entry in the table of the H200, and of two layers without an entry."""
    stored = json.loads(table_path(find_model("h200").gpu).read_text())["layers"]
    layers = [(layer.pop("scheme"), LayerShape(**layer)) for layer in (entry["layer"] for entry in stored)]
    return [*layers, ("w4a8", LayerShape(60, 4, 2048, 1408, 128)), ("mxfp4", SHAPES["gpt-oss"].padded())]


@pytest.mark.compiler
@pytest.mark.parametrize(
    ("scheme", "layer"),
    [
        pytest.param(*entry, marks=() if (entry[0], entry[1].experts) in OFTEN else pytest.mark.exhaustive)
        for entry in tuned_layers()
    ],
    ids=str,
)
def test_decoded_weights_are_not_written_over_while_they_are_read(scheme: str, layer: LayerShape) -> None:
    """A wgmma with its first operand in registers reads them until a wait. The next K block is decoded into them.

    Checks every tile that the grouped path of a layer can use.
    """
    gpu, seen = find_model("h200").gpu, set()
    for tokens in (64, *(ratio * layer.experts // layer.top_k for ratio in PAIRS_PER_EXPERT)):
        options = Options(path="grouped")
        for launch in record_launches(gpu, scheme, tokens, layer, options):
            if "gemm" not in launch.kernel.__name__ or (key := str((launch.constexprs, launch.num_warps))) in seen:
                continue
            seen.add(key)
            compiled = compile_kernel(launch, gpu.capability)
            ptx, code = compiled.asm["ptx"], parse(cuobjdump(compiled.asm["cubin"], "-sass"))
            assert "wgmma.mma_async" in ptx and any(instruction.is_wgmma for instruction in code)
            assert not list(hazards(code))
            assert set(re.findall(r"wgmma\.wait_group\S*\s+(\d+)", ptx)) == {"0"}
    assert len(seen) >= 6


def test_a_wgmma_without_a_wait_in_its_step_is_a_hazard() -> None:
    """The hazard of the previous test, in a loop with and without a wait."""
    loop = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LOP3.LUT R152, R8, 0xf000f, R9, 0x6a, !PT ;
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, R152, gdesc[UR4], R24, gsb0 ;
        /*0030*/                   LDS.128 R160, [R2] ;
        /*0040*/                   {wait} ;
        /*0050*/              @!P0 BRA 0x10 ;
        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0070*/                   STG.E [R4.64], R24 ;
        /*0080*/                   EXIT ;
    """
    waited, not_waited = (
        list(hazards(parse(loop.replace("{wait}", wait)))) for wait in ("WARPGROUP.DEPBAR.LE gsb0, 0x0", "NOP")
    )
    assert waited == []
    assert not_waited == ["10 LOP3.LUT R152, R8, 0xf000f, R9, 0x6a, !PT: writes R152, an operand in use"]


@pytest.mark.compiler
@pytest.mark.parametrize("tokens", [1, 64, *(pytest.param(tokens, marks=EXHAUSTIVE) for tokens in (4, 16))])
def test_mxfp4_takes_registers_for_no_fewer_programs(tokens: int) -> None:
    """GPT-OSS's layer on an H100: at least 4/5 as many programs fit a multiprocessor as with w4a16, without spills."""
    gpu = find_model("sm_90").gpu
    fitting = []
    for scheme in ("w4a16", "mxfp4"):
        launches = record_launches(gpu, scheme, tokens, SHAPES["gpt-oss"], Options(tables=False))
        gemms = [launch for launch in launches if launch.constexprs.get("GEMM")]
        reports = [(launch, compile_launch(launch, 90)) for launch in gemms]
        assert scheme == "w4a16" or not any(report.spill_bytes for _, report in reports)
        fitting.append([65536 // (-(-report.registers // 8) * 8 * 32 * launch.num_warps) for launch, report in reports])
    assert all(ours >= 0.8 * theirs for theirs, ours in zip(*fitting, strict=True)), fitting


@pytest.mark.compiler
@pytest.mark.parametrize(
    ("capability", "weights"),
    combinations(
        [90, 80],
        {f"{scheme} {size}": (scheme, size) for scheme, size in (("w4a16", 32), ("w4a16", 128), ("mxfp4", 32))},
        one_of=2,
    ),
)
def test_weights_of_the_matvec_path_stay_where_they_are_loaded(capability: int, weights: tuple[str, int]) -> None:
    """Triton's choice of layouts depends on the order of loads; another choice moves all weights between threads.

    A thread has 32 words of weights. What it exchanges are a few scales, and its sums.
    """
    scheme, group_size = weights
    shape = replace(SHAPES["qwen3"], group_size=group_size)
    options = Options(path="matvec", matvec=(MatvecConfig(), MatvecConfig()))
    for launch in record_launches(find_model(f"sm_{capability}").gpu, scheme, 1, shape, options):
        compiled = compile_kernel(launch, capability)
        sass = cuobjdump(compiled.asm["cubin"], "-sass")
        assert len(re.findall(r"\bIDP\.2A", sass)) == 4 * 32
        assert len(re.findall(r"\bSHFL", sass)) <= 60
        assert compiled.metadata.shared <= 16384 * (4 if group_size == 32 else 1)
