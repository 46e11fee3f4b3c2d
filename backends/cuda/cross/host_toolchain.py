"""Builds a CUDA delegate's host code without a CUDA toolkit: headers, a libcuda to link with, a compiler.

Headers and ptxas come from Triton's wheel; the rest is generated in a temporary folder.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

CPU_BASELINE = "x86-64-v3"
"""The oldest CPU that runs the host code of an artifact: AVX2, FMA and BMI2 (Haswell, Zen 1 and later)."""

HEADERS = ("cuda.h", "cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h", "crt/host_defines.h")

# Driver functions that AOTInductor's host code may call (torch 2.11 to 2.13). At load it finds the real library.
DRIVER_FUNCTIONS = (
    "cuCtxGetDevice",
    "cuDeviceGetAttribute",
    "cuFuncSetAttribute",
    "cuGetErrorString",
    "cuLaunchKernel",
    "cuLaunchKernelEx",
    "cuModuleGetFunction",
    "cuModuleLoad",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuOccupancyMaxActiveBlocksPerMultiprocessor",
    "cuTensorMapEncodeTiled",
)

# The only header of libcu++ that CUDA's own headers include; Triton does not ship it. Its macros select host or device
# code, here always host code. That code is in parentheses, except where two selections are nested.
_NV_TARGET = """#pragma once
#ifdef __CUDACC__
#error "host code only"
#endif
#define NVT_BARE(code) NVT_PASTE(NVT_MARK code)
#define NVT_MARK(...) NVT_MARK __VA_ARGS__
#define NVT_PASTE(...) NVT_JOIN(__VA_ARGS__)
#define NVT_JOIN(...) NVT_DROP_##__VA_ARGS__
#define NVT_DROP_NVT_MARK
#define NV_IF_ELSE_TARGET(side, on_device, on_host) NVT_BARE(on_host)
#define NV_IF_TARGET(side, ...)
"""

# Fake CUDA tensors need a device guard for CUDA, which a CPU build of torch does not have. A CUDA build without a GPU
# installs this same guard.
_GUARD = """#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10::impl;
static NoOpDeviceGuardImpl<c10::DeviceType::CUDA> guard;
static auto& slot = device_guard_impl_registry[static_cast<size_t>(c10::DeviceType::CUDA)];
extern "C" int install_guard() {
  const DeviceGuardImplInterface* none = nullptr;
  return slot.compare_exchange_strong(none, &guard);
}
extern "C" void remove_guard() { slot.store(nullptr); }
"""


def why_no_toolchain() -> str:
    """Empty if this machine can build host code, else the reason and the remedy."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return (
            f"this is {platform.system()} on {platform.machine()}, and host code is built for Linux on {CPU_BASELINE}: "
            "export on an x86-64 Linux machine"
        )
    if shutil.which(compiler()) is None:
        return f"the C++ compiler {compiler()!r} is not found: install g++ 11 or later, or name one in CXX"
    include = triton_folder() / "include"
    if missing := [name for name in HEADERS if not (include / name).is_file()]:
        return f"Triton's wheel lacks {', '.join(missing)}: reinstall triton"
    if not (triton_folder() / "bin" / "ptxas").is_file():
        return "Triton's wheel lacks ptxas: reinstall triton"
    return ""


def compiler() -> str:
    """The C++ compiler's command."""
    return os.environ.get("CXX") or "g++"


def triton_folder() -> Path:
    """The folder of CUDA's headers and ptxas in Triton."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia"


def make_cuda_home(folder: Path) -> Path:
    """Create a folder that serves as CUDA_HOME for compiling and linking host code."""
    home = folder / "cuda"
    (home / "include" / "nv").mkdir(parents=True)
    for entry in (triton_folder() / "include").iterdir():
        if entry.name != "nv":
            (home / "include" / entry.name).symlink_to(entry)
    (home / "include" / "nv" / "target").write_text(_NV_TARGET)
    (home / "lib64").mkdir()
    source = folder / "libcuda.c"
    source.write_text("".join(f"int {name}(void) {{ return 1; }}\n" for name in DRIVER_FUNCTIONS))
    library = home / "lib64" / "libcuda.so"
    _build(["-x", "c", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", str(source), "-o", str(library)])
    return home


def make_compiler(folder: Path) -> Path:
    """Create a compiler script that always builds for `CPU_BASELINE` and leaves no path of this machine in its output.

    torch 2.11 has no setting for -march=native. Line tables (-g1), file symbols and __FILE__ (also in torch's headers)
    contain paths of this machine, so the same input would give different bytes on each machine.
    """
    import torch

    script = folder / "g++"
    real = shlex.quote(shutil.which(compiler()) or compiler())
    places = {folder: ".", Path(torch.__file__).parent: "torch", triton_folder(): "triton"}
    maps = " ".join(shlex.quote(f"-ffile-prefix-map={place}={name}") for place, name in places.items())
    script.write_text(
        "#!/bin/sh\n"
        "first=1\n"
        'for argument in "$@"; do\n'
        f'  if [ "$first" ]; then set -- -s {maps}; first=; fi\n'
        '  case "$argument" in\n'
        f'    -march=native) set -- "$@" -march={CPU_BASELINE} ;;\n'
        "    -g1) ;;\n"
        '    *.wrapper.cpp) set -- "$@" "$argument" "-ffile-prefix-map=$argument=wrapper.cpp" ;;\n'
        '    *) set -- "$@" "$argument" ;;\n'
        "  esac\n"
        "done\n"
        f'exec {real} "$@"\n'
    )
    script.chmod(0o755)
    return script


@functools.cache
def device_guard() -> ctypes.CDLL:
    """The device guard for CPU builds of torch: `install_guard()` (1 if it was needed) and `remove_guard()`.

    It is built once in a process.
    """
    import torch

    package = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(prefix="executorch_moe_") as folder:
        source, library = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(_GUARD)
        flags = ["-std=c++20", "-O1", "-shared", "-fPIC", f"-I{package / 'include'}"]
        _build([*flags, str(source), "-o", str(library), f"-L{package / 'lib'}", "-lc10"])
        return ctypes.CDLL(str(library))


def _build(arguments: list[str]) -> None:
    done = subprocess.run([compiler(), *arguments], capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
        raise RuntimeError(
            f"the C++ compiler {compiler()!r} failed ({lines[0].strip()}): use g++ 11 or later, or name one in CXX"
        )
