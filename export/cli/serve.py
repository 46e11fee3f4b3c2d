"""`executorch-moe serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import (
    RUN,
    ArtifactArgument,
    CudaGraphOption,
    PrefillChunkOption,
    RuntimeOption,
    VerboseOption,
    VerifyOption,
    app,
    check_pte,
    command,
    quiet_unless,
    show_note,
)

HTTP = "HTTP"
LOCAL = ("127.0.0.1", "localhost", "::1")


@command(app, "serve")
def serve(
    artifact: ArtifactArgument,
    host: Annotated[
        str, typer.Option(help="Address to listen on; by default this machine only.", rich_help_panel=HTTP)
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.", rich_help_panel=HTTP)] = 8000,
    model_id: Annotated[
        str | None, typer.Option(help="The model's name in requests; by default the artifact's.", rich_help_panel=HTTP)
    ] = None,
    max_body: Annotated[int, typer.Option(help="Largest body of a request in bytes.", rich_help_panel=HTTP)] = (
        4 * 2**20
    ),
    max_waiting: Annotated[
        int, typer.Option(help="Most chat requests that run or wait; others get status 503.", rich_help_panel=HTTP)
    ] = 256,
    sessions: Annotated[
        int,
        typer.Option(help="Most named sessions; a further one replaces the least recently used.", rich_help_panel=RUN),
    ] = 16,
    states: Annotated[
        int,
        typer.Option(
            help="Sessions that keep their KV cache at a time; each loads the program again.", rich_help_panel=RUN
        ),
    ] = 1,
    chat_template: Annotated[
        Path | None, typer.Option(help="File with a Jinja template, in place of the model's.", rich_help_panel=RUN)
    ] = None,
    runtime: RuntimeOption = "auto",
    cuda_graph: CudaGraphOption = False,
    prefill_chunk: PrefillChunkOption = None,
    verify: VerifyOption = True,
    verbose: VerboseOption = False,
) -> None:
    """Serve an exported model to clients of OpenAI's API, with ExecuTorch's own server.

    If the environment variable EXECUTORCH_MOE_API_KEY is set, requests need it as their API key.
    """
    quiet_unless(verbose)
    from executorch_moe.export.generate.generator import pte_path
    from executorch_moe.export.serve.app import API_KEY, ServeOptions, api_key, check_installed, run
    from executorch_moe.export.serve.guard import Limits

    check_pte(artifact)
    check_installed()
    pte = pte_path(artifact)
    options = ServeOptions(
        pte,
        model_id or pte.stem,
        sessions,
        states,
        runtime,
        cuda_graph,
        prefill_chunk,
        verify,
        chat_template,
        Limits(api_key(), max_body, max_waiting),
    )
    if host not in LOCAL and not api_key():
        show_note(f"the server listens on {host} without an API key: set {API_KEY} to require one")
    run(options, host, port)
