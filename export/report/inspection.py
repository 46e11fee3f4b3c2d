"""What is inside an artifact, and what it was compiled with, as tables and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from executorch_moe.backends.artifact.inspect import ArtifactReport, inspect_artifact
from executorch_moe.backends.cuda.cross.report import OUR_PREFIX, CrossCompileReport
from executorch_moe.kernels.gpus import find_models


def kernels_table(compiled: CrossCompileReport) -> Table:
    """Every kernel and dense GEMM with the configuration that was chosen for the target."""
    model = compiled.model
    table = Table(title=f"compiled for {model.product} ({model.arch})", title_justify="left")
    for column in ("method", "kernel", "from", "candidates", "configuration", "shared memory"):
        table.add_column(column, overflow="fold")
    for kernel in compiled.kernels:
        source = "our tables" if kernel.ours else "Inductor"
        config = ", ".join(f"{name}={value}" for name, value in kernel.config.items())
        shared = f"{kernel.shared} of {model.max_shared}"
        table.add_row(kernel.method, kernel.kernel, source, str(kernel.candidates), config, shared)
    for gemm in compiled.gemms:
        shape = "x".join(map(str, gemm.shape))
        table.add_row(gemm.method, f"GEMM {shape}", "Inductor", str(gemm.candidates), gemm.template, "")
    return table


def report_json(fusion: str, compiled: Sequence[CrossCompileReport], pte: Path) -> str:
    """An export's report: that of the fusion, with `compiled` (a record a GPU) and `sizes` (bytes by part)."""
    content = json.loads(fusion)
    content["compiled"] = [report.as_dict() for report in compiled]
    content["sizes"] = inspect_artifact(pte).sizes()
    return json.dumps(content, indent=2)


def methods_table(report: ArtifactReport) -> Table:
    """Each method: its architecture, kernels, inputs and outputs."""
    table = Table(title=str(report.pte), title_justify="left")
    for column in ("method", "delegates", "GPU code", "kernels", "of them ours", "inputs", "outputs"):
        table.add_column(column, overflow="fold")
    for name, method in report.methods.items():
        kernels = [kernel for delegate in method.delegates for kernel in delegate.kernels]
        table.add_row(
            name,
            ", ".join(delegate.backend for delegate in method.delegates) or "none",
            ", ".join(sorted({arch for delegate in method.delegates for arch in delegate.archs})),
            str(len(kernels)),
            str(sum(kernel.startswith(OUR_PREFIX) for kernel in kernels)),
            "; ".join(method.inputs),
            "; ".join(method.outputs),
        )
    return table


def sizes_table(report: ArtifactReport) -> Table:
    """Bytes by part."""
    table = Table(title="bytes", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for part, size in report.sizes().items():
        table.add_row(part, f"{size:,}")
    return table


def inspection_json(report: ArtifactReport) -> str:
    """The same as JSON: methods, constants, archs, sizes."""
    methods: dict[str, Any] = {
        name: {
            "delegates": [delegate.backend for delegate in method.delegates],
            "archs": sorted({arch for delegate in method.delegates for arch in delegate.archs}),
            "kernels": sorted({kernel for delegate in method.delegates for kernel in delegate.kernels}),
            "mutated": sorted({buffer for delegate in method.delegates for buffer in delegate.mutated or ()}),
            "operators": list(method.operators),
            "inputs": list(method.inputs),
            "outputs": list(method.outputs),
        }
        for name, method in report.methods.items()
    }
    content = {"methods": methods, "constants": report.constants, "archs": report.archs, "sizes": report.sizes()}
    return json.dumps(content, indent=2)


def check_archs(report: ArtifactReport, targets: str) -> None:
    """Check that every method has code for each GPU of "sm_80,sm_90", and no other code.

    Raises:
        ValueError: unknown target, or a method that has other code; names all of them.
    """
    models = find_models(targets)
    expected = {model.capability for model in models}
    found: dict[str, set[int]] = {}
    for name, method in report.methods.items():
        codes = [code for delegate in method.delegates for code in delegate.gpu_code]
        found.setdefault(name.partition("@")[0], set()).update(code.sm for code in codes)
    wrong = [
        f"{method} has code for {', '.join(f'sm_{sm}' for sm in sorted(archs)) or 'no GPU'}"
        for method, archs in found.items()
        if archs != expected
    ]
    if wrong:
        raise ValueError(f"{report.pte}: {'; '.join(wrong)}: export it again with --target {targets}")
