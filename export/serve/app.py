"""Puts ExecuTorch's server, a worker process and the middleware together, and runs them."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from executorch_moe.backends.artifact.files import companion
from executorch_moe.backends.artifact.method_targets import pick_cpu_methods
from executorch_moe.backends.artifact.pte import PteFile
from executorch_moe.backends.artifact.weight_metadata import CUDA_BACKEND
from executorch_moe.backends.runtime.loader import MAX_BATCH
from executorch_moe.export.generate.chat import artifact_template, chat_tokenizer
from executorch_moe.export.generate.generator import pte_path
from executorch_moe.export.generate.tokenizer_file import check_tokenizer, read_tokenizer
from executorch_moe.export.report.metadata import TOKENIZER_SUFFIX

from .guard import App, Guard, Limits, error_body

API_KEY = "EXECUTORCH_MOE_API_KEY"
"""Environment variable with the API key."""
logger = logging.getLogger(__name__)

LACKS = {
    "token": ("top_k",),
    "greedy": ("temperature", "top_k"),
    "engine": ("top_p", "top_k", "seed"),
    "logits": (),
}
"""Output of an artifact's methods -> sampling settings of requests that they do not have."""
_NEEDED = ("fastapi", "uvicorn", "jinja2", "transformers")


@dataclass(frozen=True)
class ServeOptions:
    """What to serve.

    Attributes:
        pte: the artifact.
        model_id: the model's name in requests.
        sessions: most named sessions; states: most loaded copies of the program's state (`Sessions`).
        runtime, cuda_graph, prefill_chunk, verify: as for `TextGenerator.load`; None: the worker's default.
        chat_template: a file with a Jinja template; None: the artifact's.
        limits: of the HTTP server. `lacks` is set to what the artifact does not have.

    Raises:
        ValueError: a number out of range.
    """

    pte: Path
    model_id: str
    sessions: int = 16
    states: int = 1
    runtime: str = "auto"
    cuda_graph: bool = False
    prefill_chunk: int | None = None
    verify: bool = True
    chat_template: Path | None = None
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        for name, value, least in (
            ("sessions", self.sessions, 0),
            ("states", self.states, 1),
            ("max_body", self.limits.max_body, 1),
            ("max_waiting", self.limits.max_waiting, 1),
            ("prefill_chunk", 1 if self.prefill_chunk is None else self.prefill_chunk, 1),
        ):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")

    def command(self, worker: str = "worker") -> list[str]:
        """The command of the worker process, whose module is `worker` or `batch_worker`."""
        command = [sys.executable, "-m", f"executorch_moe.export.serve.{worker}", "--model_path", str(self.pte)]
        command += ["--runtime", self.runtime, "--sessions", str(self.sessions), "--states", str(self.states)]
        if self.cuda_graph:
            command.append("--cuda-graph")
        if self.prefill_chunk is not None:
            command += ["--prefill-chunk", str(self.prefill_chunk)]
        return command if self.verify else [*command, "--no-verify"]


def check_installed() -> None:
    """Checks that the packages of the server are installed.

    Raises:
        ModuleNotFoundError: one is missing.
    """
    import importlib.util

    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise ModuleNotFoundError(
            f"the server needs {', '.join(missing)}, which is not installed: pip install 'executorch-moe[serve]'"
        )


@contextlib.contextmanager
def serving(options: ServeOptions, command: Sequence[str] = ()) -> Iterator[App]:
    """The ASGI application, with its worker process, which ends with the context.

    Args:
        options: what to serve.
        command: starts another worker that speaks the protocol; empty: `options.command()`.

    Raises:
        ModuleNotFoundError: see `check_installed`.
        FileNotFoundError, ValueError: a missing or damaged file.
        RuntimeError: the worker does not start.
    """
    check_installed()
    from executorch.examples.llm_server.python.chat_template import ChatTemplate
    from executorch.examples.llm_server.python.server import build_app
    from executorch.examples.llm_server.python.serving_chat import ServingChat
    from executorch.examples.llm_server.python.session_runtime import SessionRuntime
    from executorch.examples.llm_server.python.worker_client import WorkerError, spawn_worker

    from .batch_runtime import BatchRuntime
    from .restarts import KILL_AFTER, RestartedWorker

    program = PteFile(pte_path(options.pte), verify=options.verify)
    beside = companion(program.path, TOKENIZER_SUFFIX)
    check_tokenizer(program, beside)
    tokenizer = read_tokenizer(beside)
    template = artifact_template(program.constant_names, program.constant, options.chat_template)
    # The worker refuses an output that it does not know.
    limits = replace(options.limits, lacks=LACKS.get(program.constant("get_method_output"), ()))
    with tempfile.TemporaryDirectory() as folder:  # ExecuTorch's class reads a folder
        chat_tokenizer(tokenizer, program.constant, template).save_pretrained(folder)
        chat = ChatTemplate(folder)
    rows = int(program.constant(MAX_BATCH)) if MAX_BATCH in program.constant_names else 1
    logger.info(state_memory(program, options.states))
    runtime: Any
    try:
        if rows > 1:
            runtime = BatchRuntime(command or options.command("batch_worker"))
        else:
            worker = RestartedWorker(lambda: spawn_worker(command or options.command()))
            runtime = SessionRuntime(worker, cancel_grace_seconds=KILL_AFTER + 15.0)
    except WorkerError as error:
        raise RuntimeError(f"the worker does not start: its messages are above ({error})") from None
    try:
        handler = ServingChat(
            runtime,
            chat,
            options.model_id,
            max_context=int(program.constant("get_max_context_len")),
            tool_detector_cls=tool_detector(template),
        )
        yield guarded(build_app(handler, options.model_id), limits)
    finally:
        runtime.close_worker()


def state_memory(program: PteFile, states: int) -> str:
    """What the states of a program take, as a line for the log. Those of `export --max-batch` are slots of one cache.

    A state on the CPU has the planned buffers of its methods, which hold the KV cache and intermediate values; the
    weights are mapped and shared.
    """
    if MAX_BATCH in program.constant_names:
        rows = int(program.constant(MAX_BATCH))
        return f"{rows} slots of the KV cache, which is allocated when the program is loaded"
    if any(delegate.id == CUDA_BACKEND for _, delegate in program.delegates()):
        return f"{states} state{'s' * (states > 1)} on the GPU, each with the weights"
    methods = pick_cpu_methods(program.method_names).values()
    planned = max((sum(program.plan(name).non_const_buffer_sizes) for name in methods), default=0)
    return f"at most {states} state{'s' * (states > 1)} of {planned / 1e6:,.0f} MB beside the weights"


def tool_detector(template: str) -> Any:
    """ExecuTorch's parser of tool calls for the form that a chat template names; JSON in <tool_call> for others."""
    from executorch.examples.llm_server.python import tool_parsers

    if "<function=" in template:
        return tool_parsers.QwenFunctionCallDetector
    if "<|tool_call>" in template:
        return tool_parsers.GemmaToolCallDetector
    return tool_parsers.HermesDetector


def guarded(app: Any, limits: Limits) -> Guard:
    """A FastAPI application behind the middleware; its errors get the form of OpenAI's API."""
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from jinja2 import TemplateError
    from starlette.exceptions import HTTPException

    async def invalid(_: Any, error: Any) -> Any:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return JSONResponse(error_body(f"{where or 'body'}: {first['msg']}", code="invalid_value"), 422)

    async def refused(_: Any, error: Any) -> Any:
        return JSONResponse(error_body(str(error.detail)), error.status_code, headers=error.headers)

    async def template(_: Any, error: Any) -> Any:
        text = f"the chat template refuses these messages: {error}"
        return JSONResponse(error_body(text, code="invalid_value"), 400)

    async def failed(_: Any, error: Any) -> Any:
        return JSONResponse(error_body(f"{type(error).__name__} in the server", "server_error"), 500)

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(TemplateError, template)
    app.add_exception_handler(Exception, failed)
    return Guard(app, limits)


def run(options: ServeOptions, host: str, port: int) -> None:
    """Serves until the process is interrupted.

    Raises:
        See `serving`.
    """
    check_installed()
    import uvicorn

    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    with serving(options) as app:
        uvicorn.run(app, host=host, port=port, timeout_graceful_shutdown=5)  # type: ignore[arg-type]


def api_key() -> str:
    """The API key of the environment; empty: none."""
    return os.environ.get(API_KEY, "")
