"""Export for a GPU that is not here: what the artifact holds, and that nothing stays replaced."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch.export import export

from executorch_moe.backends.artifact import check, save
from executorch_moe.backends.cuda import host_toolchain, patches
from executorch_moe.backends.cuda.cross_compile import target_cuda
from executorch_moe.backends.cuda.missing_operators import MissingOperatorsError
from executorch_moe.backends.cuda.patches import check_versions
from executorch_moe.backends.cuda.weight_metadata import parse_delegate
from executorch_moe.backends.cuda.weight_stand_ins import own_storage
from executorch_moe.backends.inspect import check_cuda_artifact, inspect_artifact
from executorch_moe.backends.ptd import PtdFile
from executorch_moe.backends.pte import PteFile
from executorch_moe.backends.targets import lower
from executorch_moe.kernels.gpus import gpu_of

SCRIPT = Path(__file__).with_name("cross_exports.py")


def why_no_cross_export() -> str:
    """Empty if this machine can export for a GPU that is not here, else the reason why not."""
    if why := host_toolchain.why_no_toolchain():
        return why
    try:
        check_versions()
    except RuntimeError as error:
        return str(error)
    return ""


needs_cross_export = pytest.mark.skipif(bool(why_no_cross_export()), reason=why_no_cross_export())


@dataclass(frozen=True)
class CrossExport:
    """A finished export of the tiny model: its folder holds tiny.pte, tiny.ptd, state.pt and report.txt."""

    target: str
    folder: Path

    @property
    def pte(self) -> Path:
        return self.folder / "tiny.pte"


def run_export(target: str, folder: Path) -> CrossExport:
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([sys.executable, str(SCRIPT), target, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return CrossExport(target, folder)


@pytest.fixture(scope="session", params=["sm_80", "sm_89", "sm_90"])
def crossed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CrossExport:
    """Made once a run: with several processes, each has a base folder of its own below a common one."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"cross-{request.param}"
    with FileLock(folder.with_suffix(".lock")):
        if (folder / "report.txt").is_file():
            return CrossExport(request.param, folder)
        return run_export(request.param, folder)


@needs_cross_export
@pytest.mark.slow
class TestArtifact:
    """Of the tiny model's two methods on one KV cache."""

    def test_kernels_are_for_the_target_and_symbols_are_the_runtimes(self, crossed: CrossExport) -> None:
        report = inspect_artifact(crossed.pte)
        check_cuda_artifact(report)
        assert set(report.methods) == {"prefill", "decode"}
        for method in report.methods.values():
            for delegate in method.delegates:
                assert {code.sm for code in delegate.gpu_code} == {int(crossed.target.removeprefix("sm_"))}
                assert set(delegate.mutated or ()) == {
                    f"kv_cache.{part}_{layer}" for part in ("key", "value") for layer in (0, 1)
                }

    def test_every_weight_has_the_bytes_of_the_state_dict(self, crossed: CrossExport) -> None:
        check(crossed.pte, verify_bytes=True)
        state = torch.load(crossed.folder / "state.pt")
        program, data = PteFile(crossed.pte), PtdFile(crossed.folder / "tiny.ptd")
        compared = set()
        for name in program.method_names:
            for delegate in program.plan(name).delegates:
                for weight in parse_delegate(program.delegate_data(delegate), name).weights:
                    assert weight.device == "cuda", weight
                    if weight.fqn not in state:
                        continue
                    expected = state[weight.fqn]
                    raw = data.tensor(weight.storage_key).clone()
                    typed = torch.empty(0, dtype=expected.dtype).set_(
                        raw.untyped_storage(), weight.storage_offset, weight.sizes, weight.strides
                    )
                    assert torch.equal(typed.view(torch.uint8), expected.contiguous().view(torch.uint8)), weight.fqn
                    compared.add(weight.fqn)
        # All but what no method reads.
        assert len(compared) >= len(state) - 2, sorted(state.keys() - compared)

    def test_no_temporary_path_is_inside(self, crossed: CrossExport) -> None:
        program = PteFile(crossed.pte)
        for key, blob in program.named_data().items():
            if key.endswith("_so_blob"):
                assert b"executorch_moe_" not in bytes(blob).replace(b"executorch_moe_cuda", b""), "a temporary path"

    def test_report_names_kernels_and_gemms(self, crossed: CrossExport) -> None:
        text = (crossed.folder / "report.txt").read_text()
        assert crossed.target in text.splitlines()[0] and "host code for x86-64-v3" in text
        for part in ("moe_grouped_gemm", "moe_few_tokens_gemm", "GemmChoice(shape=("):
            assert part in text

    def test_same_input_same_bytes(self, crossed: CrossExport, tmp_path: Path) -> None:
        again = run_export(crossed.target, tmp_path / "again")
        for name in ("tiny.pte", "tiny.ptd"):
            assert (again.folder / name).read_bytes() == (crossed.folder / name).read_bytes(), name


class Views(torch.nn.Module):
    """Two names for one weight, a view into the middle of a storage, a transposed and an expanded one."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.randn(16, 16))
        self.b = self.a
        whole = torch.randn(64, 16)
        self.register_buffer("middle", whole[16:32])
        self.register_buffer("turned", torch.randn(16, 32)[:, :16].t())
        self.register_buffer("wide", torch.randn(16, 1).expand(16, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x * self.a + self.middle) * self.turned + self.wide * self.b


@needs_cross_export
@pytest.mark.slow
def test_views_and_tied_weights(tmp_path: Path) -> None:
    model = Views()
    with torch.no_grad():
        program = export(model, (torch.randn(16, 16),))
    artifact = save(lower({"forward": program}, "l4"), tmp_path / "views")
    parsed, data = PteFile(artifact.pte), PtdFile(tmp_path / "views.ptd")
    (delegate,) = parsed.plan("forward").delegates
    seen = set()
    for weight in parse_delegate(parsed.delegate_data(delegate), "forward").weights:
        typed = torch.empty(0).set_(
            data.tensor(weight.storage_key).clone().untyped_storage(),
            weight.storage_offset,
            weight.sizes,
            weight.strides,
        )
        assert torch.equal(typed, getattr(model, weight.fqn)), weight.fqn
        seen.add(weight.fqn)
    assert seen >= {"middle", "turned", "wide"} and seen & {"a", "b"}


class Inner(torch.nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def calling(name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.export.ExportedProgram:
    """A program whose submodule `name` calls a function."""
    return export(torch.nn.Sequential(OrderedDict({name: Inner(function)})), (torch.eye(4),))


@needs_cross_export
def test_operators_that_the_runtime_lacks_are_listed_for_all_methods() -> None:
    programs = {
        "forward": calling("edges", lambda x: torch.histc(x, 4)),
        "other": calling("near", lambda x: torch.cdist(x, x)),
    }
    with pytest.raises(
        MissingOperatorsError, match=r"_cdist_forward in near \(Inner\); aten.histc in edges \(Inner\): "
    ):
        lower(programs, "sm_90")


@needs_cross_export
@pytest.mark.slow
def test_operators_that_only_the_compiler_finds_are_named_with_their_module() -> None:
    def scatter(x: torch.Tensor) -> torch.Tensor:
        return x.scatter_reduce(0, x.long(), x, "prod")

    with pytest.raises(
        MissingOperatorsError, match=r"no kernel for aten\.scatter_reduce\.two in rows \(Inner\): write"
    ):
        lower({"forward": calling("rows", scatter)}, "sm_90")


def replaced() -> list[object]:
    """Everything that `target_cuda` may replace."""
    import triton
    from torch._dynamo.device_interface import device_interfaces, init_device_reg
    from torch._inductor import config, select_algorithm

    init_device_reg()
    found: list[object] = []
    for name in patches.REPLACED:
        value = getattr(*patches._holder(name))
        found.append(dict(value) if isinstance(value, dict) else getattr(value, "__func__", value))
    found += [dict(device_interfaces), dict(triton.backends.backends), triton.runtime.driver._active]
    found += [dict(os.environ), config.get_config_copy(), gpu_of, torch.version.cuda]
    found.append(list(select_algorithm.get_algorithm_selector_cache().preprocessing_fns))
    found.append(hasattr(torch._C, "_cuda_getCurrentRawStream"))
    return found


@needs_cross_export
def test_everything_is_put_back() -> None:
    before = replaced()
    for broken in (False, True):
        with contextlib.suppress(KeyError), target_cuda("sm_89"):
            assert torch.cuda.get_device_capability() == (8, 9) and gpu_of(0).capability == 89
            if broken:
                raise KeyError
        assert replaced() == before


def test_unknown_versions_and_signatures_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "9.9" if name == "triton" else real(name))
    with pytest.raises(RuntimeError, match=r"with .*triton 9\.9 \(works with .*3\.7.*\): install a version that works"):
        check_versions()
    monkeypatch.setattr(metadata, "version", lambda name: patches.VERSIONS[name][0])
    monkeypatch.setattr("torch._inductor.graph.is_same_tensor", lambda left, right: True)
    with pytest.raises(RuntimeError, match=r"is_same_tensor\(left, right\), not \(data, value\)"), target_cuda("sm_90"):
        pass


def test_missing_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match="'no-such-compiler' is not found: install g"), target_cuda("h200"):
        pass


def test_own_storage_keeps_values_and_strides() -> None:
    whole = torch.arange(60.0).reshape(6, 10)
    for tensor in (whole, whole[2:4], whole.t(), whole[:, 3:5], whole[:1].expand(4, 10), whole[:0], whole[3, 4]):
        own = own_storage(tensor)
        assert torch.equal(own, tensor) and own.stride() == tensor.stride() and own.storage_offset() == 0
    assert own_storage(whole) is whole
