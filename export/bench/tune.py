"""`executorch-moe tune`: measures kernel configurations for one layer and writes the best to a table."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from executorch_moe.backends.atomic_files import write_text
from executorch_moe.kernels.measure.compile import compile_ahead
from executorch_moe.kernels.measure.tune import Tuner, entry, with_entry
from executorch_moe.kernels.tuning.tables import TunedLayer, table_path

from .kernel import parse_shape
from .model import versions


def tune_layer(
    shape_text: str, scheme: str, out: Path | None, layers: int, console: Console, *, grouped_only: bool = False
) -> Path:
    """Tunes a layer on the GPU of this machine and writes the table.

    Args:
        shape_text: preset, or sizes as for `bench kernel`.
        scheme: "w4a16", "w4a8", "mxfp4" or "bf16".
        out: file of the table; None means the package's own table for this GPU. Its other layers are kept.
        layers: layers with different weights in one measurement.
        console: shows the progress.
        grouped_only: see `Tuner`.

    Returns:
        Path of the table.

    Raises:
        ValueError: no GPU, an unknown shape or scheme, or a file that is not a table.
    """
    if layers < 1:
        raise ValueError(f"layers={layers} must be at least 1")
    shape = parse_shape(shape_text)
    if not torch.cuda.is_available():
        raise ValueError(f"torch {torch.__version__} finds no GPU: run this on a machine with one")
    tuner = Tuner(shape, scheme, layers, grouped_only=grouped_only)
    path = out or table_path(tuner.gpu)
    before = path.read_text(encoding="utf-8") if path.is_file() else None
    command = f"executorch-moe tune --shape {shape_text} --scheme {scheme} --layers {layers}"
    made_by = {
        "gpu": torch.cuda.get_device_name(),
        "command": command + (" --grouped-only" if grouped_only else ""),
        **versions(("torch", "triton")),
    }
    # Refuses a damaged file before the tuning.
    with_entry(before, made_by, entry(tuner.layer, tuner.scheme, TunedLayer((), (), ())))
    trials = tuner.trials()
    with Progress(console=console, transient=True) as progress:
        jobs = tuner.jobs(trials)
        compiling = progress.add_task("compiling", total=len(jobs))
        compile_ahead(jobs, on_done=lambda: progress.advance(compiling))
        timing = progress.add_task("timing", total=len(trials))
        tuned = tuner.run(on_trial=lambda trial, us: progress.advance(timing))
    write_text(path, with_entry(before, made_by, entry(tuner.layer, tuner.scheme, tuned)))
    return path
