"""`executorch-moe export`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from executorch_moe.backends.versions import HUGGING_FACE, check_versions

from .app import DEBUGGING, RESULT, app, command, console, is_debug, quiet_unless, values, warn_deprecated

if TYPE_CHECKING:
    from executorch_moe.export.options import ExportOptions

WHAT = "What is exported"
EXPERTS = "Experts"
OTHERS = "Other layers"
TARGET = "Target"
SYNTHETIC = "Synthetic models"
KINDS = ("none", "int8", "int4")


@command(app, "export")
def export(
    model: Annotated[
        str,
        typer.Argument(
            help="Folder of a Hugging Face model, or its id (Qwen/Qwen3-30B-A3B, or ID@REVISION); a GGUF file; 'demo', "
            "a small model in this package; or random weights, as in synthetic:qwen3-30b-a3b."
        ),
    ],
    download: Annotated[
        bool,
        typer.Option(
            "--download",
            help="Download a model that is given by its id, or what is missing of it, into huggingface_hub's cache.",
            rich_help_panel=WHAT,
        ),
    ] = False,
    max_context: Annotated[
        int | None,
        typer.Option(
            help="Positions in the KV cache; by default 2048, or the model's own limit if less.", rich_help_panel=WHAT
        ),
    ] = None,
    max_batch: Annotated[
        int,
        typer.Option(
            help="Sequences that can be decoded in one step, up to 64; each has a KV cache of its own.",
            rich_help_panel=WHAT,
        ),
    ] = 1,
    output: Annotated[
        str,
        typer.Option(
            help="What the methods return: token (the next one, sampled on the device), greedy (the most likely one), "
            "logits, for runners that sample themselves, or engine, for that of ExecuTorch's example qwen3_5_moe.",
            autocompletion=values("token", "greedy", "logits", "engine"),
            rich_help_panel=WHAT,
        ),
    ] = "token",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="The .pte to write; weights and tokenizer go beside it.", rich_help_panel=RESULT
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            help="Write fused layers, chosen kernels and bytes by part to this file as JSON.", rich_help_panel=RESULT
        ),
    ] = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            help="w4a16 (4-bit integers), w4a8 (4-bit integers, int8 activations), mxfp4 (4-bit floats, 32 a scale) or "
            "bf16.",
            show_default="mxfp4 if experts are stored in MXFP4, else w4a16",
            autocompletion=values("w4a16", "w4a8", "mxfp4", "bf16"),
            rich_help_panel=EXPERTS,
        ),
    ] = None,
    group_size: Annotated[
        int, typer.Option(help="Weights that share one scale (4-bit schemes).", rich_help_panel=EXPERTS)
    ] = 32,
    algorithm: Annotated[
        str,
        typer.Option(
            help="Rounding to 4 bits: minmax, or hqq (smaller error, slower; adds zero points to w4a16).",
            autocompletion=values("minmax", "hqq"),
            rich_help_panel=EXPERTS,
        ),
    ] = "minmax",
    experts: Annotated[
        str,
        typer.Option(
            help="Kernels: ours; for comparisons: ours-tile (one CTA per tile), upstream (ExecuTorch's operators).",
            autocompletion=values("ours", "ours-tile", "upstream"),
            rich_help_panel=EXPERTS,
        ),
    ] = "ours",
    dense: Annotated[
        str,
        typer.Option(
            help="Linear layers (for target cpu, embeddings too): none, int8 or int4. int8 has one scale per output "
            "on CUDA (int8-per-output) and one per 32 inputs on the CPU (int8-per-32-inputs).",
            autocompletion=values(*KINDS),
            rich_help_panel=OTHERS,
        ),
    ] = "none",
    lm_head: Annotated[
        str | None,
        typer.Option(
            help="The last linear layer, on CUDA targets; by default as --dense.",
            autocompletion=values(*KINDS),
            rich_help_panel=OTHERS,
        ),
    ] = None,
    embedding: Annotated[
        str,
        typer.Option(
            help="The embedding, on CUDA targets: none or int8.",
            autocompletion=values(*KINDS[:2]),
            rich_help_panel=OTHERS,
        ),
    ] = "none",
    dtype: Annotated[
        str,
        typer.Option(
            help="Dtype of everything except the experts: bf16, fp32, or auto (bf16 on GPUs, fp32 on the CPU).",
            autocompletion=values("auto", "bf16", "fp32"),
            rich_help_panel=OTHERS,
        ),
    ] = "auto",
    target: Annotated[
        str,
        typer.Option(
            help="cuda (the GPU of this machine), cpu, auto (cuda if there is a GPU, else cpu), or a GPU that this "
            "machine need not have: sm_80, sm_86, sm_89, sm_90, sm_100, sm_120, a100, l4, h100, h200, rtx4090 and "
            "others; or several in one artifact: sm_80,sm_90.",
            autocompletion=values("auto", "cpu", "cuda", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"),
            rich_help_panel=TARGET,
        ),
    ] = "auto",
    kernel_configs: Annotated[
        Path | None,
        typer.Option(
            help="JSON with measured configurations of ExecuTorch's own kernels, for an export for a named GPU.",
            rich_help_panel=TARGET,
        ),
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Number of layers.", rich_help_panel=SYNTHETIC)] = None,
    seed: Annotated[int, typer.Option(help="Seed of the weights.", rich_help_panel=SYNTHETIC)] = 0,
    placeholder_weights: Annotated[
        bool,
        typer.Option(
            "--placeholder-weights",
            help="Write no large weights: the GPU that loads the artifact generates them.",
            rich_help_panel=SYNTHETIC,
        ),
    ] = False,
    thin: Annotated[bool, typer.Option("--thin", hidden=True)] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Write nothing: check files, trace, fuse, compare with the unmodified model on the CPU, and predict "
            "operators that the target lacks. auto is cuda here; no GPU is needed. Exit status 2 if a check fails.",
            rich_help_panel=DEBUGGING,
        ),
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose",
            "-v",
            help="Show each fused layer, kernels, sizes, and warnings of other packages.",
            rich_help_panel=DEBUGGING,
        ),
    ] = False,
) -> None:
    """Export a model: quantize and fuse its experts, lower it, write .pte + .ptd + tokenizer.

    Weights are read and packed layer by layer, so the model need not fit into memory. Packed layers are kept in
    NAME.work beside the output until it is written: after an interruption, the same command continues from there.
    """
    check_versions(*HUGGING_FACE)  # before they are imported
    quiet_unless(verbose)
    from executorch_moe.export.build import usual_scheme
    from executorch_moe.export.options import Context, Dense, Experts, ExportOptions, Target
    from executorch_moe.export.report.metadata import check_report

    if out is None and not check:
        raise ValueError("--out is missing: give the .pte to write, as in -o model.pte, or --check to write nothing")
    if check and report is not None:
        raise ValueError(f"report={str(report)!r} belongs to an export, and --check makes none: leave one of them out")
    if thin:
        warn_deprecated("--thin", "--placeholder-weights")
    if scheme is None:  # what mxfp4 does not have asks for w4a16
        plain = (group_size, algorithm, experts) == (32, "minmax", "ours")
        scheme = usual_scheme(model) if plain else "w4a16"
    options = ExportOptions(
        model,
        None if check else out,
        experts=Experts(scheme, group_size, algorithm, experts),
        dense=Dense(dense, lm_head, embedding),
        target=Target(target, dtype, kernel_configs),
        context=Context(max_context, output, max_batch),
        layers=layers,
        seed=seed,
        placeholder_weights=placeholder_weights or thin,
    )
    if download:
        fetch(model)
    if check:
        raise typer.Exit(run_check(options, verbose))
    if report is not None:
        check_report(report, options)
    if options.target.is_named_gpu:
        from executorch_moe.export.own_process import Request, export_in_own_process

        request = Request(options, report, verbose, os.getpid())
        raise typer.Exit(export_in_own_process(request, debug=is_debug()))
    run_export(options, report, verbose)


@command(app, "export-child", hidden=True)
def export_child(request: Annotated[str, typer.Argument(help="`own_process.Request` as JSON.")]) -> None:
    """An export in the process that `export` started for a GPU by name."""
    import json

    quiet_unless(json.loads(request)["verbose"])
    from executorch_moe.export import own_process

    asked = own_process.Request.from_json(request)
    own_process.end_with_parent(asked.parent)
    run_export(asked.options, asked.report, asked.verbose)


def fetch(model: str) -> None:
    """Downloads a model that is given by its id.

    Raises:
        ValueError: the name is no id. RuntimeError: see `hub.download`.
    """
    from executorch_moe.export.hub import download, hub_model

    on_hub = hub_model(model)
    if on_hub is None:
        raise ValueError(
            f"--download is for a model by its id on the Hub, as in Qwen/Qwen3-30B-A3B, and model={model!r} is none: "
            "leave the option out"
        )
    console.print(f"downloading {on_hub.repository} ...")
    console.print(f"done downloading {on_hub.repository}: {download(on_hub)}", soft_wrap=True, highlight=False)


def run_check(options: ExportOptions, verbose: bool) -> int:
    """Checks an export and shows the result; returns the exit status."""
    from executorch_moe.export.check import check_export

    result = check_export(options, console)
    console.print(result.table())
    if verbose:
        console.print("\n".join(str(missing) for missing in result.missing), soft_wrap=True, highlight=False)
    return 0 if result.passed else 2


def run_export(options: ExportOptions, report: Path | None, verbose: bool) -> None:
    """Exports in this process and shows the summary."""
    from executorch_moe.backends.artifact.inspect import inspect_artifact
    from executorch_moe.backends.atomic_files import write_text
    from executorch_moe.export.pipeline import export_model
    from executorch_moe.export.report.inspection import kernels_table, report_json, sizes_table

    summary = export_model(options, console)
    if verbose:
        console.print(summary.layers_table())
        for compiled in summary.compiled:
            console.print(kernels_table(compiled))
        console.print(sizes_table(inspect_artifact(options.pte)))
    console.print(summary.table())
    if report is not None:
        write_text(report, report_json(summary.report.json(), summary.compiled, options.pte) + "\n")
