"""One artifact for several GPU architectures: it has each method once for each, on the same weights.

Methods for the first architecture have plain names, which ExecuTorch's own runners look up, and those for others are
named as `decode@sm_90`. Artifacts of 0.1 have no plain names.

ExecuTorch's CUDA runtime loads the one library that a delegate names, so the choice at load is that of a method. The
libraries are small compared with the weights, which all methods share by name. Only the methods for the GPU of this
machine are loaded.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterable

import torch

from executorch_moe.kernels.gpus import GpuModel

from .cubin import find_gpu_code

Capability = tuple[int, int]
_SEPARATOR = "@"
# cuDeviceGetAttribute: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
_MAJOR, _MINOR = 75, 76


def method_for(method: str, model: GpuModel) -> str:
    """Name of a method that is compiled for one of several GPUs, except the first: `decode@sm_90`."""
    return f"{method}{_SEPARATOR}{model.arch}"


def split_method(name: str) -> tuple[str, int | None]:
    """(method, 90) for `method@sm_90`; (name, None) for any other name."""
    found = re.fullmatch(rf"(.+){_SEPARATOR}sm_(\d+)", name)
    return (found[1], int(found[2])) if found else (name, None)


def cpu_method(method: str) -> str:
    """Name of a method that a CPU program has beside one for ExecuTorch's runners: `decode@cpu`."""
    return f"{method}{_SEPARATOR}cpu"


def pick_cpu_methods(names: Iterable[str]) -> dict[str, str]:
    """The methods to load of a program for the CPU: method -> its name in the program.

    A language model's `forward` is for ExecuTorch's own runners. It is loaded only as the prefill of a program that has
    no other.
    """
    found = {name.removesuffix(f"{_SEPARATOR}cpu"): name for name in names}
    if found.get("decode") == cpu_method("decode"):
        forward = found.pop("forward", None)
        if forward is not None:
            found.setdefault("prefill", forward)
    return dict(sorted(found.items()))


def pick_methods(
    names: Iterable[str], capability: Capability | None, sm_of: Callable[[str], int | None] = lambda name: None
) -> dict[str, str]:
    """The methods to load for the GPU of this machine: method -> its name in the program.

    Code runs on GPUs of the same major version that are not older. Of several that run, the newest is chosen.

    Args:
        names: all methods of the program. capability: of the GPU, or None without a GPU.
        sm_of: the architecture of a method with a plain name, as 90, from its code; None if it has no code. It is asked
            only for methods that the program also has for other architectures.

    Raises:
        RuntimeError: the program has a method for other architectures only; the message names both.
    """
    chosen: dict[str, str] = {}
    found: dict[str, dict[int, str]] = {}
    for name in names:
        method, sm = split_method(name)
        if sm is None:
            chosen[method] = name
        else:
            found.setdefault(method, {})[sm] = name
    for method, by_sm in found.items():
        if method in chosen and (sm := sm_of(chosen[method])) is not None:
            by_sm[sm] = chosen[method]
        usable = [sm for sm in by_sm if capability is not None and _runs(sm, capability)]
        if not usable:
            raise RuntimeError(_mismatch(f"method {method}", [f"sm_{sm}" for sm in by_sm], capability))
        chosen[method] = by_sm[max(usable)]
    return dict(sorted(chosen.items()))


def check_arch(library: bytes | memoryview, capability: Capability, where: str) -> None:
    """Check that a delegate's library has code for a device.

    Raises:
        RuntimeError: it has code for other architectures only; the message names both.
    """
    codes = find_gpu_code(library)
    if codes and not any(code.runs_on(capability) for code in codes):
        raise RuntimeError(_mismatch(where, [code.arch for code in codes], capability))


def gpu_capability() -> Capability | None:
    """Compute capability of the first GPU, from the driver if torch is a CPU build; None without a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_capability()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, parts = ctypes.c_int(), (ctypes.c_int(), ctypes.c_int())
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    for part, attribute in zip(parts, (_MAJOR, _MINOR), strict=True):
        if driver.cuDeviceGetAttribute(ctypes.byref(part), attribute, device):
            return None
    return parts[0].value, parts[1].value


def _runs(sm: int, capability: Capability) -> bool:
    return sm // 10 == capability[0] and sm % 10 <= capability[1]


def _mismatch(where: str, archs: Iterable[str], capability: Capability | None) -> str:
    listed = ", ".join(sorted(set(archs)))
    if capability is None:
        return f"{where} was exported for {listed}, and there is no GPU: load it on a machine with one of these"
    here = f"sm_{capability[0]}{capability[1]}"
    return f"{where} was exported for {listed}, this GPU is {here}: export it again with --target {here}"
