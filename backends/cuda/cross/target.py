"""`target_cuda`: lower for an NVIDIA GPU that is not in this machine, with a CPU or CUDA build of torch."""

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
    """The GPU of a target, after checking that this machine can compile for it.

    Raises:
        ValueError: the target is unknown.
        RuntimeError: there is no compiler; or see `check_versions`.
    """
    model = find_model(target)
    if why := host_toolchain.why_no_toolchain():
        raise RuntimeError(f"cannot export for {target}: {why}")
    check_versions()
    return model


@contextlib.contextmanager
def target_cuda(target: str) -> Iterator[CrossCompileReport]:
    """Context in which `to_edge_transform_and_lower` compiles CUDA delegates for `target`; needs and uses no GPU.

    It replaces functions of torch, Triton and ExecuTorch for the whole process and restores them at the end. Nothing
    else may compile with Inductor meanwhile, and only one such context can be active. Programs must be on the CPU.

    Args:
        target: "sm_90", "h200" or another of `kernels.gpus.target_names()`.

    Yields:
        The report of all choices, filled while lowering.

    Raises:
        ValueError: the target is unknown.
        RuntimeError: there is no compiler; the versions of torch, Triton or ExecuTorch are not known to work; or the
            context is already active, in this or another thread.
    """
    report = CrossCompileReport(check_target(target))
    # Kept until the process ends, because ExecuTorch reads the weights from files here when it writes the .ptd.
    folder = Path(tempfile.mkdtemp(prefix="executorch_moe_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with compile_for(report.model.gpu), replaced(report.model, StaticChoices(report), folder):
        yield report
