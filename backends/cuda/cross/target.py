"""`target_cuda`: lower for an NVIDIA GPU that is not here, with a CPU or a CUDA build of torch."""

from __future__ import annotations

import atexit
import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from executorch_moe.kernels.gpus import GpuModel, compile_for, find_model

from . import host_toolchain
from .replacements import check_versions, replaced
from .report import CrossCompileReport
from .static_choices import StaticChoices


def check_target(target: str) -> GpuModel:
    """The GPU that a target names, if it can be compiled for on this machine.

    Raises:
        ValueError: unknown target.
        RuntimeError: no compiler, or see `check_versions`.
    """
    model = find_model(target)
    if why := host_toolchain.why_no_toolchain():
        raise RuntimeError(f"cannot export for {target}: {why}")
    check_versions()
    return model


@contextlib.contextmanager
def target_cuda(target: str) -> Iterator[CrossCompileReport]:
    """Within it, `to_edge_transform_and_lower` compiles CUDA delegates for `target`; no GPU is needed or used.

    It replaces functions of torch, Triton and ExecuTorch for the whole process and puts them back at the end; nothing
    else may compile with Inductor meanwhile, and it can be active once at a time. The exported programs are on the CPU.

    Args:
        target: "sm_90", "h200" or another of `kernels.gpus.target_names()`.

    Yields:
        What was chosen, filled while lowering.

    Raises:
        ValueError: unknown target.
        RuntimeError: no compiler, versions of torch, Triton or ExecuTorch that are not known to work, or it is active
            already, in this thread or another one.
    """
    report = CrossCompileReport(check_target(target))
    # Kept until the process ends: ExecuTorch leaves weights in files here and reads them to write the .ptd.
    folder = Path(tempfile.mkdtemp(prefix="executorch_moe_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with compile_for(report.model.gpu), replaced(report.model, StaticChoices(report), folder):
        yield report
