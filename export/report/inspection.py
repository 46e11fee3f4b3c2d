"""The contents of an artifact, and the choices of its compilation, as tables and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from executorch_moe.backends.artifact.inspect import ArtifactReport, MethodReport, inspect_artifact
from executorch_moe.backends.cuda.cross.report import OUR_PREFIX, CrossCompileReport
from executorch_moe.export.host_memory import size as readable
from executorch_moe.kernels.gpus import find_models


def kernels_table(compiled: CrossCompileReport) -> Table:
    """Every kernel and dense GEMM with the configuration that was chosen for the target."""
    model = compiled.model
    table = Table(title=f"compiled for {model.product} ({model.arch})", title_justify="left")
    table.add_column("method", no_wrap=True)
    table.add_column("kernel", no_wrap=True, overflow="fold")
    table.add_column("configuration", overflow="fold", min_width=20)
    for kernel in compiled.kernels:
        source = "our tables" if kernel.ours else "Inductor"
        config = ", ".join(f"{name}={value}" for name, value in kernel.config.items())
        shared = f"{kernel.shared} of {model.max_shared} bytes shared"
        table.add_row(kernel.method, kernel.kernel, f"{config}; {shared}; {source}, 1 of {kernel.candidates}")
    for gemm in compiled.gemms:
        shape = "x".join(map(str, gemm.shape))
        table.add_row(gemm.method, f"GEMM {shape}", f"{gemm.template}; Inductor, 1 of {gemm.candidates}")
    return table


def report_json(fusion: str, compiled: Sequence[CrossCompileReport], pte: Path) -> str:
    """An export's report: the fusion report, `compiled` (one record per GPU by name) and `sizes` (bytes by part)."""
    content = json.loads(fusion)
    content["compiled"] = [report.as_dict() for report in compiled]
    content["sizes"] = inspect_artifact(pte).sizes()
    return json.dumps(content, indent=2)


def methods_table(report: ArtifactReport) -> Table:
    """Each method: delegates, architectures, number of kernels, inputs and outputs."""
    table = Table(title=str(report.pte), title_justify="left")
    table.add_column("method", no_wrap=True)
    table.add_column("delegates and GPU code", overflow="fold", min_width=12)
    table.add_column("inputs", overflow="fold", min_width=12)
    table.add_column("outputs", overflow="fold", min_width=12)
    for name, method in report.methods.items():
        # One per line: a name is not broken.
        table.add_row(name, "\n".join(_code(method)), "\n".join(method.inputs), "\n".join(method.outputs))
    return table


def _code(method: MethodReport) -> Iterator[str]:
    """Delegates, architectures and number of kernels of a method."""
    yield from (delegate.backend for delegate in method.delegates) if method.delegates else ("none",)
    if archs := sorted({arch for delegate in method.delegates for arch in delegate.archs}):
        kernels = [kernel for delegate in method.delegates for kernel in delegate.kernels]
        yield ", ".join(archs)
        yield f"{len(kernels)} kernels, {_ours(kernels)} ours"


def _ours(kernels: Iterable[str]) -> int:
    return sum(kernel.startswith(OUR_PREFIX) for kernel in kernels)


def one_line(report: ArtifactReport) -> str:
    """Methods, delegates, architectures, kernels and sizes of the files in one line."""
    delegates = [delegate for method in report.methods.values() for delegate in method.delegates]
    backends = ", ".join(dict.fromkeys(delegate.backend for delegate in delegates)) or "no delegates"
    parts = [", ".join(report.methods), backends]
    if report.archs:
        kernels = {kernel for delegate in delegates for kernel in delegate.kernels}
        parts += [", ".join(report.archs), f"{len(kernels)} kernels ({_ours(kernels)} ours)"]
    files = [path for path in (report.pte, report.ptd) if path is not None]
    parts.append(" + ".join(f"{readable(path.stat().st_size)} {path.suffix}" for path in files))
    return f"{report.pte}: {'; '.join(parts)}"


def sizes_table(report: ArtifactReport) -> Table:
    """Bytes of each part of an artifact."""
    table = Table(title="bytes", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for part, size in report.sizes().items():
        table.add_row(part, f"{size:,}")
    return table


def contents(report: ArtifactReport) -> dict[str, Any]:
    """The contents of an artifact for JSON: methods, constants, archs, sizes."""
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
    return {"methods": methods, "constants": report.constants, "archs": report.archs, "sizes": report.sizes()}


def check_archs(report: ArtifactReport, targets: str) -> None:
    """Check that every method has code for each of `targets`, as in "sm_80,sm_90", and no other code.

    Raises:
        ValueError: an unknown target, or methods that have other code. Names all of them.
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
