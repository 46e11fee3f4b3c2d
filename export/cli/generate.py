"""`executorch-moe generate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .app import (
    CudaGraphOption,
    PrefillChunkOption,
    RuntimeOption,
    VerboseOption,
    VerifyOption,
    app,
    check_pte,
    command,
    console,
    quiet_unless,
    show_note,
)

TEXT = "Text"
SAMPLING = "Sampling"


@command(app, "generate")
def generate(
    artifact: Annotated[Path, typer.Argument(help="The .pte of an export, with .ptd and tokenizer beside it.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue.", rich_help_panel=TEXT)],
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens to generate; by default 128, or what fits into the cache if less.", rich_help_panel=TEXT
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="0 always takes the most likely token.", rich_help_panel=SAMPLING)
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            help="Sample from the most likely tokens whose probabilities add up to this.", rich_help_panel=SAMPLING
        ),
    ] = 1.0,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Seed for temperatures above 0; by default a new one, which is shown.", rich_help_panel=SAMPLING
        ),
    ] = None,
    runtime: RuntimeOption = "auto",
    cuda_graph: CudaGraphOption = False,
    prefill_chunk: PrefillChunkOption = None,
    verify: VerifyOption = True,
    verbose: VerboseOption = False,
) -> None:
    """Generate text with an exported model; shows the runtime and its speed."""
    quiet_unless(verbose)
    from executorch_moe.export.generate.generator import TextGenerator, TextStream, check_text
    from executorch_moe.export.models.sampling import Sampler, fresh_seed
    from executorch_moe.export.progress import spinner
    from executorch_moe.export.quiet import hold_native_notes

    check_pte(artifact)
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
    stopped_by = "--max-new-tokens" if result.stopped_by == "max_new_tokens" else result.stopped_by
    console.print(
        f"prefill {result.prefill_rate:,.1f} tok/s ({result.prompt_tokens} tokens in {result.prefill_seconds:.3f} s), "
        f"{decode if steps > 0 else ''}stopped by {stopped_by}\n"
        "[dim]batch 1, after a warm-up run; prefill: up to the first new token; decode: each further token[/dim]",
        highlight=False,
    )
