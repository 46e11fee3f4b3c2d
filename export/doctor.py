"""Checks what `executorch-moe` can use on this machine, with a remedy for each problem."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from executorch_moe.backends import versions

OK, WARN, FAIL = "ok", "warn", "fail"


@dataclass(frozen=True)
class Check:
    """One line of the report. `remedy` is empty if nothing has to be done."""

    name: str
    status: str
    found: str
    remedy: str = ""


def run_checks() -> list[Check]:
    """All checks, in the order in which problems should be solved."""
    checks = [Check("python", OK, sys.version.split()[0])]
    checks += pins()
    for name, section in (("GPU", gpu), ("export for other GPUs", cross_export), ("runtimes", runtimes)):
        try:
            checks += section()
        except Exception as error:  # raised by a missing package or an untested version
            reason = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
            checks.append(Check(name, FAIL, f"{type(error).__name__}: {reason}", "see the versions above"))
    return checks


def pins() -> Iterator[Check]:
    """Installed versions against the requirements in this package's metadata."""
    try:
        found = list(versions.pins())
    except metadata.PackageNotFoundError:
        yield Check(versions.DISTRIBUTION, FAIL, "not installed", "pip install . in the repository")
        return
    for pin in found:
        if pin.fits:
            yield Check(pin.name, OK, pin.version or "")
        elif pin.version is None:
            yield Check(pin.name, WARN if pin.optional else FAIL, "not installed", pin.remedy)
        else:
            yield Check(pin.name, FAIL, pin.version, f"works with {pin.wanted}: {pin.remedy}")


def gpu() -> Iterator[Check]:
    """The GPU that torch finds, Triton, and the assembler that Triton calls."""
    import torch

    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        props = torch.cuda.get_device_properties(0)
        found = f"{props.name}, sm_{major}{minor}, {props.multi_processor_count} SMs, {props.total_memory >> 30} GiB"
        # sm_80 is the first architecture with bf16 tensor cores.
        yield Check("GPU", OK if major >= 8 else FAIL, found, "" if major >= 8 else "kernels need sm_80 or later")
    else:
        why = (
            "no CUDA device is visible"
            if torch.backends.cuda.is_built()
            else f"torch {torch.__version__} is a CPU build"
        )
        remedy = "needed for export --target cuda and to run CUDA artifacts; --target sm_90 and cpu work without one"
        yield Check("GPU", WARN, why, remedy)
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        yield Check("Triton import", FAIL, str(error), "reinstall triton")
        return
    path = _ptxas(Path(triton.__file__ or "").parent)
    if path is None:
        yield Check("ptxas", FAIL, "not found in triton's wheel", "reinstall triton, or set TRITON_PTXAS_PATH")
        return
    try:
        text = subprocess.run([str(path), "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
        release = re.search(r"release ([\d.]+)", text)
        yield Check("ptxas", OK, f"{release.group(1) if release else 'unknown version'} (in triton's wheel)")
    except (OSError, subprocess.SubprocessError) as error:
        yield Check("ptxas", FAIL, str(error), "reinstall triton, or set TRITON_PTXAS_PATH")


def _ptxas(package: Path) -> Path | None:
    return next((p for p in sorted((package / "backends" / "nvidia" / "bin").glob("ptxas*")) if p.is_file()), None)


def cross_export() -> Iterator[Check]:
    """Whether this machine can export for GPUs by name."""
    from executorch_moe.backends.cuda.cross.target import check_target

    try:
        check_target("sm_90")
    except RuntimeError as error:
        found, _, remedy = str(error).partition(": ")
        yield Check("export for other GPUs", WARN, found, remedy)
    else:
        yield Check("export for other GPUs", OK, "usable")


def runtimes() -> Iterator[Check]:
    """Which runtimes can run which kind of artifact here, and why not."""
    from executorch_moe.backends.runtime.delegate_host import why_not_delegate_host
    from executorch_moe.backends.runtime.loader import why_not_executorch
    from executorch_moe.backends.runtime.pybindings import why_not_pybindings

    why = why_not_pybindings()
    yield Check("ExecuTorch runtime, CPU artifacts", WARN if why else OK, why or "usable")
    native, host = why_not_executorch({"CudaBackend"}), why_not_delegate_host()
    # One runtime for CUDA artifacts is enough.
    usable = not (native and host)
    remedy = "" if usable else "run CUDA artifacts on a GPU machine"
    yield Check("ExecuTorch runtime, CUDA artifacts", OK if not native else WARN, native or "usable", remedy)
    yield Check("delegate host, CUDA artifacts", OK if not host else WARN, host or "usable", remedy)
