"""Export for a GPU that is not in this machine: the contents of the artifacts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from cached_experts import CachedExperts, methods
from cross_exports import MAX_CONTEXT
from filelock import FileLock
from requirements import needs_cross_export
from torch._inductor.codecache import AotCodeCompiler
from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
from torch.export import export

from executorch_moe.backends.artifact.files import PTD_IDENTITY_KEY, check, open_artifact, save
from executorch_moe.backends.artifact.inspect import check_cuda_artifact, inspect_artifact
from executorch_moe.backends.artifact.method_targets import pick_methods
from executorch_moe.backends.artifact.ptd import PtdFile
from executorch_moe.backends.artifact.pte import PteFile
from executorch_moe.backends.artifact.weight_metadata import parse_delegate
from executorch_moe.backends.cuda.missing_operators import MissingOperatorsError
from executorch_moe.backends.lower import lower
from executorch_moe.backends.runtime.loader import _architecture
from executorch_moe.kernels import gpus
from executorch_moe.kernels.gpus import find_model

SCRIPT = Path(__file__).with_name("cross_exports.py")
ROOT = SCRIPT.parents[3]


@dataclass(frozen=True)
class CrossExport:
    """A finished export of the tiny model: a folder with tiny.pte, tiny.ptd, state.pt and report.json."""

    target: str
    folder: Path

    @property
    def pte(self) -> Path:
        return self.folder / "tiny.pte"


def run_export(target: str, folder: Path, **environment: str) -> CrossExport:
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), target, str(folder)],
        capture_output=True, text=True, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return CrossExport(target, folder)


@pytest.fixture(scope="session", params=[pytest.param("sm_80", marks=pytest.mark.exhaustive), "sm_90"])
def crossed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CrossExport:
    """Made once in a run. With several pytest processes, each has its own base folder below a common one."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"cross-{request.param}"
    with FileLock(folder.with_suffix(".lock")):
        if (folder / "report.json").is_file():
            return CrossExport(request.param, folder)
        return run_export(request.param, folder)


@needs_cross_export
@pytest.mark.slow
class TestArtifact:
    """Artifacts of the tiny model: two methods on one KV cache."""

    def test_kernels_are_for_the_target_and_symbols_are_the_runtimes(self, crossed: CrossExport) -> None:
        report = inspect_artifact(crossed.pte)
        check_cuda_artifact(report)
        assert set(report.methods) == {"prefill", "decode"}
        # Not only the length that was traced.
        assert open_artifact(crossed.pte)[0].inputs("prefill")[0].sizes == (1, MAX_CONTEXT)
        for method in report.methods.values():
            for delegate in method.delegates:
                sm = int(crossed.target.removeprefix("sm_"))
                assert {code.sm for code in delegate.gpu_code} == {sm}
                symbols = {symbol.name for symbol in delegate.undefined}
                # Launches overlap from sm_90 on.
                assert "cuLaunchKernel" in symbols and ("cuLaunchKernelEx" in symbols) == (sm >= 90)
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
        # All except those that no method reads.
        assert len(compared) >= len(state) - 2, sorted(state.keys() - compared)

    def test_no_path_of_this_machine_is_inside(self, crossed: CrossExport) -> None:
        content = crossed.pte.read_bytes()
        places = {Path(torch.__file__).parents[1], Path(triton.__file__).parents[1], ROOT, Path.home()}
        for place in (*places, tempfile.gettempdir()):
            assert str(place).encode() + b"/" not in content, place

    def test_report_names_kernels_and_gemms(self, crossed: CrossExport) -> None:
        (report,) = json.loads((crossed.folder / "report.json").read_text())
        assert report["arch"] == crossed.target and "host code for x86-64-v3" in report["text"]
        kernels = {kernel["kernel"]: kernel for kernel in report["kernels"]}
        inside = inspect_artifact(crossed.pte).methods
        for name, method in inside.items():
            chosen = {kernel["kernel"] for kernel in report["kernels"] if kernel["method"] == name}
            assert chosen == set(method.delegates[0].kernels), name
        assert kernels["moe_grouped_gemm"]["ours"] and kernels["moe_grouped_gemm"]["config"]["BLOCK_M"] >= 16
        assert kernels["moe_matvec"]["method"] == "decode"
        assert {kernel["method"] for kernel in report["kernels"]} == {"prefill", "decode"}
        assert all("num_warps" in kernel["config"] for kernel in report["kernels"])
        assert report["gemms"] and all(gemm["shape"] and gemm["candidates"] > 1 for gemm in report["gemms"])

    def test_kernels_fit_the_shared_memory(self, crossed: CrossExport) -> None:
        (report,) = json.loads((crossed.folder / "report.json").read_text())
        assert report["max_shared"] == find_model(crossed.target).max_shared
        assert 0 < max(kernel["shared"] for kernel in report["kernels"]) <= report["max_shared"]

    def test_sizes_by_part_add_up(self, crossed: CrossExport) -> None:
        report = inspect_artifact(crossed.pte)
        sizes = report.sizes()
        code = sum(size for part, size in sizes.items() if " code " in part)
        assert 0.9 * sizes[".pte"] < code < sizes[".pte"]
        assert sizes["experts"] == 2 * (131072 + 65536 + 16384 + 8192)  # w13, w2 and their scales, two layers
        assert sizes["state"] == 4 * 64 * 64 * 2  # bf16 keys and values of two layers, 64 positions, 2 heads of 32
        assert sizes["experts"] + sizes["state"] + sizes["other weights"] == sum(report.weights.values())


def other_place(folder: Path) -> dict[str, str]:
    """An environment in which this package and temporary files have other paths."""
    package = folder / "checkout" / "executorch_moe"
    package.mkdir(parents=True)
    for layer in ("kernels", "backends", "export", "examples"):
        (package / layer).symlink_to(ROOT / layer)
    (folder / "temporary").mkdir()
    path = os.pathsep.join(filter(None, (str(package.parent), os.environ.get("PYTHONPATH"))))
    return {"PYTHONPATH": path, "TMPDIR": str(folder / "temporary")}


@needs_cross_export
@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("crossed", ["sm_80"], indirect=True)
def test_same_bytes_from_another_checkout_and_temporary_folder(crossed: CrossExport, tmp_path: Path) -> None:
    again = run_export(crossed.target, tmp_path / "again", **other_place(tmp_path))
    for name in ("tiny.pte", "tiny.ptd"):
        assert (again.folder / name).read_bytes() == (crossed.folder / name).read_bytes(), name


@needs_cross_export
@pytest.mark.slow
@pytest.mark.exhaustive
def test_two_targets_share_the_weights_of_a_method(tmp_path: Path) -> None:
    module = CachedExperts("w4a16")
    artifact = save(lower({"decode": methods(module)["decode"]}, "sm_90,sm_80"), tmp_path / "both")
    report = inspect_artifact(artifact.pte)
    check_cuda_artifact(report)
    codes = {name: method.delegates[0].archs for name, method in report.methods.items()}
    assert codes == {"decode": ("sm_90a",), "decode@sm_80": ("sm_80",)}
    picked = {gpu: pick_methods(codes, gpu, lambda name: _architecture(PteFile(artifact.pte), name))
              for gpu in ((8, 0), (9, 0))}  # fmt: skip
    assert picked == {(8, 0): {"decode": "decode@sm_80"}, (9, 0): {"decode": "decode"}}
    # Both methods read the module's weights, and each is stored once.
    program, data, read = PteFile(artifact.pte), PtdFile(artifact.ptd), []
    for name in program.method_names:
        (delegate,) = program.plan(name).delegates
        weights = parse_delegate(program.delegate_data(delegate), name).weights
        read.append({weight.fqn: weight.storage_key for weight in weights if "_lifted" not in weight.fqn})
    assert read[0] == read[1] and read[0].keys() == module.state_dict().keys()
    for name, tensor in module.state_dict().items():
        assert bytes(data.data(read[0][name])) == bytes(tensor.untyped_storage()), name


@needs_cross_export
@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("crossed", ["sm_80"], indirect=True)
def test_several_targets_share_weights_and_have_the_code_of_each(crossed: CrossExport, tmp_path: Path) -> None:
    both = run_export("sm_90,sm_80", tmp_path / "both", **other_place(tmp_path))
    report = inspect_artifact(both.pte)
    check_cuda_artifact(report)
    archs = {name: method.delegates[0].archs for name, method in report.methods.items()}
    assert archs == {
        **{f"{method}@sm_80": ("sm_80",) for method in ("prefill", "decode")},
        **dict.fromkeys(("prefill", "decode"), ("sm_90a",)),
    }
    # Weights exist once, under the same names. Only constants that lowering makes belong to one library.
    first, all_data = PtdFile(crossed.folder / "tiny.ptd").digests(), PtdFile(both.folder / "tiny.ptd").digests()
    assert first.pop(PTD_IDENTITY_KEY) != all_data.pop(PTD_IDENTITY_KEY)
    assert first.items() <= all_data.items()
    assert all("_so_blob:_lifted_tensor_constant" in key for key in all_data.keys() - first.keys())
    alone, together = PteFile(crossed.pte), PteFile(both.pte)
    # Keys are digests: the artifact contains the libraries of one for sm_80 alone, byte for byte.
    assert {key for key in alone.named_data() if key.endswith("_so_blob")} < together.named_data().keys()
    for name in alone.method_names:
        (delegate,), (other,) = alone.plan(name).delegates, together.plan(f"{name}@sm_80").delegates
        assert alone.delegate_data(delegate) == together.delegate_data(other)


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


def no_question(*_: object, **__: object) -> None:
    raise AssertionError("the GPU of this machine was queried")


@needs_cross_export
@pytest.mark.slow
def test_views_and_tied_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a simulated CUDA build and GPU, which must not be queried."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("get_device_properties", "get_device_capability", "get_device_name", "current_device", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda device=None: no_question())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: no_question())
    stock, written = CppWrapperCpu.codegen_model_constructor, []

    def constructor(self: Any) -> None:
        stock(self)
        written.append(self.prefix.getvalue())

    monkeypatch.setattr(CppWrapperCpu, "codegen_model_constructor", constructor)
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
    # The devices that the library expects: torch 2.13's runtime accepts no tensor on another device.
    (text,) = written
    devices = re.findall(r"constants_info_\[\d+\]\.device_type = (\w+);", text)
    assert devices == ["cached_torch_device_type_cuda"] * len(re.findall(r"constants_info_\[\d+\]\.dtype = ", text))
    assert len(devices) == len(seen)


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
        MissingOperatorsError, match=r"no kernel for aten\.scatter_reduce\.two in rows \(Inner\): rewrite"
    ):
        lower({"forward": calling("rows", scatter)}, "sm_90")


def test_two_targets_of_one_architecture_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'l4' and 'rtx4090' are both sm_89, .*: name one of them, or export two"):
        lower({"forward": calling("same", torch.relu)}, "l4,sm_90,rtx4090")


class Product(torch.nn.Module):
    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return left @ right


@needs_cross_export
@pytest.mark.slow
def test_products_of_odd_sizes_are_not_timed_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Like those of attention over seven tokens in bf16, for which Inductor would time padding."""
    written: list[str] = []

    def compile(cls: Any, graph: Any, wrapper_code: str, *args: Any, **kwargs: Any) -> Any:
        written.append(wrapper_code)
        raise Generated

    monkeypatch.setattr(AotCodeCompiler, "compile", classmethod(compile))
    left, right = (torch.zeros(2, 7, width, dtype=torch.bfloat16) for width in (7, 32))
    with torch.no_grad(), pytest.raises(Generated):
        lower({"forward": export(Product(), (left, right))}, "sm_90")
    (host_code,) = written
    assert re.search(r"loadKernel\(\w+, \"triton_\w*bmm\w*\",", host_code)


class Generated(BaseException):  # Inductor wraps an Exception
    """Ends a compilation when host code and kernels are generated, before the C++ compiler."""


@needs_cross_export
def test_a_kernel_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpus.MAX_DYNAMIC_SHARED, 80, 16)

    def softmax(x: torch.Tensor) -> torch.Tensor:
        return x.softmax(-1)

    program = export(torch.nn.Sequential(OrderedDict(rows=Inner(softmax))), (torch.zeros(8, 4096),))
    with pytest.raises(RuntimeError) as raised:
        lower({"forward": program}, "a100")
    line = str(raised.value)
    assert "kernel triton_" in line and "of method forward does not compile for a100 (sm_80, 16 bytes of shared" in line
    assert "choose another --target or scheme" in line and "\n" not in line
