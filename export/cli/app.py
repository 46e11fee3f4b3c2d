"""The command `executorch-moe`. Heavy packages are imported by the commands, so that --help is quick."""

from __future__ import annotations

import functools
import os
import select
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from executorch_moe.backends.versions import check_versions

app = typer.Typer(
    name="executorch-moe",
    help="Export Mixture-of-Experts language models to ExecuTorch with fused experts, and run them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
bench_app = typer.Typer(help="Measure speed.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")

# Generated text goes to stdout alone, so that it can be piped; everything else goes to stderr.
console = Console(stderr=True)
debug = False

INTERRUPTED_SECONDS = 10
"""How long a process that was started here may take to end after Ctrl-C, before it is interrupted itself."""

Command = TypeVar("Command", bound=Callable[..., Any])
RuntimeOption = Annotated[
    str, typer.Option(help="executorch, delegate-host, or auto: the first of them that can run the artifact here.")
]

CudaGraphOption = Annotated[
    bool, typer.Option("--cuda-graph/--no-cuda-graph", help="Replay decode as a CUDA graph (delegate host).")
]
VerifyOption = Annotated[
    bool,
    typer.Option(
        "--verify/--no-verify",
        help="Compare all bytes of .pte and .ptd with the digests of the export before anything runs.",
    ),
]
PrefillChunkOption = Annotated[
    int | None, typer.Option(help="Most prompt tokens in one call; by default the whole prompt.")
]


@app.callback()
def settings(
    show_traceback: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options of all commands."""
    global debug
    debug = show_traceback


def is_users(error: Exception) -> bool:
    """True for an error that this package raised about its input, or that the system raised about a file."""
    from executorch_moe.backends.errors import raised_here

    if isinstance(error, OSError):
        return True
    if not isinstance(error, (ValueError, NotImplementedError, ModuleNotFoundError, RuntimeError)):
        return False
    return raised_here(error, __name__)


def lost_reader(error: Exception) -> bool:
    """True if whoever read stdout (`| head`) has enough: typer ends the program without a word then, status 1."""
    if not isinstance(error, BrokenPipeError) or not hasattr(select, "poll"):
        return False
    poll = select.poll()
    poll.register(1, 0)  # errors are reported unasked
    return any(event & select.POLLERR for _, event in poll.poll(0))


def one_line_errors(command: Command) -> Command:
    """A user's mistake becomes one line and exit status 2; an error of the program itself keeps its traceback."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            if command.__name__ != "doctor":  # which shows all of them
                check_versions()
            return command(*args, **kwargs)
        except typer.Exit:  # a RuntimeError too
            raise
        except Exception as error:
            if debug or not is_users(error) or lost_reader(error):
                raise
            # soft_wrap: one line stays one line, whatever the width of the terminal.
            console.print(f"[bold red]error:[/bold red] {escape(str(error))}", soft_wrap=True, highlight=False)
            raise typer.Exit(2) from None

    return wrapped  # type: ignore[return-value]


def quiet_unless(verbose: bool) -> None:
    """Keeps other packages' notes off the terminal."""
    if not verbose:
        from executorch_moe.export.quiet import quiet

        quiet()


def progress_on(terminal: Console) -> Any:
    """A progress bar that is gone at the end; none where nobody looks, and no empty line instead of it."""
    from rich.progress import Progress

    # sys.stderr is left alone: see `progress.spinner`.
    return Progress(
        console=terminal, transient=True, disable=not terminal.is_terminal, redirect_stdout=False, redirect_stderr=False
    )


@app.command()
@one_line_errors
def export(
    model: Annotated[
        str,
        typer.Argument(
            help="Folder of a Hugging Face model, 'tiny': the one that comes along, or random weights: "
            "synthetic:qwen3-30b-a3b."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The .pte to write; weights and tokenizer go beside it.")
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            help="cuda (the GPU of this machine), cpu, auto (cuda if there is a GPU, else cpu), or a GPU that need not "
            "be here: sm_80, sm_86, sm_89, sm_90, sm_100, sm_120, a100, l4, h100, h200, rtx4090 and the like; or "
            "several in one artifact: sm_80,sm_90."
        ),
    ] = "auto",
    scheme: Annotated[
        str, typer.Option(help="Experts: w4a16 (4-bit weights), w4a8 (and int8 activations) or bf16.")
    ] = "w4a16",
    group_size: Annotated[int, typer.Option(help="Weights that share one scale (4-bit schemes).")] = 32,
    algorithm: Annotated[
        str, typer.Option(help="Rounding to 4 bits: minmax, or hqq (smaller error, slower; adds zero points to w4a16).")
    ] = "minmax",
    dense: Annotated[
        str,
        typer.Option(
            help="Linear layers (for target cpu, embeddings too): none, int8 (on CUDA int8-per-output: one "
            "scale for each output; on the CPU int8-per-32-inputs: one for every 32 inputs) or int4."
        ),
    ] = "none",
    max_context: Annotated[
        int | None, typer.Option(help="Tokens in the KV cache; by default 2048, or the model's own limit if less.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="All but the experts: bf16, fp32, or auto: bf16 on cuda, fp32 on the CPU.")
    ] = "auto",
    output: Annotated[
        str,
        typer.Option(
            help="token: the next one, picked on the device; greedy: the same, without settings; logits: for runners "
            "that pick themselves."
        ),
    ] = "token",
    experts: Annotated[
        str,
        typer.Option(help="ours; to measure against: ours-tile (one CTA per tile), upstream (ExecuTorch's operators)."),
    ] = "ours",
    lm_head: Annotated[
        str | None, typer.Option(help="The last linear layer, on CUDA targets; by default as --dense.")
    ] = None,
    embedding: Annotated[str, typer.Option(help="none or int8, on CUDA targets.")] = "none",
    layers: Annotated[int | None, typer.Option(help="Layers of a synthetic model.")] = None,
    seed: Annotated[int, typer.Option(help="Of a synthetic model's weights.")] = 0,
    thin: Annotated[
        bool, typer.Option("--thin", help="Write no large weights; a synthetic model's are made where it is loaded.")
    ] = False,
    kernel_configs: Annotated[
        Path | None,
        typer.Option(help="JSON with measured configurations of ExecuTorch's own kernels, for a GPU by name."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write what was fused, what was chosen and bytes by part to this file as JSON.")
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Write nothing: check files, trace, fuse, compare with the unmodified model on the CPU, and predict "
            "operators that the target lacks (auto is cuda here; no GPU is needed). Exit status 2 if something fails.",
        ),
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", help="Show each fused layer, kernels, sizes, and other packages' warnings."),
    ] = False,
    own_process: Annotated[
        int | None, typer.Option("--own-process", hidden=True, help="Id of the process that started this one.")
    ] = None,
) -> None:
    """Export a model: quantize and fuse its experts, lower it, write .pte + .ptd + tokenizer.

    Weights are read and packed layer by layer, so memory need not hold the model. Packed layers are kept in NAME.work
    beside the output until it is written: the same command goes on from there after an interruption.
    """
    if own_process is not None:
        from executorch_moe.export.own_process import end_with_parent

        end_with_parent(own_process)
    quiet_unless(verbose)
    from executorch_moe.backends.artifact.inspect import inspect_artifact
    from executorch_moe.backends.atomic_files import write_text
    from executorch_moe.export.options import ExportOptions
    from executorch_moe.export.pipeline import export_model
    from executorch_moe.export.report.inspection import kernels_table, report_json, sizes_table
    from executorch_moe.export.report.metadata import check_report

    if out is None and not check:
        raise ValueError("--out is missing: give the .pte to write, as in -o model.pte, or --check to write nothing")
    out = Path("unused.pte") if out is None else out
    if check and report is not None:
        raise ValueError(f"report={str(report)!r} is of an export, and --check makes none: leave one of the two out")
    options = ExportOptions(
        model, out, target, scheme, group_size, max_context, dtype, output, experts, dense, lm_head, embedding, layers,
        seed, thin, algorithm, check, None if kernel_configs is None else str(kernel_configs),
    )  # fmt: skip
    if report is not None:
        check_report(report, options)
    if check:
        from executorch_moe.export.check import preflight

        result = preflight(options, console)
        console.print(result.table())
        if verbose:
            console.print("\n".join(str(missing) for missing in result.missing), soft_wrap=True, highlight=False)
        raise typer.Exit(0 if result.passed else 2)
    if options.crosses and own_process is None:
        # Compiling for a GPU that is not here replaces functions of torch and Triton for a whole process.
        raise typer.Exit(export_in_own_process(options, report, verbose))
    summary = export_model(options, console)
    if verbose:
        console.print(summary.layers_table())
        for compiled in summary.compiled:
            console.print(kernels_table(compiled))
        console.print(sizes_table(inspect_artifact(out)))
    console.print(summary.table())
    if report is not None:
        write_text(report, report_json(summary.report.json(), summary.compiled, out) + "\n")


def export_in_own_process(options: Any, report: Path | None, verbose: bool) -> int:
    """The same export by another Python; returns its exit status.

    Raises:
        RuntimeError: a signal ended it.
    """
    from executorch_moe.export.own_process import why_killed

    command = [sys.executable, "-m", "executorch_moe.export.cli.app", *(["--debug"] if debug else [])]
    command += ["export", options.model, "--own-process", str(os.getpid())]
    for name, value in asdict(options).items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            command += [option] if value else []
        elif name != "model" and value is not None:
            command += [option, str(value)]
    command += ["--report", str(report)] if report is not None else []
    command += ["--verbose"] if verbose else []
    status = run_to_the_end(command)
    if status < 0:
        raise RuntimeError(why_killed(-status, options.out))
    return status


def run_to_the_end(command: list[str]) -> int:
    """Exit status of another process; after Ctrl-C it is given the time to remove what it had begun.

    `subprocess.run` kills it a quarter of a second after Ctrl-C, and its temporary files stay. SIGTERM is passed on as
    Ctrl-C, else the other process would go on alone.
    """
    import signal
    import subprocess

    process = subprocess.Popen(command)
    before = signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGINT))
    try:
        return process.wait()
    except KeyboardInterrupt:
        try:
            process.wait(INTERRUPTED_SECONDS)  # a terminal interrupts both processes
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


@app.command()
@one_line_errors
def generate(
    artifact: Annotated[Path, typer.Argument(help="The .pte of an export; .ptd and tokenizer lie beside it.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue.")],
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Tokens to generate; by default 128, or what fits into the cache.")
    ] = None,
    runtime: RuntimeOption = "auto",
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that together reach this.")] = 1.0,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Seed of the random choice, for temperatures above 0; by default a fresh one, which is shown."
        ),
    ] = None,
    cuda_graph: CudaGraphOption = False,
    prefill_chunk: PrefillChunkOption = None,
    verify: VerifyOption = True,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show other packages' warnings.")] = False,
) -> None:
    """Generate text with an exported model; shows the runtime and its speed."""
    quiet_unless(verbose)
    from executorch_moe.export.generate.generator import TextGenerator, TextStream, check_text
    from executorch_moe.export.models.sampling import Sampler, fresh_seed
    from executorch_moe.export.progress import spinner
    from executorch_moe.export.quiet import hold_native_notes

    check_text(prompt)
    sampler = Sampler(temperature, fresh_seed() if seed is None else seed, top_p)
    with hold_native_notes() as terminal:
        with spinner(terminal, "loading"):
            generator = TextGenerator.load(
                artifact, runtime, cuda_graph=cuda_graph, prefill_chunk=prefill_chunk, verify=verify
            )
            ids = generator.encode(prompt)
            generator.check_length(len(ids), max_new_tokens)
        with spinner(terminal, "warming up"):
            generator.warm_up(len(ids))
    console.print(f"runtime: {generator.program.runtime}", highlight=False)
    show_note(generator.program.note)
    if temperature > 0 and seed is None:
        console.print(f"seed: {sampler.seed} (--seed {sampler.seed} gives this text again)", highlight=False)

    def show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    text = TextStream(generator.tokenizer, ids)
    show(prompt)
    result = generator.generate(ids, max_new_tokens, sampler, on_token=lambda token: show(text.push(token)))
    show(text.end() + "\n")
    steps = len(result.tokens) - 1
    decode = f"decode {result.decode_rate:,.1f} tok/s ({steps} tokens in {result.decode_seconds:.3f} s), "
    console.print(
        f"prefill {result.prefill_rate:,.1f} tok/s ({result.prompt_tokens} tokens in {result.prefill_seconds:.3f} s), "
        f"{decode if steps > 0 else ''}stopped by {result.stopped_by}\n"
        "[dim]batch 1, after a warm-up run; prefill: up to the first new token; decode: each further one[/dim]",
        highlight=False,
    )


@bench_app.command("model")
@one_line_errors
def bench_model(
    artifact: Annotated[Path, typer.Argument(help="The .pte of an export.")],
    prompt_tokens: Annotated[
        str, typer.Option("--prompt-tokens", "-p", help="Prompt lengths, separated by commas.")
    ] = "32,128",
    new_tokens: Annotated[int, typer.Option("--new-tokens", "-n", help="Tokens generated after each prompt.")] = 64,
    repeats: Annotated[int, typer.Option("--repeats", "-r", help="Runs of each length.")] = 5,
    runtime: RuntimeOption = "auto",
    cuda_graph: CudaGraphOption = False,
    prefill_chunk: PrefillChunkOption = None,
    verify: VerifyOption = True,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also show where a decode token's time goes (needs a GPU).")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="With --profile: also write this picture (.png, .svg).")] = None,
    output_format: Annotated[str, typer.Option("--output", "-o", "--format", help="md or json.")] = "md",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show other packages' warnings.")] = False,
) -> None:
    """Prefill and decode speed of an exported model, mean and spread over repeats, in the manner of llama-bench."""
    quiet_unless(verbose)
    from executorch_moe.export.bench.breakdown import check_profile
    from executorch_moe.export.bench.model import FORMATS, benchmark_model
    from executorch_moe.export.generate.generator import TextGenerator, pte_path
    from executorch_moe.export.quiet import hold_native_notes

    artifact = pte_path(artifact)
    if output_format not in FORMATS:
        raise ValueError(f"format={output_format!r} is unknown: use one of {', '.join(FORMATS)}")
    if plot is not None and not profile:
        raise ValueError(f"plot={str(plot)!r} is of a profile: add --profile")
    check_plot(plot)
    lengths = parse_lengths(prompt_tokens)
    with (
        hold_native_notes() as terminal,
        progress_on(terminal) as progress,
    ):
        task = progress.add_task("measuring", total=len(lengths) * repeats)
        generator = TextGenerator.load(
            artifact, runtime, cuda_graph=cuda_graph, prefill_chunk=prefill_chunk, verify=verify
        )
        if profile:
            check_profile(generator.program.device)
        result = benchmark_model(
            artifact, lengths, new_tokens, repeats, on_repeat=lambda _: progress.advance(task), generator=generator,
            cuda_graph=cuda_graph,
        )  # fmt: skip
        if profile:
            result.profile_decode(generator, lengths[-1], min(new_tokens, 64))
    show_note(generator.program.note)
    typer.echo(result.markdown() if output_format == "md" else result.json())
    if plot is not None and result.breakdown is not None:
        result.breakdown.plot(plot, result.model_name())


@bench_app.command("kernel")
@one_line_errors
def bench_kernel(
    shape: Annotated[
        str, typer.Option(help="A preset (qwen35, qwen3, mixtral, gpt-oss, olmoe, deepseek-v3) or ExTOP_KxHxIxGROUP.")
    ] = "qwen35",
    tokens: Annotated[str, typer.Option(help="Token counts, separated by commas.")] = "1,8,64,512,1642,4096",
    impl: Annotated[
        str,
        typer.Option(
            help="ours, ours-heuristic, ours-grouped, ours-tile, ours-g8, ours-tile-g8 (GROUP_SIZE_M 1, 8, 16, 32), "
            "upstream-dec, upstream-a16, upstream-a8, torch-grouped-mm; with commas."
        ),
    ] = "ours,ours-tile",
    scheme: Annotated[str, typer.Option(help="w4a16, w4a8, bf16; with commas.")] = "w4a16",
    routing: Annotated[str, typer.Option(help="uniform, zipf (1.2), or hot: all to the same experts.")] = "uniform",
    layers: Annotated[int, typer.Option(help="Layers with different weights in one CUDA graph.")] = 3,
    replays: Annotated[int, typer.Option(help="Replays that the median is taken of.")] = 25,
    output_format: Annotated[str, typer.Option("--format", help="md or json.")] = "md",
    plot: Annotated[Path | None, typer.Option(help="Also write this picture (.png, .svg).")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show other packages' warnings.")] = False,
) -> None:
    """Time one expert layer: our kernels, ExecuTorch's, and torch's grouped GEMM, on the same tokens and routing."""
    quiet_unless(verbose)
    from executorch_moe.export.bench import kernel as kb

    if output_format not in kb.FORMATS:
        raise ValueError(f"format={output_format!r} is unknown: use one of {', '.join(kb.FORMATS)}")
    check_plot(plot)
    counts = tuple(parse_lengths(tokens, "tokens"))
    benchmark = kb.KernelBenchmark(
        shape, counts, tuple(impl.split(",")), tuple(scheme.split(",")), routing, layers, replays
    )
    rows = []
    with progress_on(console) as progress:
        task = progress.add_task("measuring", total=len(counts) * len(benchmark.pairs()))
        for row in benchmark.run():
            rows.append(row)
            progress.update(task, advance=1, description=f"{row.implementation} {row.scheme} {row.tokens} tokens")
    rows = kb.with_ratios(rows)
    typer.echo(kb.markdown(benchmark, rows) if output_format == "md" else kb.as_json(benchmark, rows))
    if plot is not None:
        kb.plot(benchmark, rows, plot)


@app.command()
@one_line_errors
def tune(
    shape: Annotated[
        str, typer.Option(help="A preset (qwen35, qwen3, mixtral, gpt-oss, olmoe, deepseek-v3) or ExTOP_KxHxIxGROUP.")
    ],
    scheme: Annotated[str, typer.Option(help="w4a16, w4a8 or bf16.")] = "w4a16",
    out: Annotated[
        Path | None, typer.Option(help="The table to put the entry into; by default this package's own for this GPU.")
    ] = None,
    layers: Annotated[int, typer.Option(help="Layers with different weights in one CUDA graph.")] = 3,
) -> None:
    """Find the fastest configurations of an expert layer on this GPU, and write them into a table."""
    quiet_unless(False)
    from executorch_moe.export.bench.tune import tune_layer

    path = tune_layer(shape, scheme, out, layers, console)
    console.print(f"wrote {path}; every export and run on such a GPU takes its configurations from there")


def show_note(note: str) -> None:
    """Shows what there is to tell about an artifact, in one line."""
    if note:
        console.print(f"[yellow]note:[/yellow] {escape(note)}", soft_wrap=True, highlight=False)


def check_plot(plot: Path | None) -> None:
    """Check the name of a picture before anything is measured.

    Raises:
        ValueError: another ending than .png or .svg, or a place that cannot be written.
    """
    from executorch_moe.backends.atomic_files import check_writable

    if plot is not None:
        check_writable("plot", plot, (".png", ".svg"))


def parse_lengths(text: str, what: str = "prompt_tokens") -> list[int]:
    """ "32,128" -> [32, 128].

    Raises:
        ValueError: something that is not a list of whole numbers.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        pass
    raise ValueError(f"{what}={text!r} must be whole numbers separated by commas: give for example 32,128")


@app.command("inspect")
@one_line_errors
def inspect_command(
    artifact: Annotated[Path, typer.Argument(help="The .pte of an export.")],
    target: Annotated[
        str | None, typer.Option(help="Also check that every method has code for these GPUs and no others.")
    ] = None,
    output_format: Annotated[str, typer.Option("--format", help="table or json.")] = "table",
    verify: Annotated[
        bool, typer.Option("--verify", help="Only compare all bytes of .pte and .ptd with the digests of the export.")
    ] = False,
) -> None:
    """Show what is inside an artifact; of one with CUDA delegates, check that ExecuTorch's runtime can load it."""
    quiet_unless(False)
    if verify:
        if target is not None or output_format != "table":
            raise ValueError("--verify only checks the files' bytes: leave --target and --format out")
        return verify_files(artifact)
    from executorch_moe.backends.artifact.inspect import check_cuda_artifact, inspect_artifact
    from executorch_moe.backends.artifact.weight_metadata import CUDA_BACKEND
    from executorch_moe.export.report.inspection import check_archs, inspection_json, methods_table, sizes_table

    if output_format not in ("table", "json"):
        raise ValueError(f"format={output_format!r} is unknown: use one of table, json")
    report = inspect_artifact(artifact)
    if output_format == "json":
        typer.echo(inspection_json(report))
    else:
        Console().print(methods_table(report), sizes_table(report))
    if any(d.backend == CUDA_BACKEND for method in report.methods.values() for d in method.delegates):
        check_cuda_artifact(report)
    if target is not None:
        check_archs(report, target)


def verify_files(artifact: Path) -> None:
    """Compares an artifact's files with the digests that its export left, and says what was compared."""
    from executorch_moe.backends.artifact.files import check, no_digests
    from executorch_moe.backends.artifact.pte import PteFile

    files = check(artifact, verify_bytes=True)
    if note := no_digests(PteFile(files.pte)):
        show_note(note)
        if files.ptd.exists():
            typer.echo(f"{files.ptd} fits {files.pte}")
        else:
            typer.echo(f"{files.pte} has no .ptd and no digests: nothing was compared")
    else:
        typer.echo(f"{files.pte} and {files.ptd} are whole: all bytes are those that were exported")


@app.command()
@one_line_errors
def doctor() -> None:
    """Check versions, GPU and runtimes, and say what to do about what is missing. Exit status 1 if something fails."""
    quiet_unless(False)
    from executorch_moe.export.doctor import FAIL, run_checks

    with console.status("looking"):
        checks = run_checks()
    table = Table(show_header=False, box=None, pad_edge=False)
    for _ in range(4):
        table.add_column(overflow="fold")
    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    for check in checks:
        mark = f"[{colours[check.status]}]{check.status}[/{colours[check.status]}]"
        table.add_row(mark, escape(check.name), escape(check.found), escape(check.remedy))
    Console().print(table)
    if any(check.status == FAIL for check in checks):
        raise typer.Exit(1)


def main() -> None:
    """Entry point of the console command."""
    app()
