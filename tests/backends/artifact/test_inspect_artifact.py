"""Inspection: ELF images, embedded cubins, fatbins, and reports of artifacts."""

from __future__ import annotations

import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from cached_experts import CachedExperts, methods
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from executorch_moe.backends.artifact.cubin import GpuCode, find_gpu_code
from executorch_moe.backends.artifact.elf import ElfImage, UndefinedSymbol
from executorch_moe.backends.artifact.files import Artifact, save
from executorch_moe.backends.artifact.inspect import (
    ArtifactReport,
    DelegateReport,
    MethodReport,
    check_cuda_artifact,
    inspect_artifact,
)
from executorch_moe.backends.lower import lower
from executorch_moe.backends.runtime.delegate_host import check_arch


@triton.jit
def moe_probe(x_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(x_ptr + offsets, tl.load(x_ptr + offsets) * 2)


def cubin(capability: int) -> bytes:
    """A real cubin. Triton has its own ptxas, so this needs no GPU and no CUDA toolkit."""
    source = ASTSource(fn=moe_probe, signature={"x_ptr": "*fp32", "BLOCK": "constexpr"}, constexprs={(1,): 128})
    return triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]


def fatbin(*entries: tuple[int, int, bytes]) -> bytes:
    """A fatbin of (kind, sm, payload) entries, in the layout of nvcc."""
    body = b"".join(
        struct.pack("<HHIQIIHHI", kind, 0x101, 64, len(data), 0, 0, 0, 0, sm).ljust(64, b"\0") + data
        for kind, sm, data in entries
    )
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


@pytest.mark.parametrize(
    ("capability", "arch"), [(80, "sm_80"), (89, "sm_89"), (90, "sm_90a"), (100, "sm_100a"), (120, "sm_120a")]
)
def test_cubins_are_found(capability: int, arch: str) -> None:
    image = cubin(capability)
    library = b"\x7fELF junk" + bytes(333) + image + bytes(77) + image
    codes = find_gpu_code(library)
    assert [(code.arch, code.kernels, code.size) for code in codes] == [(arch, ("moe_probe",), len(image))] * 2


def test_fatbins() -> None:
    image = cubin(80)
    codes = find_gpu_code(bytes(100) + fatbin((1, 80, b"compressed ptx"), (2, 80, image), (2, 86, b"compressed cubin")))
    assert [(code.kind, code.arch, code.kernels) for code in codes] == [
        ("cubin", "sm_80", ("moe_probe",)),
        ("ptx", "compute_80", ()),
        ("cubin", "sm_86", ()),
    ]


@pytest.mark.parametrize(
    ("kind", "sm", "exact", "device", "runs"),
    [
        ("cubin", 80, False, (8, 0), True),
        ("cubin", 80, False, (8, 9), True),
        ("cubin", 89, False, (8, 0), False),
        ("cubin", 80, False, (9, 0), False),
        ("cubin", 90, True, (9, 0), True),
        ("cubin", 100, True, (10, 3), False),
        ("cubin", 120, False, (12, 1), True),
        ("ptx", 80, False, (9, 0), True),
        ("ptx", 90, False, (8, 9), False),
        ("ptx", 90, True, (10, 0), False),
    ],
)
def test_what_runs_where(kind: str, sm: int, exact: bool, device: tuple[int, int], runs: bool) -> None:
    assert GpuCode(kind, sm, exact, (), 0).runs_on(device) is runs


def test_a_gpu_of_another_architecture_gets_a_message() -> None:
    library = cubin(90)
    check_arch(library, (9, 0), "method decode")
    with pytest.raises(
        RuntimeError, match=r"method decode was exported for sm_90a, this GPU is sm_80: export it again"
    ):
        check_arch(library, (8, 0), "method decode")
    check_arch(b"no gpu code at all", (8, 0), "method decode")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("elf")
    (folder / "a.c").write_text(
        "#include <stdio.h>\n#include <math.h>\n"
        "int cuLaunchKernel(); int cudaMalloc(); int aoti_torch_clone(); int at_native_mm(); int cublasCreate();\n"
        'double f(double x) { puts(""); return pow(x, x) + cuLaunchKernel() + cudaMalloc() + aoti_torch_clone()'
        " + at_native_mm() + cublasCreate(); }\n"
    )
    subprocess.run(["gcc", "-w", "-shared", "-fPIC", "a.c", "-o", "a.so", "-lm"], cwd=folder, check=True)
    return (folder / "a.so").read_bytes()


def test_undefined_symbols(library: bytes) -> None:
    symbols = {symbol.name: symbol for symbol in ElfImage(library).undefined_symbols()}
    assert symbols["puts"].version.startswith("GLIBC_")
    assert symbols["cuLaunchKernel"] == UndefinedSymbol("cuLaunchKernel", "", weak=False)
    report = DelegateReport("CudaBackend", undefined=tuple(symbols.values()))
    assert report.foreign_symbols == ("at_native_mm", "cublasCreate")


@pytest.mark.parametrize("length", [0, 3, 63, 64, 5000, -1])
def test_damaged_elf(library: bytes, length: int) -> None:
    with pytest.raises(ValueError, match="ELF image"):
        ElfImage(library[:length])


def test_report_of_a_cpu_program(linear: Artifact) -> None:
    report = inspect_artifact(linear.pte)
    assert (report.pte, report.ptd) == (linear.pte, linear.ptd)
    method = report.methods["forward"]
    assert method.delegates == ()
    assert any("linear" in name or "mm" in name for name in method.operators)
    assert method.inputs == ("float32 [2, 4]",)
    assert report.weights["weight"] == 48
    with pytest.raises(ValueError, match=r"forward: no delegate; forward: operators outside the delegates: aten::"):
        check_cuda_artifact(report)


def test_experts_of_a_cpu_program_are_counted_by_name(tmp_path: Path) -> None:
    module = CachedExperts("w4a16", torch.float32).eval()
    report = inspect_artifact(save(lower(methods(module, torch.float32), "cpu"), tmp_path / "model").pte)
    sizes = report.sizes()
    assert sizes["experts"] == module.experts.packed().nbytes()
    # The cache is in neither file, and nothing records which part of the planned memory it is.
    assert sizes.keys() == {"experts", "other weights", ".pte", ".ptd"}
    assert sizes["experts"] + sizes["other weights"] == sum(report.weights.values())


def test_state_is_counted_where_it_is_recorded(emulated: Artifact) -> None:
    report = inspect_artifact(emulated.pte)
    sizes = report.sizes()
    assert sizes["experts"] == 0 and sizes["state"] > 0
    assert sizes["state"] + sizes["other weights"] == sum(report.weights.values())
    method = report.methods["peek"]
    unrecorded = replace(method, delegates=tuple(replace(delegate, mutated=None) for delegate in method.delegates))
    untold = replace(report, methods={**report.methods, "peek": unrecorded}).sizes()
    assert sizes.keys() - untold.keys() == {"state", "other weights"} and untold.items() <= sizes.items()


def test_report_of_delegates(emulated: Artifact) -> None:
    report = inspect_artifact(emulated.pte)
    assert set(report.methods) == {"prefill", "decode", "peek"}
    for name, mutated in {"prefill": {"cache", "count"}, "decode": {"cache", "count"}, "peek": set()}.items():
        (delegate,) = report.methods[name].delegates
        assert delegate.backend == "CudaBackend"
        assert set(delegate.mutated or ()) == mutated
        assert delegate.foreign_symbols == ()
        assert any(symbol.name.startswith("aoti_torch_") for symbol in delegate.undefined)
    check_cuda_artifact(report, kernel_prefix="")
    with pytest.raises(ValueError, match=r"decode: no moe_\* kernel \(it has none\)"):
        check_cuda_artifact(report)


def test_everything_wrong_is_in_one_message() -> None:
    bad = DelegateReport("CudaBackend", undefined=(UndefinedSymbol("mm_out", "", False),))
    methods = {
        "a": MethodReport((bad,), ("aten::add",), (), ()),
        "b": MethodReport((DelegateReport("XnnpackBackend"),), (), (), ()),
    }
    report = ArtifactReport(Path("m.pte"), Path("m.ptd"), methods, (), {})
    with pytest.raises(ValueError) as error:
        check_cuda_artifact(report)
    for part in (
        "a: operators outside",
        "a: no moe_*",
        "a: undefined symbols that no runtime has: mm_out",
        "b: delegates of",
    ):
        assert part in str(error.value)


def test_torch_is_not_asked_for_a_gpu(linear: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("asked for a GPU"))
    inspect_artifact(linear.pte)


def test_weights_without_values_count_in_full(emulated: Artifact) -> None:
    report = inspect_artifact(emulated.pte)
    sizes = replace(report, weights=dict.fromkeys(report.weights, 1)).sizes()
    told = {name: size for m in report.methods.values() for d in m.delegates for name, size in d.weights.items()}
    assert sizes["state"] + sizes["other weights"] == sum(told.values()) > len(report.weights)
