"""Checks whether ExecuTorch's Python bindings work with the installed torch, without importing them."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
from pathlib import Path

import torch

from executorch_moe.backends.artifact.elf import ElfImage

# The torch version that the wheels of a release were compiled with. They access at::Tensor objects through inlined C++
# code, whose layout changes between minor versions of torch. Neither the metadata of the wheel nor the dynamic linker
# checks the version: 1.5.1 with torch 2.11 imports, runs, and reads tensors at wrong offsets.
_BUILT_FOR = {(1, 5): (2, 13)}
_TORCH_LIBRARIES = ("libc10.so", "libtorch_cpu.so", "libtorch_python.so", "libtorch.so")
# Itanium-mangled names of torch's own namespaces; pybind11's tensor casters live in libtorch_python.
_TORCH_NAMES = ("3c10", "2at", "5torch")


@functools.cache
def why_not_pybindings() -> str:
    """Empty if the bindings match the running torch, else the reason not to use them."""
    try:
        version = importlib.metadata.version("executorch")
    except importlib.metadata.PackageNotFoundError:
        return "executorch is not installed"
    release, running = _minor(version), _minor(torch.__version__)
    built_for = _BUILT_FOR.get(release)
    if built_for is not None and built_for != running:
        wanted = ".".join(map(str, built_for))
        return (
            f"the Python bindings of executorch {version} are built for torch {wanted}, not for the installed torch "
            f"{torch.__version__}: they would read tensors with the wrong layout. Install torch {wanted}.*"
        )
    library = _bindings_library()
    if library is None:
        return f"executorch {version} is installed without its Python bindings"
    if missing := _missing_symbols(library):
        return (
            f"the Python bindings of executorch {version} need {len(missing)} symbols that torch {torch.__version__} "
            f"does not have (the first: {missing[0]}): they are built for another torch. Install matching versions"
        )
    return ""


def _minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _bindings_library() -> Path | None:
    # Find the package, not the extension: finding a submodule imports only its parents.
    spec = importlib.util.find_spec("executorch.extension.pybindings")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("_C*.so")):
            return path
    return None


def _missing_symbols(library: Path) -> list[str]:
    """Symbols of torch's namespaces that the bindings import and the loaded torch does not define."""
    folder = Path(torch.__file__).parent / "lib"
    loaded = [ctypes.CDLL(str(folder / name)) for name in _TORCH_LIBRARIES if (folder / name).exists()]
    if not loaded:
        return []
    names = [s.name for s in ElfImage(library.read_bytes()).undefined_symbols() if not s.weak]
    wanted = [n for n in names if any(n.startswith(("_ZN" + part, "_ZNK" + part)) for part in _TORCH_NAMES)]
    return sorted(name for name in wanted if not any(hasattr(handle, name) for handle in loaded))
