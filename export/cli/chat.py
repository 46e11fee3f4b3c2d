"""`executorch-moe chat`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

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
from .generate import TEXT

COMMANDS = "/reset starts again, /exit ends, Ctrl-C stops an answer"


@command(app, "chat")
def chat(
    artifact: ArtifactArgument,
    system: Annotated[str | None, typer.Option(help="System message.", rich_help_panel=TEXT)] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Tokens of an answer at most; by default, to the end.", rich_help_panel=TEXT)
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends an answer; may be repeated.", rich_help_panel=TEXT)
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="File with a Jinja template, in place of the model's.", rich_help_panel=TEXT)
    ] = None,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    top_k: TopKOption = 0,
    seed: Annotated[
        int | None,
        typer.Option(help="Seed for temperatures above 0; by default a new one.", rich_help_panel=SAMPLING),
    ] = None,
    runtime: RuntimeOption = "auto",
    cuda_graph: CudaGraphOption = False,
    prefill_chunk: PrefillChunkOption = None,
    verify: VerifyOption = True,
    verbose: VerboseOption = False,
) -> None:
    """Talk with an exported model: one message a line, from the terminal or standard input.

    Each answer continues the KV cache of the conversation. /reset starts again, /exit ends, Ctrl-C stops an answer.
    """
    quiet_unless(verbose)
    from executorch_moe.export.generate.chat import artifact_template, chat_tokenizer, render
    from executorch_moe.export.generate.generator import TextGenerator, check_text
    from executorch_moe.export.models.sampling import Sampler, fresh_seed
    from executorch_moe.export.progress import spinner
    from executorch_moe.export.quiet import hold_native_notes
    from executorch_moe.export.serve.sessions import State
    from executorch_moe.export.serve.turn import Turn, run_turn

    check_pte(artifact)
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    sampler = Sampler(temperature, fresh_seed() if seed is None else seed, top_p, top_k)
    with hold_native_notes() as terminal, spinner(terminal, "loading"):
        generator = TextGenerator.load(
            artifact, runtime, cuda_graph=cuda_graph, prefill_chunk=prefill_chunk, verify=verify
        )
        generator.check_sampler(sampler)
        generator.warm_up(1)
    program = generator.program
    template = artifact_template(program.constant_names, program.constant, chat_template)
    if not template:
        show_note("this model has no chat template: messages are joined as they are")
    tokenizer = chat_tokenizer(generator.tokenizer, program.constant, template)
    console.print(f"runtime: {program.runtime}; {COMMANDS}", highlight=False)
    first = [] if system is None else [{"role": "system", "content": system}]
    messages, state = list(first), State(generator)
    for line in _lines():
        if line == "/exit":
            break
        if line == "/reset":
            messages = list(first)
            continue
        check_text(line)
        asked = [*messages, {"role": "user", "content": line}]
        ids = generator.tokenizer.encode(render(tokenizer, asked), add_special_tokens=False).ids
        room = generator.max_context - len(ids) + 1
        if room < 1:
            show_note(f"the conversation has {len(ids)} tokens, the model's context {generator.max_context}: /reset")
            continue
        pieces: list[str] = []

        def show(piece: str, pieces: list[str] = pieces) -> None:
            pieces.append(piece)
            sys.stdout.write(piece)
            sys.stdout.flush()

        turn = Turn(ids, min(room, max_new_tokens or room), sampler, tuple(stop or ()), show_special=False)
        with _interruptible() as interrupted:
            done = run_turn(state, generator, turn, show, interrupted)
        sys.stdout.write("\n")
        sys.stdout.flush()
        messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]
        console.print(
            f"[dim]{done['completion_tokens']} tokens, {done['decode_tok_s']:,.1f} tok/s; prompt: "
            f"{done['prefilled_prompt_tokens']} of {done['prompt_tokens']} tokens computed[/dim]",
            highlight=False,
        )


def _lines() -> Iterator[str]:
    """Messages that are not empty, until the end of standard input or Ctrl-C."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            return
        if line.strip():
            yield line


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Context in which Ctrl-C is noted instead of raised; yields a function that says whether it was pressed."""
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
