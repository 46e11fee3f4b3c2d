"""Every kernel in every scheme compiles for every target without a GPU and fits its shared memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from executorch_moe.kernels import SCHEMES
from executorch_moe.kernels.compile import NUM_SMS, KernelReport, compile_launch, record_launches, target_gpu
from executorch_moe.kernels.configs import MAX_DYNAMIC_SHARED
from executorch_moe.kernels.plan import Options

from .conftest import PROPERTY

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
def test_kernels_fit_the_target(scheme: str, capability: int, record_property: Callable[[str, object], None]) -> None:
    compiled = reports(scheme, capability)
    names = {r.kernel for r in compiled}
    expected = {"moe_few_tokens_gemm", "moe_grouped_gemm", "moe_route_count", "moe_route_scatter", "moe_sum_pairs"}
    assert names >= expected | ({"moe_quantize_rows"} if scheme == "w4a8" else set())
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
        # A few spilled values outside the K loop cost nothing that can be measured; more is a wrong configuration.
        assert r.spill_bytes <= 128, r


def test_unknown_target_is_named() -> None:
    with pytest.raises(ValueError, match="sm_70 is not a known target: use one of sm_80"):
        target_gpu(70)
