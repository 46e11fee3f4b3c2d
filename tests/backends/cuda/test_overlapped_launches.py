"""Host code in which launches of our kernels, and only of ours, overlap with the launch before. Needs no GPU."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from cached_experts import CachedExperts, methods
from requirements import needs_cross_export
from torch._inductor.codecache import AotCodeCompiler
from torch._inductor.codegen.cuda.device_op_overrides import CUDADeviceOpOverrides

import executorch_moe.kernels
from executorch_moe.backends import lower as targets
from executorch_moe.backends.artifact.files import save
from executorch_moe.backends.artifact.inspect import check_cuda_artifact, inspect_artifact
from executorch_moe.backends.cuda import overlapped_launches, patches
from executorch_moe.backends.cuda.cross import host_toolchain
from executorch_moe.backends.cuda.cross.target import target_cuda
from executorch_moe.backends.cuda.overlapped_launches import WAITING_KERNELS, LaunchesDoNotOverlap, unknown_host_code
from executorch_moe.backends.lower import lower

MACRO = "#define launchKernel("


def host_code() -> str:
    """The current text at the start of generated host code."""
    return CUDADeviceOpOverrides().kernel_driver()


def other_host_code(monkeypatch: pytest.MonkeyPatch, change: Callable[[str], str]) -> None:
    text = change(host_code())
    monkeypatch.setattr(CUDADeviceOpOverrides, "kernel_driver", lambda self: text)


def test_the_listed_kernels_are_ours_and_all_of_them_wait() -> None:
    calls = {}
    for path in sorted(Path(executorch_moe.kernels.__file__).parent.rglob("*.py")):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and "triton.jit" in map(ast.unparse, function.decorator_list):
                called = {ast.unparse(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)}
                calls[function.name] = called
    kernels = {name: called for name, called in calls.items() if name.startswith("moe_")}
    assert sorted(kernels) == sorted(WAITING_KERNELS)
    # Those of the delta rule for one token wait in a function that they share.
    waiting = {"launches_before", *(name for name, called in calls.items() if "launches_before" in called)}
    assert [name for name, called in kernels.items() if not called & waiting] == []


# Driver functions that print their arguments. A CUfunction is the number of its kernel.
FAKE_DRIVER = r"""
#include <cuda.h>
#include <cuda_runtime.h>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>
static CUresult answer = CUDA_SUCCESS;
static std::vector<std::string> functions;
static void say(CUfunction f, const char* how, const unsigned (&sizes)[7], CUstream stream, void** args) {
    std::printf("%s %s", functions[(size_t)f - 1].c_str(), how);
    for (unsigned size : sizes) std::printf(" %u", size);
    std::printf(" stream %zu argument %d\n", (size_t)stream, *(int*)args[0]);
}
CUresult cuGetErrorString(CUresult, const char** text) { *text = "as asked"; return CUDA_SUCCESS; }
CUresult cuModuleLoad(CUmodule* module, const char*) { *module = nullptr; return CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule* module, const void*) { *module = nullptr; return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction* f, CUmodule, const char* name) {
    functions.push_back(name);
    *f = (CUfunction)functions.size();
    return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
CUresult cuLaunchKernel(CUfunction f, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, CUstream stream, void** args, void** extra) {
    say(f, extra ? "wrong" : "plain", {x, y, z, bx, by, bz, shared}, stream, args);
    return answer;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction f, void** args, void** extra) {
    bool right = c->numAttrs == 1 && c->attrs[0].id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION &&
                 c->attrs[0].value.programmaticStreamSerializationAllowed == 1 && !extra;
    say(f, right ? "overlapped" : "wrong",
        {c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY, c->blockDimZ, c->sharedMemBytes},
        c->hStream, args);
    return answer;
}
"""


@needs_cross_export
@pytest.mark.parametrize("standard", ["c++17", "c++20"])
def test_only_listed_kernels_are_launched_with_the_attribute(tmp_path: Path, standard: str) -> None:
    """With calls as Inductor writes them: kernel NAME is `kernels_.NAME_0`. Names that resemble ours do not count."""
    others = [f"{name}{end}" for name in WAITING_KERNELS for end in ("s", "_", "_0")]
    others += [f"{start}{name}" for name in WAITING_KERNELS for start in ("x", "_", "triton_")]
    others += ["triton_poi_fused_add_0", "moe", "moe_", "row_matvec", "_sdpa_fwd_kernel"]
    names = [*WAITING_KERNELS, *others]
    variables = [f"{name}_{number}" for number, name in enumerate(names)]
    with overlapped_launches.overlapped_launches(90):
        text = host_code()
    calls = "".join(
        f"""
        if (kernels_.{variable} == nullptr) {{
            kernels_.{variable} = loadKernel(binary, "{name}", {index % 2}, &modules);
        }}
        launchKernel(kernels_.{variable}, grid_0, grid_1, grid_2, 4, {index}, args_, stream_);"""
        for index, (name, variable) in enumerate(zip(names, variables, strict=True))
    )
    (tmp_path / "launches.cpp").write_text(
        f"{FAKE_DRIVER}\n{text}\n"
        f"struct Kernels {{ {' '.join(f'CUfunction {variable}{{nullptr}};' for variable in variables)} }};\n"
        "template <typename kernels_type_> static __attribute__((noinline)) void launch(kernels_type_& kernels_) {\n"
        "    const void* binary = nullptr; std::vector<CUmodule> modules;\n"
        "    uint32_t grid_0 = 2, grid_1 = 3, grid_2 = 5; auto stream_ = (cudaStream_t)7;\n"
        f"    int value = 11; void* args_[] = {{&value}};\n{calls}\n}}\n"
        "int main() {\n    Kernels kernels; launch(kernels); launch(kernels);\n"
        "    answer = CUDA_ERROR_INVALID_VALUE;\n"
        "    try { launch(kernels); } catch (const std::runtime_error& error) { std::puts(error.what()); }\n}\n"
    )
    home = host_toolchain.make_cuda_home(tmp_path)
    flags = [f"-std={standard}", "-Wall", "-Wno-unused-function", "-Werror", f"-I{home / 'include'}"]
    command = [host_toolchain.compiler(), *flags, "launches.cpp", "-o", "launches"]
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    printed = subprocess.run([tmp_path / "launches"], capture_output=True, text=True, check=True).stdout.splitlines()
    expected = [
        f"{name} {'overlapped' if name in WAITING_KERNELS else 'plain'} 2 3 5 128 1 1 {index} stream 7 argument 11"
        for index, name in enumerate(names)
    ]
    assert printed == [*expected, *expected, expected[0], "CUDA driver error: as asked"]


def test_older_gpus_keep_the_stock_host_code_and_newer_ones_add_to_it() -> None:
    stock = CUDADeviceOpOverrides.kernel_driver
    text = host_code()
    for capability in (80, 86, 89, 90, 100, 120):
        with pytest.raises(KeyError), overlapped_launches.overlapped_launches(capability):
            assert host_code().startswith(text) and (MACRO in host_code()) == (capability >= 90)
            raise KeyError
        assert CUDADeviceOpOverrides.kernel_driver is stock and host_code() == text


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("void launchKernel(", "void launchKernels("),
        ("uint32_t gridY,", "uint32_t gridY, uint32_t cluster,"),
        ("32*numWarps", "64*numWarps"),
        ("cuLaunchKernel(", "cuLaunchCooperativeKernel("),
        ("CUDA_DRIVER_CHECK", "DRIVER_CHECK"),
    ],
)
def test_other_host_code_stays_as_it_is_and_is_refused_for_a_gpu_that_is_not_here(
    monkeypatch: pytest.MonkeyPatch, old: str, new: str
) -> None:
    assert unknown_host_code() == "" and old in host_code()
    other_host_code(monkeypatch, lambda text: text.replace(old, new))
    text = host_code()
    with (
        pytest.warns(LaunchesDoNotOverlap, match=r"do not overlap, .*another launchKernel\).* install torch 2\.11"),
        overlapped_launches.overlapped_launches(90),
    ):
        assert host_code() == text
    with warnings.catch_warnings(), overlapped_launches.overlapped_launches(89):
        warnings.simplefilter("error")
        assert host_code() == text
    with (
        pytest.raises(RuntimeError, match=r"kernel_driver\(\) has another launchKernel: install"),
        target_cuda("sm_90"),
    ):
        pass


def test_what_differs_between_versions_of_torch_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some versions do not pass loaded modules on. Line breaks do not matter."""
    last = r",\s*std::vector<CUmodule>\* loaded_modules = nullptr"
    use = r"if \(loaded_modules\) \{\s*loaded_modules->push_back\(mod\);\s*\}"
    other_host_code(monkeypatch, lambda text: re.sub(r"\n +", "\n ", re.sub(use, "", re.sub(last, "", text))))
    assert "loaded_modules" not in host_code() and unknown_host_code() == ""


def test_rocm_and_a_torch_without_the_class_keep_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ROCm build reports capability (9, 4) for an MI300."""
    text = host_code()
    with monkeypatch.context() as rocm:
        rocm.setattr(torch.version, "hip", "6.4")
        assert "ROCm" in unknown_host_code()
    with monkeypatch.context() as broken:
        broken.delattr("torch._inductor.codegen.cuda.device_op_overrides.CUDADeviceOpOverrides")
        assert "CUDADeviceOpOverrides" in unknown_host_code()
        with pytest.warns(LaunchesDoNotOverlap), overlapped_launches.overlapped_launches(90):
            pass
    assert host_code() == text


@pytest.mark.parametrize(("capability", "overlapped"), [((8, 9), False), ((9, 0), True), ((12, 0), True)])
def test_target_cuda_asks_the_gpu_that_is_here(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], overlapped: bool
) -> None:
    class Reached(Exception):
        pass

    def delegate(*_: object) -> None:
        raise Reached(MACRO in host_code())

    monkeypatch.setattr(targets, "why_no_cuda_export", lambda: "")
    monkeypatch.setattr(targets, "_delegate_cuda", delegate)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    with pytest.raises(Reached, match=str(overlapped)):
        lower(methods(CachedExperts("w4a16")), "cuda")
    assert MACRO not in host_code()


@needs_cross_export
def test_a_gpu_that_is_not_here_decides_by_its_own_capability() -> None:
    assert overlapped_launches.KERNEL_DRIVER in patches.PATCHES
    for target, overlapped in (("l4", False), ("h200", True), ("rtx5090", True)):
        with target_cuda(target):
            assert (MACRO in host_code()) == overlapped
        assert MACRO not in host_code()


@dataclass
class Compiled:
    """What exports generated: host code of each method, kernel -> PTX of its variants."""

    wrappers: list[str] = field(default_factory=list)
    ptx: dict[str, list[str]] = field(default_factory=dict)


class Generated(BaseException):  # Inductor wraps an Exception
    """Ends a compilation when host code and kernels are generated, before the C++ compiler."""


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Compiled:
    seen = Compiled()

    def compile(cls: Any, graph: Any, wrapper_code: str, *args: Any, **kwargs: Any) -> Any:
        seen.wrappers.append(wrapper_code)
        for path in Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.ptx"):
            seen.ptx.setdefault(path.stem, []).append(path.read_text())
        raise Generated

    monkeypatch.setattr(AotCodeCompiler, "compile", classmethod(compile))
    return seen


@needs_cross_export
@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "overlapped"), [pytest.param("sm_80", False, marks=pytest.mark.exhaustive), ("sm_90", True)]
)
def test_exports_from_sm_90_on_launch_our_kernels_overlapped(target: str, overlapped: bool, compiled: Compiled) -> None:
    """Uses W4A8, whose prompts use the largest number of kernels. test_cross_export.py has the symbols of a library."""
    for name, program in methods(CachedExperts("w4a8")).items():
        with pytest.raises(Generated):
            lower({name: program}, target)
    assert len(compiled.wrappers) == 2
    ours = set()
    for text in compiled.wrappers:
        assert (MACRO in text) == overlapped
        # The macro decides by the variable of a launch: the kernel's name and a number.
        loads = dict(re.findall(r"kernels_\.(\w+) = loadKernel\(\w+, \"(\w+)\",", text))
        launched = set(re.findall(r"^\s*launchKernel\(kernels_\.(\w+), grid_0, grid_1, grid_2, \d+, ", text, re.M))
        assert loads.keys() == launched
        for variable, name in loads.items():
            assert re.fullmatch(rf"{name}_\d+", variable) if name.startswith("moe_") else variable == name
        ours |= {name for name in loads.values() if name.startswith("moe_")}
    assert ours <= set(WAITING_KERNELS) and len(ours) >= 6
    # A kernel that is launched this way and does not wait is a race.
    assert compiled.ptx.keys() >= ours
    for name, variants in compiled.ptx.items():
        for ptx in variants:
            assert ("griddepcontrol.wait;" in ptx) == (overlapped and name in WAITING_KERNELS), name


@needs_cross_export
@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(("target", "overlapped"), [("sm_80", False), ("sm_90", True)])
def test_libraries_ask_the_driver_for_what_their_launches_need(target: str, overlapped: bool, tmp_path: Path) -> None:
    """As the tiny model's in test_cross_export.py, with the kernels of W4A8."""
    report = inspect_artifact(save(lower(methods(CachedExperts("w4a8")), target), tmp_path / "model").pte)
    check_cuda_artifact(report)
    for method in report.methods.values():
        (delegate,) = method.delegates
        symbols = {symbol.name for symbol in delegate.undefined}
        assert "cuLaunchKernel" in symbols and ("cuLaunchKernelEx" in symbols) == overlapped


def test_the_command_line_can_say_that_launches_do_not_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert targets.why_slower("cuda") == targets.why_slower("cpu") == targets.why_slower("sm_90") == ""
    other_host_code(monkeypatch, lambda text: text.replace("cuLaunchKernel(", "cuLaunchCooperativeKernel("))
    assert re.match(r"launches .* do not overlap, .*: to change that, install torch 2\.11", targets.why_slower("cuda"))
    assert targets.why_slower("cpu") == ""  # nothing is launched
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert targets.why_slower("cuda") == ""
