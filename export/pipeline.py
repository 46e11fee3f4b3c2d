"""Model folder -> `.pte` + `.ptd` + tokenizer: check, pack, trace, lower, write."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

from executorch_moe.backends.cuda.cross_report import CrossCompileReport
from executorch_moe.backends.fusion import ExpertFuser, FusedLayer, FusionOptions, FusionReport
from executorch_moe.kernels import SCHEMES
from executorch_moe.kernels.gpus import find_models, target_names

from .causal_lm import CausalLM, check_context, export_methods
from .dense_torchao import check_dense, quantize_dense_, stored_bytes
from .files import write_aside
from .memory import peak_rss, restart_peak
from .pretrained import check_supported, load_model, require_transformers, resolve, tokenizer_json
from .streaming import StreamedModel
from .work_folder import WorkFolder, work_folder_path

TARGETS = ("cuda", "cpu")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
DEFAULT_MAX_CONTEXT = 2048


@dataclass(frozen=True)
class ExportOptions:
    """What to export; checked when made.

    Attributes:
        model: folder of a Hugging Face model, or "tiny".
        out: the `.pte` to write; NAME.ptd and NAME.tokenizer.json are written beside it.
        target: "cuda" (the GPU of this machine), "sm_90", "h200" and the like (that GPU, on a machine without one),
            "sm_80,sm_90" (one artifact for both), "cpu", or "auto" (cuda if torch sees a GPU, else cpu).
        scheme: "w4a16", "w4a8" or "bf16".
        group_size: weights that share one scale.
        max_context: positions in the KV cache; None takes 2048 or what the model was made for, if that is less.
        dtype: of everything but the experts: "bf16", "fp32" or "auto" (bf16 on cuda, fp32 on the CPU, whose dense
            kernels are made for it). The experts' activations are bf16 in all.
        algorithm: how experts are rounded to 4 bits, "minmax" or "hqq"; see `kernels.rounding`.
        dense: linear layers and embeddings: "none", "int8" or "int4" (for target "cpu"); see `dense_torchao`.
        check: nothing is exported, only checked (`preflight`): "cuda" needs no GPU, and "auto" is "cuda".
    """

    model: str
    out: Path
    target: str = "auto"
    scheme: str = "w4a16"
    group_size: int = 32
    max_context: int | None = None
    dtype: str = "auto"
    algorithm: str = "minmax"
    dense: str = "none"
    check: bool = False

    def __post_init__(self) -> None:
        if self.crosses and not set(self.target.split(",")) <= set(target_names()):
            raise ValueError(
                f"target={self.target!r} is unknown: use one of {', '.join((*TARGETS, 'auto', *target_names()))}"
            )
        if self.dtype not in (*DTYPES, "auto"):
            raise ValueError(f"dtype={self.dtype!r} is unknown: use one of {', '.join(DTYPES)}, auto")
        self.fusion()
        check_dense(self.dense)
        if self.dense != "none" and self.resolved_target() != "cpu":
            raise NotImplementedError(
                f"dense={self.dense!r} cannot be lowered to target={self.target!r} yet: "
                "use dense='none' or target='cpu'"
            )
        if self.out.suffix != ".pte":
            raise ValueError(f"out={str(self.out)!r} must end in .pte: give for example {self.out.with_suffix('.pte')}")
        if self.out.is_dir():
            raise ValueError(f"out={str(self.out)!r} is a folder: give a file name that ends in .pte")
        # The folder is made at the end; that it can be made is checked before minutes are spent.
        folder = next(parent for parent in self.out.absolute().parents if parent.exists())
        if not (self.check or (folder.is_dir() and os.access(folder, os.W_OK))):
            raise ValueError(f"out={str(self.out)!r} cannot be written, {folder} is no writable folder: choose another")
        if self.crosses:
            check_cross(self.target)
        if self.target == "cuda" and not self.check and not torch.cuda.is_available():
            raise ValueError(
                f"target='cuda' needs a GPU that torch {torch.__version__} can use, and there is none: "
                "name the GPU to export for (target='sm_90', target='h200'), export on a GPU machine with a CUDA build "
                "of torch, or use target='cpu'"
            )

    def fusion(self) -> FusionOptions:
        """How experts are fused; checks scheme and algorithm."""
        return FusionOptions(self.scheme, self.group_size, algorithm=self.algorithm)

    def resolved_target(self) -> str:
        """The target with "auto" decided."""
        if self.target != "auto":
            return self.target
        return "cuda" if self.check or torch.cuda.is_available() else "cpu"

    @property
    def crosses(self) -> bool:
        """True for GPUs by name, which need not be here."""
        return self.target not in (*TARGETS, "auto")

    def precision(self) -> tuple[torch.dtype, str]:
        """Type of everything but the experts, and an attention (transformers' name) that the target has in it."""
        target = "cpu" if self.resolved_target() == "cpu" else "cuda"
        dtype = ("bf16" if target == "cuda" else "fp32") if self.dtype == "auto" else self.dtype
        # ExecuTorch's Triton attention for CUDA writes bf16 whatever it is given.
        return DTYPES[dtype], "eager" if (target, dtype) == ("cuda", "fp32") else "sdpa"

    def load(self, folder: Path) -> nn.Module:
        """The model as this export computes it, with its experts unpacked."""
        return load_model(folder, *self.precision())

    def stream(self, folder: Path) -> StreamedModel:
        """The model as this export computes it, to be loaded with packed experts; reads headers only."""
        dtype, attention = self.precision()
        return StreamedModel(folder, dtype, attention, self.fusion())

    def context(self, config: Any) -> int:
        """Positions in the cache, checked against the model's configuration."""
        size = self.max_context
        if size is None:
            size = min(DEFAULT_MAX_CONTEXT, config.max_position_embeddings)
        check_context(config, size)
        return size


@dataclass
class ExportSummary:
    """What was exported and what it cost: seconds of each step, and the most bytes that were resident during it."""

    options: ExportOptions
    target: str
    report: FusionReport
    max_context: int
    dense_bytes: int
    files: list[Path] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    compiled: list[CrossCompileReport] = field(default_factory=list)

    def table(self) -> Table:
        """The summary as a table for the terminal."""
        table = Table(title=f"{self.options.model} for {self.target}", show_header=False, title_justify="left")
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        scheme = self.options.scheme
        if SCHEMES[scheme].packed:
            scheme += f", group size {self.options.group_size}, {self.options.algorithm}"
        layers = self.report.layers
        table.add_row(
            "experts", f"{len(layers)} layers fused, {layers[0].num_experts} experts each, top-{layers[0].top_k}"
        )
        table.add_row("scheme", scheme)
        before = sum(2 * 3 * layer.num_experts * layer.hidden_size * layer.intermediate_size for layer in layers)
        after = self.report.bytes_after
        table.add_row("expert weights", f"{size(before)} in bf16 -> {size(after)} packed")
        dense = "" if self.options.dense == "none" else f", linear layers and embeddings in {self.options.dense}"
        table.add_row("other weights", size(self.dense_bytes) + dense)
        table.add_row("methods", f"prefill (2 to {self.max_context} tokens), decode (1 token)")
        for path in self.files:
            table.add_row("file", f"{path}  {size(path.stat().st_size)}")
        for compiled in self.compiled:
            table.add_row("compiled for", str(compiled))
        times = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
        table.add_row("time", times)
        table.add_row("peak memory", ", ".join(f"{name} {size(peak)}" for name, peak in self.peaks.items()))
        return table

    def layers_table(self) -> Table:
        """Every fused layer, for --verbose."""
        table = Table(title="fused layers", title_justify="left")
        for column in ("module", "family", "E", "top-k", "H", "I", "activation", "scheme", "before", "after"):
            table.add_column(column, overflow="fold")
        for layer in self.report.layers:
            table.add_row(
                layer.module, layer.family, str(layer.num_experts), str(layer.top_k), str(layer.hidden_size),
                str(layer.intermediate_size), layer.activation, layer.scheme, size(layer.bytes_before),
                size(layer.bytes_after),
            )  # fmt: skip
        return table


def check_folder(options: ExportOptions) -> Path:
    """The model's folder, if its kind of model is supported.

    Raises:
        ValueError, NotImplementedError, FileNotFoundError: see `resolve` and `check_supported`.
        ModuleNotFoundError, RuntimeError: no transformers, or another version.
    """
    folder = resolve(options.model)
    check_supported(folder)
    require_transformers()
    return folder


def check_cross(target: str) -> None:
    """Check that GPUs that are not here can be exported for, before minutes are spent.

    Raises:
        ValueError: two of one architecture.
        RuntimeError: no compiler, or versions that are not known to work.
    """
    from executorch_moe.backends.cuda.cross_compile import check_target

    for model in find_models(target):
        check_target(model.name)


def size(num_bytes: float) -> str:
    """A size for people: 1.9 MB."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.2f} GB"


def tokenizer_path(pte: Path) -> Path:
    """Where the tokenizer of an artifact lies: beside it, NAME.tokenizer.json."""
    return pte.with_suffix(".tokenizer.json")


def export_model(options: ExportOptions, console: Console | None = None) -> ExportSummary:
    """Exports a model folder; shows each step on `console` if one is given.

    Raises:
        ValueError, NotImplementedError, FileNotFoundError: input that cannot be exported; nothing is written then.
    """
    from executorch_moe.backends.artifact import save
    from executorch_moe.backends.targets import lower

    seconds: dict[str, float] = {}
    peaks: dict[str, int] = {}

    @contextmanager
    def step(name: str, doing: str, bar: bool = False) -> Iterator[None]:
        start = time.perf_counter()
        restart_peak()
        if console is None or bar:
            yield
        else:
            with console.status(doing):
                yield
        seconds[name], peaks[name] = time.perf_counter() - start, peak_rss()
        if console is not None:
            console.print(f"[green]done[/green] {doing} ({seconds[name]:.1f} s)", highlight=False)

    folder = check_folder(options)
    target = options.resolved_target()
    tokenizer = tokenizer_json(folder)

    with step("check", f"checking {folder.name if options.model != 'tiny' else 'the tiny model'}"):
        streamed = options.stream(folder)
        max_context = options.context(streamed.model.config)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    work = WorkFolder(work_folder_path(options.out), streamed.manifest())
    model, fuser = streamed.model, ExpertFuser(options.fusion())
    with step("pack", f"packing the experts as {options.scheme}", bar=True), layers_bar(console, streamed) as advance:
        try:
            for record in streamed.load(work, advance):
                fuser.report.add(record)
        except KeyboardInterrupt:
            if console is not None:
                console.print(f"packed layers are kept in {work.path}: the same command goes on from there")
            raise
    config: Any = model.config
    if options.dense != "none":
        with step("dense", f"quantising linear layers and embeddings to {options.dense}"):
            quantize_dense_(model, options.dense)
    module = CausalLM(model, max_context)
    with step("trace", "tracing prefill and decode"):
        programs = export_methods(module)
    reports: list[CrossCompileReport] = []
    with step("lower", f"lowering to {target}" + (" (compiles kernels: minutes)" if target != "cpu" else "")):
        manager = lower(programs, target, constant_methods(config, max_context), fuser, on_report=reports.append)
    with step("write", f"writing {options.out}"):
        artifact = save(manager, options.out)
        write_aside(tokenizer_path(options.out), tokenizer)
        work.remove()

    summary = ExportSummary(
        options=options,
        target=target,
        report=fuser.report,
        max_context=max_context,
        dense_bytes=sum(map(stored_bytes, model.parameters())),
        files=[path for path in (artifact.pte, artifact.ptd, tokenizer_path(options.out)) if path.is_file()],
        seconds=seconds,
        peaks=peaks,
        compiled=reports,
    )
    return summary


@contextmanager
def layers_bar(console: Console | None, streamed: StreamedModel) -> Iterator[Callable[[FusedLayer], None]]:
    """A progress bar over the expert layers; yields what to call after each."""
    if console is None:
        yield lambda record: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("packing expert layers", total=len(streamed.layers))
        yield lambda record: progress.advance(task)


def constant_methods(config: Any, max_context: int) -> dict[str, Any]:
    """Constant methods under the names that ExecuTorch's language model runners read."""
    eos = config.eos_token_id
    return {
        "get_max_context_len": max_context,
        "get_max_seq_len": max_context,
        "get_vocab_size": config.vocab_size,
        "get_bos_id": -1 if config.bos_token_id is None else config.bos_token_id,
        "get_eos_ids": list(eos) if isinstance(eos, (list, tuple)) else [-1 if eos is None else eos],
        "get_n_layers": config.num_hidden_layers,
        "use_kv_cache": True,
        "enable_dynamic_shape": True,
    }
