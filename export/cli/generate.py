"""`executorch-moe generate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .app import (
    SAMPLING,
    ArtifactArgument,
    CudaGraphOption,
    PrefillChunkOption,
    RuntimeOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    VerboseOption,
    VerifyOption,
    app,
    check_pte,
    command,
    console,
    quiet_unless,
    show_note,
)

if TYPE_CHECKING:
    from executorch_moe.export.generate.generator import TextGenerator

TEXT = "Text"


@command(app, "generate")
def generate(
    artifact: ArtifactArgument,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Text to continue.", rich_help_panel=TEXT)
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="File with the prompt, - for standard input.", rich_help_panel=TEXT)
    ] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="The prompt is a message: apply the model's chat template.", rich_help_panel=TEXT),
    ] = False,
    system: Annotated[str | None, typer.Option(help="System message, with --chat.", rich_help_panel=TEXT)] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends the answer; may be repeated.", rich_help_panel=TEXT)
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens to generate; by default 128, or what fits into the cache if less.", rich_help_panel=TEXT
        ),
    ] = None,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    top_k: TopKOption = 0,
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
    from executorch_moe.export.generate.stop_text import StopText
    from executorch_moe.export.models.sampling import Sampler, fresh_seed
    from executorch_moe.export.progress import spinner
    from executorch_moe.export.quiet import hold_native_notes

    check_pte(artifact)
    text = read_prompt(prompt, prompt_file)
    check_text(text)
    if system is not None and not chat:
        raise ValueError(f"system={system!r} is for --chat: add --chat, or leave it out")
    sampler = Sampler(temperature, fresh_seed() if seed is None else seed, top_p, top_k)
    with hold_native_notes() as terminal:
        with spinner(terminal, "loading"):
            generator = TextGenerator.load(
                artifact, runtime, cuda_graph=cuda_graph, prefill_chunk=prefill_chunk, verify=verify
            )
            generator.check_sampler(sampler)
            ids = chat_ids(generator, text, system) if chat else generator.encode(text)
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

    answer = StopText(TextStream(generator.tokenizer, ids), stop or ())

    def add(token: int) -> bool:
        show(answer.push(token))
        return answer.stopped

    if not chat:
        show(text)
    result = generator.generate(ids, max_new_tokens, sampler, on_token=add)
    show(answer.end() + "\n")
    steps = len(result.tokens) - 1
    decode = f"decode {result.decode_rate:,.1f} tok/s ({steps} tokens in {result.decode_seconds:.3f} s), "
    stopped_by = "--max-new-tokens" if result.stopped_by == "max_new_tokens" else result.stopped_by
    console.print(
        f"prefill {result.prefill_rate:,.1f} tok/s ({result.prompt_tokens} tokens in {result.prefill_seconds:.3f} s), "
        f"{decode if steps > 0 else ''}stopped by {stopped_by}\n"
        "[dim]batch 1, after a warm-up run; prefill: up to the first new token; decode: each further token[/dim]",
        highlight=False,
    )


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt of --prompt or --prompt-file.

    Raises:
        ValueError: both or none of them, or a file that is not UTF-8.
        OSError: a file that cannot be read.
    """
    if (prompt is None) == (file is None):
        raise ValueError("the prompt is missing or given twice: use either --prompt or --prompt-file")
    if prompt is not None:
        return prompt
    content = sys.stdin.buffer.read() if str(file) == "-" else Path(str(file)).read_bytes()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt_file={str(file)!r} is not UTF-8 text ({error}): convert it") from None


def chat_ids(generator: TextGenerator, message: str, system: str | None) -> list[int]:
    """Token ids of a message in the model's chat template.

    Raises:
        ValueError: the model has no chat template.
    """
    from executorch_moe.export.generate.chat import artifact_template, chat_tokenizer, render

    program = generator.program
    template = artifact_template(program.constant_names, program.constant)
    if not template:
        raise ValueError("chat=True needs a chat template, and this model has none: leave --chat out")
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": message})
    ids: list[int] = generator.tokenizer.encode(
        render(chat_tokenizer(generator.tokenizer, program.constant, template), messages), add_special_tokens=False
    ).ids
    return ids
