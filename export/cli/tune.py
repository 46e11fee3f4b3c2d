"""`executorch-moe tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import app, command, console, quiet_unless, values


@command(app, "tune")
def tune(
    shape: Annotated[
        str, typer.Option(help="A preset (qwen35, qwen3, mixtral, gpt-oss, olmoe, deepseek-v3) or ExTOP_KxHxIxGROUP.")
    ],
    scheme: Annotated[
        str, typer.Option(help="w4a16, w4a8, mxfp4 or bf16.", autocompletion=values("w4a16", "w4a8", "mxfp4", "bf16"))
    ] = "w4a16",
    layers: Annotated[int, typer.Option(help="Layers with different weights in one CUDA graph.")] = 3,
    grouped_only: Annotated[
        bool, typer.Option("--grouped-only", help="Keep the heuristic's configurations for few tokens: much faster.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The table to add the entry to; by default this package's own for this GPU."),
    ] = None,
) -> None:
    """Find the fastest configurations of an expert layer on this GPU, and write them to a table."""
    quiet_unless(False)
    from executorch_moe.export.bench.tune import tune_layer

    path = tune_layer(shape, scheme, out, layers, console, grouped_only=grouped_only)
    console.print(f"wrote {path}; exports and runs on this kind of GPU read it", soft_wrap=True)
