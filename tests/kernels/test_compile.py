"""Every kernel in every scheme compiles for every target without a GPU and fits its shared memory."""

from __future__ import annotations

import pytest

from executorch_moe.kernels import SCHEMES
from executorch_moe.kernels.compile import NUM_SMS, KernelReport, compile_launch, record_launches, target_gpu
from executorch_moe.kernels.configs import MAX_DYNAMIC_SHARED
from executorch_moe.kernels.plan import Options

# Tokens on both sides of the few-token path and of every tile height the heuristic chooses.
TOKENS = (1, 8, 64, 512, 4096)


def reports(scheme: str, capability: int) -> list[KernelReport]:
    gpu = target_gpu(capability)
    compiled: dict[str, KernelReport] = {}
    for tokens in TOKENS:
        for persistent in (True, False):
            options = Options(persistent=persistent)
            for launch in record_launches(gpu, scheme, tokens, 256, 8, 2048, 512, 128, options):
                key = f"{launch.kernel.__name__} {launch.num_warps} {sorted(launch.constexprs.items())}"
                if key not in compiled:
                    compiled[key] = compile_launch(launch, capability)
    return list(compiled.values())


@pytest.mark.parametrize("capability", NUM_SMS, ids=lambda c: f"sm_{c}")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_kernels_fit_the_target(scheme: str, capability: int) -> None:
    compiled = reports(scheme, capability)
    names = {r.kernel for r in compiled}
    expected = {"moe_few_tokens_gemm", "moe_grouped_gemm", "moe_route_count", "moe_route_scatter", "moe_sum_pairs"}
    assert names >= expected | ({"moe_quantize_rows"} if scheme == "w4a8" else set())
    for r in compiled:
        print(
            f"sm_{r.capability} {r.kernel}: {r.registers} registers, {r.spill_bytes} B spilled, "
            f"{r.shared} B shared; {r.constants}"
        )
        assert r.shared <= MAX_DYNAMIC_SHARED[capability], r
        # A few spilled values outside the K loop cost nothing that can be measured; more is a wrong configuration.
        assert r.spill_bytes <= 128, r


@pytest.mark.parametrize("tokens", [1, 512])
def test_clamped_swiglu_with_biases(tokens: int) -> None:
    """GPT-OSS's layer on an H100: its hidden size is no power of two."""
    gpu = target_gpu(90)
    launches = record_launches(gpu, "w4a16", tokens, 32, 4, 2880, 2880, 32, Options(), "swiglu_oai", bias=True)
    gemms = [launch for launch in launches if launch.constexprs.get("GEMM")]
    assert [launch.constexprs["ACTIVATION"] for launch in gemms] == [1, 1]
    for launch in gemms:
        report = compile_launch(launch, 90)
        assert report.shared <= MAX_DYNAMIC_SHARED[90] and report.spill_bytes <= 128, report


def test_unknown_target_is_named() -> None:
    with pytest.raises(ValueError, match="sm_70 is not a known target: use one of sm_80"):
        target_gpu(70)
