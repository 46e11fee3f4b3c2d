"""`executorch-moe bench model`, `bench kernel` and `bench chain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import (
    RESULT,
    CudaGraphOption,
    PlotOption,
    PrefillChunkOption,
    ResultOption,
    RuntimeOption,
    VerboseOption,
    VerifyOption,
    app,
    check_format,
    check_json,
    check_plot,
    check_pte,
    check_result,
    command,
    console,
    group,
    parse_lengths,
    quiet_unless,
    show_note,
    show_result,
    values,
    warn_deprecated,
)

bench = group("Measure speed.")
app.add_typer(bench, name="bench")

WHAT = "What is measured"
FORMATS = ("md", "json")
DEFAULT_PROMPTS = "32,128"
FormatOption = Annotated[
    str, typer.Option("--format", help="md or json.", autocompletion=values(*FORMATS), rich_help_panel=RESULT)
]


@command(bench, "model")
def bench_model(
    artifact: Annotated[Path, typer.Argument(help="The .pte of an export.")],
    prompt_tokens: Annotated[
        str, typer.Option("--prompt-tokens", help="Prompt lengths, separated by commas.", rich_help_panel=WHAT)
    ] = DEFAULT_PROMPTS,
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", "-n", help="Tokens generated after each prompt.", rich_help_panel=WHAT)
    ] = 64,
    repeats: Annotated[int, typer.Option("--repeats", "-r", help="Runs of each length.", rich_help_panel=WHAT)] = 5,
    batch: Annotated[
        str | None,
        typer.Option(
            help="Also decode so many sequences at once, separated by commas; for exports with --max-batch.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile",
            help="Also show where the time of each prompt and of a decode token goes (needs a GPU).",
            rich_help_panel=WHAT,
        ),
    ] = False,
    runtime: RuntimeOption = "auto",
    cuda_graph: CudaGraphOption = False,
    prefill_chunk: PrefillChunkOption = None,
    verify: VerifyOption = True,
    output_format: FormatOption = "md",
    out: ResultOption = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="With --profile: also write a plot to this file (.png, .svg).", rich_help_panel=RESULT),
    ] = None,
    verbose: VerboseOption = False,
    old_prompt_tokens: Annotated[str | None, typer.Option("-p", hidden=True)] = None,
    old_format: Annotated[str | None, typer.Option("--output", hidden=True)] = None,
) -> None:
    """Measure prefill and decode speed of an exported model: mean and spread over repeats, as in llama-bench."""
    quiet_unless(verbose)
    from executorch_moe.export.bench.breakdown import check_profile
    from executorch_moe.export.bench.model import benchmark_model
    from executorch_moe.export.generate.generator import TextGenerator, pte_path
    from executorch_moe.export.progress import progress_bar
    from executorch_moe.export.quiet import hold_native_notes

    if old_prompt_tokens is not None:
        warn_deprecated("-p", "--prompt-tokens")
        prompt_tokens = old_prompt_tokens
    if old_format is not None or str(out) in FORMATS:
        warn_deprecated("--output" if old_format is not None else f"-o {out}", "--format")
        output_format, out = (old_format, out) if old_format is not None else (str(out), None)
    check_pte(artifact)
    artifact = pte_path(artifact)
    check_format(output_format, FORMATS)
    if plot is not None and not profile:
        raise ValueError(f"plot={str(plot)!r} is the picture of a profile: add --profile")
    check_plot(plot)
    check_result(out)
    lengths = parse_lengths(prompt_tokens, "prompt_tokens")
    sequences = parse_lengths(batch, "batch") if batch is not None else []
    with hold_native_notes() as terminal, progress_bar(terminal) as progress:
        task = progress.add_task("measuring", total=len(lengths) * repeats)
        generator = TextGenerator.load(
            artifact, runtime, cuda_graph=cuda_graph, prefill_chunk=prefill_chunk, verify=verify
        )
        if profile:
            check_profile(generator.program.device)
        result = benchmark_model(
            artifact, lengths, new_tokens, repeats, on_repeat=lambda _: progress.advance(task), generator=generator,
            cuda_graph=cuda_graph, batch=sequences,
        )  # fmt: skip
        if profile:
            result.profile_prompts(generator, lengths)
            result.profile_decode(generator, lengths[-1], min(new_tokens, 64))
    show_note(generator.program.note)
    show_result(result.markdown() if output_format == "md" else result.json(), out)
    if plot is not None and result.breakdown is not None:
        result.breakdown.plot(plot, result.model_name())


@command(bench, "kernel")
def bench_kernel(
    shape: Annotated[
        str,
        typer.Option(
            help="A preset (qwen35, qwen3, mixtral, gpt-oss, olmoe, deepseek-v3) or ExTOP_KxHxIxGROUP.",
            rich_help_panel=WHAT,
        ),
    ] = "qwen35",
    tokens: Annotated[
        str, typer.Option(help="Token counts, separated by commas.", rich_help_panel=WHAT)
    ] = "1,8,64,512,1642,4096",
    impl: Annotated[
        str,
        typer.Option(
            help="ours, ours-heuristic, ours-grouped, ours-tile, ours-g8, ours-tile-g8 (GROUP_SIZE_M 1, 8, 16, 32), "
            "upstream-dec, upstream-a16, upstream-a8, torch-grouped-mm, humming; separated by commas.",
            rich_help_panel=WHAT,
        ),
    ] = "ours,ours-tile",
    scheme: Annotated[
        str, typer.Option(help="w4a16, w4a8, mxfp4, bf16; separated by commas.", rich_help_panel=WHAT)
    ] = "w4a16",
    routing: Annotated[
        str,
        typer.Option(
            help="uniform, zipf (1.2), or hot: all tokens to the same experts.",
            autocompletion=values("uniform", "zipf", "hot"),
            rich_help_panel=WHAT,
        ),
    ] = "uniform",
    layers: Annotated[
        int | None,
        typer.Option(
            help="Layers with different weights in one CUDA graph; by default enough that they do not stay in L2.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    replays: Annotated[int, typer.Option(help="Replays; the median is shown.", rich_help_panel=WHAT)] = 25,
    output_format: FormatOption = "md",
    out: ResultOption = None,
    plot: PlotOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Time one expert layer: our kernels, ExecuTorch's, torch's and Humming's, on the same tokens and routing."""
    quiet_unless(verbose)
    from executorch_moe.export.bench import kernel as kb
    from executorch_moe.export.progress import progress_bar

    check_format(output_format, kb.FORMATS)
    check_plot(plot)
    check_result(out)
    counts = tuple(parse_lengths(tokens, "tokens"))
    benchmark = kb.KernelBenchmark(
        shape, counts, tuple(impl.split(",")), tuple(scheme.split(",")), routing, layers, replays
    )
    rows = []
    with progress_bar(console) as progress:
        task = progress.add_task("measuring", total=len(counts) * len(benchmark.pairs()))
        for row in benchmark.run():
            rows.append(row)
            progress.update(task, advance=1, description=f"{row.implementation} {row.scheme} {row.tokens} tokens")
    rows = kb.with_ratios(rows)
    show_result(kb.markdown(benchmark, rows) if output_format == "md" else kb.as_json(benchmark, rows), out)
    if plot is not None:
        kb.plot(benchmark, rows, plot)


@command(bench, "chain")
def bench_chain(
    shape: Annotated[
        str,
        typer.Option(help="qwen3, or a synthetic model with changes: qwen3,experts=64,top_k=4.", rich_help_panel=WHAT),
    ] = "qwen3",
    context: Annotated[
        str, typer.Option(help="Positions in the cache, separated by commas.", rich_help_panel=WHAT)
    ] = "1642",
    dense: Annotated[
        str,
        typer.Option(help="Linear layers: int8 or bf16.", autocompletion=values("int8", "bf16"), rich_help_panel=WHAT),
    ] = "int8",
    scheme: Annotated[str, typer.Option(help="Experts: w4a16, w4a8, mxfp4 or bf16.", rich_help_panel=WHAT)] = "w4a16",
    group_size: Annotated[
        int, typer.Option(help="Weights of an expert that share a scale.", rich_help_panel=WHAT)
    ] = 128,
    layers: Annotated[
        int, typer.Option(help="Layers with different weights in one CUDA graph.", rich_help_panel=WHAT)
    ] = 8,
    repeats: Annotated[
        int, typer.Option("--repeats", "-r", help="Replays; the median is shown.", rich_help_panel=WHAT)
    ] = 50,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Also write all times, launch by launch, to this file.", rich_help_panel=RESULT),
    ] = None,
    out: ResultOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Time each launch of a decode step in a chain of decoder layers, as one CUDA graph (needs a GPU)."""
    quiet_unless(verbose)
    from executorch_moe.export.bench import chain as cb
    from executorch_moe.export.progress import progress_bar

    check_result(out)
    if json_file is not None:
        check_json(json_file)
    contexts = parse_lengths(context, "context")
    cb.check_arguments(shape, layers, dense, scheme, group_size, repeats)
    results = []
    with progress_bar(console) as progress:
        task = progress.add_task("measuring", total=len(contexts))
        for positions in contexts:
            results.append(cb.chain(shape, layers, positions, dense, scheme, group_size, repeats))
            progress.advance(task)
    if json_file is not None:
        show_result(cb.as_json(results), json_file)
    show_result("\n\n".join(result.markdown() for result in results), out)
