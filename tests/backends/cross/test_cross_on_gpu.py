"""On a GPU, with a CUDA build of torch: exports for named architectures, made and run in one process.

The replacements during the export must not affect the GPU of this machine, and the artifact must not depend on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from cached_experts import CachedExperts, inputs, methods

from executorch_moe.backends.artifact.files import Artifact, save
from executorch_moe.backends.artifact.inspect import check_cuda_artifact, inspect_artifact
from executorch_moe.backends.cuda.cross import host_toolchain
from executorch_moe.backends.cuda.cross.replacements import check_versions
from executorch_moe.backends.lower import lower
from executorch_moe.backends.runtime.loader import load
from executorch_moe.kernels.gpus import MAX_DYNAMIC_SHARED

# The process that runs the export must also make it, so it is not shared between processes.
pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.xdist_group("cross_on_gpu")]


@dataclass(frozen=True)
class Both:
    """One artifact for the GPU of this machine and for another architecture."""

    artifact: Artifact
    here: str
    other: str


def capability() -> int:
    major, minor = torch.cuda.get_device_capability()
    return major * 10 + minor


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    if why := host_toolchain.why_no_toolchain():
        pytest.skip(why)
    check_versions()
    if capability() not in MAX_DYNAMIC_SHARED:
        pytest.skip(f"sm_{capability()} is no target")
    here = f"sm_{capability()}"
    other = "sm_80" if capability() // 10 != 8 else "sm_90"
    manager = lower(methods(CachedExperts("w4a16")), f"{other},{here}")
    return Both(save(manager, tmp_path_factory.mktemp("both") / "model"), here, other)


def test_code_is_for_the_targets(both: Both) -> None:
    report = inspect_artifact(both.artifact.pte)
    check_cuda_artifact(report)
    for name, method in report.methods.items():
        sm = int(name.partition("@sm_")[2] or both.other.removeprefix("sm_"))
        assert {code.sm for delegate in method.delegates for code in delegate.gpu_code} == {sm}


def test_the_methods_of_this_gpu_equal_eager(both: Both, note_bits) -> None:
    loaded, eager = load(both.artifact.pte, runtime="delegate-host"), CachedExperts("w4a16").cuda()
    assert loaded.method_names == ["decode", "prefill"]
    for method, args in (("prefill", inputs(17)), ("decode", inputs(1, start=17))):
        (got,) = loaded.run(method, *args)
        expected = eager(*(tensor.cuda() for tensor in args))
        bits = "bit for bit" if torch.equal(got.cpu(), expected.cpu()) else "within bf16 rounding"
        note_bits(f"exported for {both.here} and {both.other}, {method}: equal {bits}")
        torch.testing.assert_close(got.cpu(), expected.cpu(), rtol=2**-7, atol=2**-7)


def test_the_gpu_that_is_here_is_itself_again(both: Both) -> None:
    assert torch.cuda.is_available() and torch.version.cuda is not None
    assert f"sm_{capability()}" == both.here
    double = torch.compile(lambda x: torch.sin(x) * 2)
    x = torch.arange(1000.0, device="cuda")
    torch.testing.assert_close(double(x), torch.sin(x) * 2)
