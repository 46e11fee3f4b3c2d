"""`export_model`: model folder -> `.pte` + `.ptd` + tokenizer. Steps: check, pack, trace, lower, write."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from torch import nn

from executorch_moe.backends.atomic_files import named, write_text
from executorch_moe.backends.cuda.cross.kernel_configs import given_configs
from executorch_moe.backends.cuda.cross.report import CrossCompileReport
from executorch_moe.backends.cuda.generated_kernels import AccessReport
from executorch_moe.backends.cuda.placeholders import without_weights
from executorch_moe.backends.fusion import ExpertFuser, FusionReport
from executorch_moe.export.checkpoint.gguf import is_gguf
from executorch_moe.export.checkpoint.work_folder import WorkFolder, work_folder_path
from executorch_moe.export.models.pretrained import BUNDLED, tokenizer_json
from executorch_moe.export.models.synthetic import is_synthetic, parse
from executorch_moe.export.report.metadata import cache_buffers, constant_methods, record_path, tokenizer_path
from executorch_moe.export.report.stored_weights import stored_weights
from executorch_moe.export.report.summary import ExportSummary, bytes_beside_experts, model_sizes

from .build import check_folder, forced_schedule, load_packed, needs_whole_model, prepare_, stream, trace_methods
from .options import ExportOptions
from .progress import Steps


def export_model(options: ExportOptions, console: Console | None = None) -> ExportSummary:
    """Exports a model; shows each step on `console` if one is given.

    Raises:
        ValueError, NotImplementedError, FileNotFoundError: input that cannot be exported; nothing is written.
        OSError: a file cannot be written; existing files are not changed.
        RuntimeError: another export is writing to the same place.
    """
    steps = Steps(console)
    with ExitStack() as held:
        return _export(options, steps, held)


def _export(options: ExportOptions, steps: Steps, held: ExitStack) -> ExportSummary:
    from executorch_moe.backends.artifact.files import save
    from executorch_moe.backends.lower import lower, why_slower

    out, target = options.pte, options.target
    folder = check_folder(options)
    tokenizer = tokenizer_json(folder)
    fuser = ExpertFuser(options.experts.fusion())
    work: WorkFolder | None = None
    if needs_whole_model(options):
        if is_synthetic(options.model):
            options.positions(parse(options.model, options.layers).config())
        with steps.step("load", f"loading {options.model}"):
            model = load_packed(options, folder, fuser.report)
            max_context = options.positions(model.config)
    else:
        model, max_context, work = _pack_layers(options, folder, fuser.report, steps, held)
    with nullcontext() if options.dense.unchanged else steps.step("dense", "quantizing linear layers"):
        prepare_(model, options)
    with steps.step("trace", "tracing prefill and decode"):
        module, programs = trace_methods(model, options, max_context)
    compiled: list[CrossCompileReport] = []
    accesses: list[AccessReport] = []
    constants = constant_methods(options, model.config, max_context, tokenizer, cache_buffers(programs))
    note = "" if target.is_cpu else " (compiles kernels: minutes)"
    weights = without_weights() if options.placeholder_weights else nullcontext()
    configs = given_configs(target.configs())
    with steps.step("lower", f"lowering to {target.name}", note), forced_schedule(options.experts), weights, configs:
        manager = lower(programs, target.name, constants, fuser, on_report=compiled.append, on_accesses=accesses.append)
    if why := why_slower(target.name):
        steps.say(f"[yellow]warning:[/yellow] {escape(why)}")
    with steps.step("write", f"writing {out}"), named(out):
        beside = tokenizer_path(out)
        artifact = save(manager, out, {beside: tokenizer.encode()})
        if work is not None:
            work.remove()

    dense_bytes, embedding_bytes = bytes_beside_experts(model, fuser.report)
    summary = ExportSummary(
        options=options,
        report=fuser.report,
        max_context=max_context,
        dense_bytes=dense_bytes,
        embedding_bytes=embedding_bytes,
        cache_bytes=sum(tensor.nbytes for tensor in module.kv_cache.buffers()),
        files=[artifact.pte, artifact.ptd, beside],
        sizes=model_sizes(model.config),
        seconds=steps.seconds,
        peaks=steps.peaks,
        compiled=compiled,
        accesses=accesses,
        reads_written=any(
            "one_token_attention" in str(node.target) for p in programs.values() for node in p.graph.nodes
        ),
    )
    write_text(record_path(out), summary.record())
    return summary


@contextmanager
def _kept(options: ExportOptions, manifest: dict[str, Any], steps: Steps) -> Iterator[WorkFolder]:
    """The work folder, locked for this export; after an error, a message says that it is kept."""
    with WorkFolder(work_folder_path(options.pte), manifest) as work:
        try:
            yield work
        except BaseException:
            if work.path.is_dir():
                steps.say(f"packed layers are kept in {escape(str(work.path))}: the same command continues from there")
            raise


def _pack_layers(
    options: ExportOptions, folder: Path, report: FusionReport, steps: Steps, held: ExitStack
) -> tuple[nn.Module, int, WorkFolder]:
    """Packs the experts layer by layer into a work folder, which is unlocked when `held` is closed.

    Returns:
        The model with packed experts, the number of positions in its KV cache, and the work folder.
    """
    name = options.model if options.model in BUNDLED else folder.name
    if is_gguf(options.model):
        name = Path(options.model).name
    with steps.step("check", f"checking {name}"):
        streamed = stream(options, folder)
        max_context = options.positions(streamed.model.config)
    work = held.enter_context(_kept(options, streamed.manifest(), steps))
    with steps.counted("pack", f"packing the experts as {options.experts.scheme}", len(streamed.layers)) as advance:
        for record in streamed.load(work, advance):
            report.add(record)
    for line in stored_weights(streamed, report.layers, options):
        steps.say(escape(line))
    return streamed.model, max_context, work
