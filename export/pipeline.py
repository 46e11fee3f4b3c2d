"""Model folder -> `.pte` + `.ptd` + tokenizer: check, pack, trace, lower, write."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

from executorch_moe.backends.cuda.cross_report import CrossCompileReport
from executorch_moe.backends.cuda.kernel_configs import Config, given_configs, read_configs
from executorch_moe.backends.cuda.placeholders import without_weights
from executorch_moe.backends.fusion import ExpertFuser, FusedLayer, FusionOptions, FusionReport
from executorch_moe.backends.fusion.modules import find_experts
from executorch_moe.kernels import SCHEMES, FusedExperts
from executorch_moe.kernels.gpus import find_models, target_names

from . import attention
from .causal_lm import BY_OUTPUT, check_context, export_methods
from .choices import (
    attention_of,
    build_synthetic,
    check_choices,
    forced_schedule,
    quantize_dense,
    streamline_,
    use_upstream_,
)
from .dense_torchao import stored_bytes
from .files import write_aside
from .memory import peak_rss, restart_peak
from .pretrained import TINY, check_supported, load_model, require_transformers, resolve, tokenizer_json
from .streaming import StreamedModel
from .synthetic import is_synthetic
from .upstream_experts import UpstreamMoE
from .work_folder import WorkFolder, work_folder_path

TARGETS = ("cuda", "cpu")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
DEFAULT_MAX_CONTEXT = 2048
MADE_FROM = "get_synthetic_options"
TOKENIZER_DIGEST = "get_tokenizer_digest"


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
        output: what the methods return: "token" (picked on the device as their inputs say), "greedy" (always the
            likeliest token) or "logits".
        experts: "ours"; "ours-tile": the one-CTA-per-tile schedule; "upstream": ExecuTorch's own operators.
        dense: linear layers: "none" (as they are), "int8" or "int4"; on the CPU, embeddings too. lm_head: the last one;
            None: as dense. embedding: "none" or "int8".
        thin: write no large weights; of synthetic models, which are made again on the GPU that loads them.
        layers, seed: of a synthetic model ("synthetic:qwen3-30b-a3b"); see `synthetic.parse`.
        algorithm: how experts are rounded to 4 bits, "minmax" or "hqq"; see `kernels.rounding`.
        check: nothing is exported, only checked (`preflight`): "cuda" needs no GPU, and "auto" is "cuda".
        kernel_configs: file of measured configurations of ExecuTorch's own kernels (`kernel_configs.read_configs`), for
            a GPU that is not here; None: those that are known.
    """

    model: str
    out: Path
    target: str = "auto"
    scheme: str = "w4a16"
    group_size: int = 32
    max_context: int | None = None
    dtype: str = "auto"
    output: str = "token"
    experts: str = "ours"
    dense: str = "none"
    lm_head: str | None = None
    embedding: str = "none"
    layers: int | None = None
    seed: int = 0
    thin: bool = False
    algorithm: str = "minmax"
    check: bool = False
    kernel_configs: str | None = None

    def __post_init__(self) -> None:
        if self.crosses and not set(self.target.split(",")) <= set(target_names()):
            raise ValueError(
                f"target={self.target!r} is unknown: use one of {', '.join((*TARGETS, 'auto', *target_names()))}"
            )
        if self.dtype not in (*DTYPES, "auto"):
            raise ValueError(f"dtype={self.dtype!r} is unknown: use one of {', '.join(DTYPES)}, auto")
        self.fusion()
        if self.out.suffix != ".pte":
            raise ValueError(f"out={str(self.out)!r} must end in .pte: give for example {self.out.with_suffix('.pte')}")
        if self.out.is_dir():
            raise ValueError(f"out={str(self.out)!r} is a folder: give a file name that ends in .pte")
        # The folder is made at the end; that it can be made is checked before minutes are spent.
        folder = next(parent for parent in self.out.absolute().parents if parent.exists())
        if not (self.check or (folder.is_dir() and os.access(folder, os.W_OK))):
            raise ValueError(f"out={str(self.out)!r} cannot be written, {folder} is no writable folder: choose another")
        check_choices(self, self.resolved_target())
        if self.crosses:
            check_cross(self.target)
        self.known_configs()
        if self.target == "cuda" and not self.check and not torch.cuda.is_available():
            raise ValueError(
                f"target='cuda' needs a GPU that torch {torch.__version__} can use, and there is none: "
                "name the GPU to export for (target='sm_90', target='h200'), export on a GPU machine with a CUDA build "
                "of torch, or use target='cpu'"
            )

    def fusion(self) -> FusionOptions:
        """How experts are fused; checks scheme and algorithm."""
        return FusionOptions(self.scheme, self.group_size, algorithm=self.algorithm)

    def known_configs(self) -> dict[str, Config]:
        """What `kernel_configs` holds.

        Raises:
            ValueError: a file that cannot be read, or a target that times its kernels itself.
        """
        if self.kernel_configs is None:
            return {}
        if not self.crosses:
            raise ValueError(
                f"kernel_configs={self.kernel_configs!r} is for a GPU by name, as target='h200', not for "
                f"{self.target!r}: leave it out"
            )
        return read_configs(Path(self.kernel_configs))

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
        dtype = self.resolved_dtype()
        return DTYPES[dtype], attention_of(self.resolved_target(), dtype)

    def load(self, folder: Path) -> nn.Module:
        """The model as this export computes it, with its experts unpacked (those of a synthetic model are packed)."""
        dtype, implementation = self.precision()
        if is_synthetic(self.model):
            return build_synthetic(self, dtype, implementation)
        return self.streamline(load_model(folder, dtype, implementation))

    def streamline(self, model: nn.Module) -> nn.Module:
        """The same model with what its target can do in fewer kernels."""
        return streamline_(model) if self.precision()[1] == attention.NAME else model

    def stream(self, folder: Path) -> StreamedModel:
        """The model as this export computes it, to be loaded with packed experts; reads headers only."""
        return StreamedModel(folder, *self.precision(), self.fusion())

    def context(self, config: Any) -> int:
        """Positions in the cache, checked against the model's configuration."""
        size = self.max_context
        if size is None:
            size = min(DEFAULT_MAX_CONTEXT, config.max_position_embeddings)
        check_context(config, size)
        return size

    def resolved_dtype(self) -> str:
        """The dtype with "auto" decided."""
        return self.dtype if self.dtype != "auto" else "fp32" if self.resolved_target() == "cpu" else "bf16"


@dataclass
class ExportSummary:
    """What was exported and what it cost: seconds of each step, and the most bytes that were resident during it.

    `reads_written`: decode reads the positions of the cache that were written, not all of it.
    """

    options: ExportOptions
    target: str
    report: FusionReport
    max_context: int
    dense_bytes: int
    files: list[Path] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    compiled: list[CrossCompileReport] = field(default_factory=list)
    embedding_bytes: int = 0
    cache_bytes: int = 0
    reads_written: bool = False

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

    def record(self) -> str:
        """What an export cost, for `bench model`: JSON."""
        choices = asdict(self.options) | {"out": self.options.out.name, "target": self.target}
        peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        if torch.cuda.is_available():
            peak["gpu"] = torch.cuda.max_memory_allocated()
        record: dict[str, Any] = {
            "options": choices,
            "max_context": self.max_context,
            "seconds": self.seconds,
            "peak_bytes": peak,
            "expert_bytes": self.report.bytes_after,
            "other_bytes": self.dense_bytes,
            "embedding_bytes": self.embedding_bytes,
            "cache_bytes": self.cache_bytes,
            "cache_reads": "written" if self.reads_written else "all",
        }
        if self.report.layers:
            layer = self.report.layers[0]
            record["active_experts"] = layer.top_k / layer.num_experts
        return json.dumps(record, indent=2) + "\n"

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
    """The model's folder, if its kind of model is supported; of a synthetic model, that of the tokenizer it borrows.

    Raises:
        ValueError, NotImplementedError, FileNotFoundError: see `resolve` and `check_supported`.
        ModuleNotFoundError, RuntimeError: no transformers, or another version.
    """
    folder = resolve(TINY if is_synthetic(options.model) else options.model)
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


def tokenizer_digest(text: str) -> str:
    """What an artifact keeps of its tokenizer.json, to know it again."""
    return hashlib.sha256(text.encode()).hexdigest()


def record_path(pte: Path) -> Path:
    """Where the record of an export lies: beside it, NAME.export.json."""
    return pte.with_suffix(".export.json")


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
    fuser = ExpertFuser(options.fusion())
    work: WorkFolder | None = None
    if is_synthetic(options.model) or options.experts == "upstream":
        with step("load", f"loading {options.model}"):
            model = options.load(folder)
            max_context = options.context(model.config)
            pack_whole(model, options, fuser.report)
    else:
        with step("check", f"checking {folder.name if options.model != 'tiny' else 'the tiny model'}"):
            streamed = options.stream(folder)
            max_context = options.context(streamed.model.config)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        work = WorkFolder(work_folder_path(options.out), streamed.manifest())
        doing = f"packing the experts as {options.scheme}"
        with step("pack", doing, bar=True), layers_bar(console, streamed) as advance:
            try:
                for record in streamed.load(work, advance):
                    fuser.report.add(record)
            except KeyboardInterrupt:
                if console is not None:
                    console.print(f"packed layers are kept in {work.path}: the same command goes on from there")
                raise
        model = options.streamline(streamed.model)
    config: Any = model.config
    if (options.dense, options.lm_head, options.embedding) != ("none", None, "none"):
        with step("dense", "quantising linear layers"):
            quantize_dense(model, options)
    module = BY_OUTPUT[options.output](model, max_context)
    with step("trace", "tracing prefill and decode"):
        programs = export_methods(module, one_row_linears=target != "cpu")
    reports: list[CrossCompileReport] = []
    constants = constant_methods(config, max_context)
    constants |= {"get_method_output": options.output, TOKENIZER_DIGEST: tokenizer_digest(tokenizer)}
    if options.thin:
        constants[MADE_FROM] = made_from(options)
    doing = f"lowering to {target}" + (" (compiles kernels: minutes)" if target != "cpu" else "")
    weights = without_weights() if options.thin else nullcontext()
    with step("lower", doing), forced_schedule(options.experts), weights, given_configs(options.known_configs()):
        manager = lower(programs, target, constants, fuser, on_report=reports.append)
    with step("write", f"writing {options.out}"):
        artifact = save(manager, options.out)
        write_aside(tokenizer_path(options.out), tokenizer)
        if work is not None:
            work.remove()

    others = {name: tensor for name, tensor in model.state_dict().items() if not in_layers(name, fuser.report)}
    summary = ExportSummary(
        options=options,
        target=target,
        report=fuser.report,
        max_context=max_context,
        dense_bytes=distinct_bytes(others.values()),
        files=[path for path in (artifact.pte, artifact.ptd, tokenizer_path(options.out)) if path.is_file()],
        seconds=seconds,
        peaks=peaks,
        compiled=reports,
        # A head that is tied to the embedding reads all of it.
        embedding_bytes=distinct_bytes(others.values())
        - distinct_bytes(tensor for name, tensor in others.items() if "embed_tokens" not in name),
        cache_bytes=sum(tensor.nbytes for tensor in module.kv_cache.buffers()),
        reads_written=any("attention_of_one" in str(node.target) for node in programs["decode"].graph.nodes),
    )
    write_aside(record_path(options.out), summary.record())
    return summary


def made_from(options: ExportOptions) -> str:
    """What makes the weights again, as JSON: of the options, those that decide what they are."""
    others = ("out", "target", "max_context", "kernel_configs")
    choices = {name: value for name, value in asdict(options).items() if name not in others}
    return json.dumps(choices | {"dtype": options.resolved_dtype()})


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


def pack_whole(model: nn.Module, options: ExportOptions, report: FusionReport) -> None:
    """Upstream's experts in the place of the model's, or those of a synthetic model as they are; into `report`."""
    before = {
        name: (type(module).__name__, sum(p.nbytes for p in module.parameters()))
        for name, module in find_experts(model)
    }
    if options.experts == "upstream" and not is_synthetic(options.model):
        use_upstream_(model, options.scheme, options.group_size)
    config: Any = model.config
    for name, module in model.named_modules():
        if not isinstance(module, (FusedExperts, UpstreamMoE)):
            continue
        experts: Any = module
        as_bf16 = 2 * 3 * experts.num_experts * experts.hidden_size * experts.intermediate_size
        family, num_bytes = before.get(name, ("synthetic", as_bf16))
        report.add(
            FusedLayer(
                module=f"model.{name}",  # as it is named in the exported program
                family=family,
                num_experts=experts.num_experts,
                top_k=config.num_experts_per_tok,
                hidden_size=experts.hidden_size,
                intermediate_size=experts.intermediate_size,
                activation=experts.activation,
                biases=experts.w2_bias is not None,
                scheme=experts.scheme,
                group_size=experts.group_size,
                algorithm="minmax" if experts.group_size else "",
                bytes_before=num_bytes,
                bytes_after=experts.packed().nbytes(),
            )
        )


def distinct_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors, those that share their memory counted once."""
    # A quantised tensor is several in one, and has no address of its own.
    plain = (torch.Tensor, nn.Parameter)
    return sum({t.data_ptr() if type(t) in plain else id(t): stored_bytes(t) for t in tensors}.values())


def in_layers(parameter: str, report: FusionReport) -> bool:
    """True for a parameter of a fused layer, named as in the model."""
    return any(f"model.{parameter}".startswith(f"{layer.module}.") for layer in report.layers)


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
