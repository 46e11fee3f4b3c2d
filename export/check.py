"""`export --check`: checks an export without a GPU and without writing anything.

It checks the checkpoint and its experts, traces both methods at full size without weights, predicts operators that the
CUDA backend lacks, and compares the first layers, with their weights, with the unmodified model.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.export import ExportedProgram

from executorch_moe.backends.cuda.missing_operators import MissingOperator, missing_operators
from executorch_moe.backends.fusion import ExpertFuser, ExpertLayout
from executorch_moe.backends.fusion.modules import find_experts
from executorch_moe.export.checkpoint.plan import meta_model, set_weight
from executorch_moe.export.checkpoint.streaming import LayerPlan, StreamedModel
from executorch_moe.export.checkpoint.whole import check_loadable
from executorch_moe.export.host_memory import size
from executorch_moe.export.models.causal_lm import CausalLM, export_methods
from executorch_moe.export.models.pretrained import tokenizer_json
from executorch_moe.export.models.synthetic import is_synthetic
from executorch_moe.export.models.upstream_experts import UpstreamMoE, placeholder_weights
from executorch_moe.export.quantize.dense_torchao import stored_bytes
from executorch_moe.export.report.stored_weights import stored_weights
from executorch_moe.kernels import PackedExperts
from executorch_moe.kernels.packing.experts import unpack_experts
from executorch_moe.kernels.packing.fragments import deinterleave_gate_up

from .build import attention_of, check_folder, check_upstream, needs_whole_model, prepare_, stream, trace_methods
from .options import ExportOptions, Target

BOUNDS = {"bf16": 1.5e-2, "w4a16": 1.5e-2, "w4a8": 4e-2, "mxfp4": 1.5e-2}
"""Scheme -> largest relative L2 error of the logits that passes. The reference computes in fp32 on the dequantized
weights; our experts have bf16 activations (int8 in gate and up for w4a8)."""

NOT_FINITE = "compare config.json (norm epsilon, RoPE parameters, scaling factors) with the published one"

PROBE_TOKENS = 16
_PROBE_CONTEXT = 32


@dataclass(frozen=True)
class Finding:
    """One line of the result."""

    name: str
    passed: bool
    found: str


@dataclass
class CheckResult:
    """What a check found."""

    options: ExportOptions
    findings: list[Finding] = field(default_factory=list)
    missing: list[MissingOperator] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """True if no finding prevents the export."""
        return all(finding.passed for finding in self.findings)

    def add(self, name: str, passed: bool, found: str) -> None:
        """Adds a line."""
        self.findings.append(Finding(name, passed, found))

    def table(self) -> Table:
        """The result for the terminal."""
        verdict = "no problem found" if self.passed else "cannot be exported"
        title = f"{self.options.model} for {self.options.target.name}: {verdict}"
        table = Table(title=escape(title), show_header=False, title_justify="left")
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for finding in self.findings:
            mark = "[green]ok[/green]" if finding.passed else "[red]fail[/red]"
            table.add_row(mark, finding.name, escape(finding.found))
        return table


def check_export(options: ExportOptions, console: Console | None = None) -> CheckResult:
    """Checks an export without making it.

    Args:
        options: of the export; `out` may be None.
        console: where the steps are shown.

    Raises:
        ValueError, NotImplementedError, FileNotFoundError: input that cannot be exported, as from `export_model`; or a
            synthetic model.
    """
    if is_synthetic(options.model):
        raise ValueError(f"--check is for models in folders, {options.model!r} has random weights: leave it out")
    result = CheckResult(options)
    folder = check_folder(options)
    tokenizer_json(folder)
    if needs_whole_model(options):
        check_loadable(folder)
    note(console, "reading headers")
    streamed = stream(options, folder)
    context = options.positions(streamed.model.config)
    check_checkpoint(result, streamed)
    note(console, "tracing prefill and decode")
    with torch.no_grad():
        programs = trace(result, streamed, context, options)
        if programs is not None and not options.target.is_cpu:
            note(console, "looking for operators without a kernel")
            check_operators(result, programs)
        del programs, streamed
        note(console, "comparing with the unmodified model")
        check_numerics(result, options, folder)
    return result


def note(console: Console | None, doing: str) -> None:
    """Shows the current step."""
    if console is not None:
        console.print(f"[dim]{doing}[/dim]", highlight=False)


def check_checkpoint(result: CheckResult, streamed: StreamedModel) -> None:
    """Adds what the headers say about files, tensors and experts."""
    tensors, layers = streamed.shards.tensors, streamed.layers
    stored = sum(tensor.nbytes for tensor in tensors.values())
    result.add("checkpoint", True, f"{len(tensors)} tensors in {len(streamed.shards.files)} files, {size(stored)}")
    for kind in dict.fromkeys(map(_kind, layers)):
        count = sum(_kind(layer) == kind for layer in layers)
        family, experts, top_k, hidden, intermediate, activation = kind
        found = f"{count} layers of {family}: E={experts}, top-{top_k}, H={hidden}, I={intermediate}, {activation}"
        result.add("experts", True, found)


def _kind(layer: LayerPlan) -> tuple[str, int, int, int, int, str]:
    """What distinguishes kinds of expert layers."""
    sizes = layer.num_experts, layer.top_k, layer.hidden_size, layer.intermediate_size
    return layer.family, *sizes, layer.layout.activation


def trace(
    result: CheckResult, streamed: StreamedModel, context: int, options: ExportOptions
) -> dict[str, ExportedProgram] | None:
    """Both methods, traced as by an export with the same options and fused; None if they cannot be traced."""
    load_prepared(streamed, options)
    try:
        module, traced = trace_methods(streamed.model, options, context)
    except Exception as error:  # whatever a layer raises under torch.export
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
        result.add("trace", False, f"{type(error).__name__}: {reason}")
        return None
    fuser = ExpertFuser(options.experts.fusion())
    programs = {name: fuser.fuse(program) for name, program in traced.items()}
    nodes = ", ".join(f"{name} {len(program.graph.nodes)} nodes" for name, program in programs.items())
    result.add("trace", True, f"{nodes}; prefill takes 1 to {context} tokens")
    ours = "executorch_moe.fused_experts.", "executorch_moe.one_token_experts."
    operators = ("triton.fused_moe",) if options.experts.implementation == "upstream" else ours
    counts = {
        name: sum(str(node.target).startswith(operators) for node in program.graph.nodes)
        for name, program in programs.items()
    }
    result.add(
        "fuse",
        all(count == len(streamed.layers) for count in counts.values()),
        ", ".join(f"{count} of {len(streamed.layers)} layers in {name}" for name, count in counts.items()),
    )
    stored = {
        name: stored_bytes(tensor) for name, tensor in (*module.model.named_parameters(), *module.model.named_buffers())
    }
    packed = sum(nbytes for name, nbytes in stored.items() if ".experts." in name)
    cache = sum(buffer.nbytes for buffer in module.kv_cache.buffers())
    others = sum(stored.values()) - packed
    result.add("weights", True, f"experts {size(packed)}, all else {size(others)}, KV cache {size(cache)}")
    return programs


def load_prepared(streamed: StreamedModel, options: ExportOptions) -> None:
    """Loads the model that an export traces, with shapes and dtypes of its weights but no values.

    Raises:
        ValueError: experts that upstream's operators do not support.
    """
    experts = options.experts
    if options.target.is_cpu:
        streamed.load_placeholders()
        prepare_(streamed.model, options)  # torchao's tensors are not made on the meta device
    else:
        streamed.load_placeholders(lambda model: prepare_(model, options))
    if experts.implementation != "upstream":
        return
    for layer in streamed.layers:
        check_upstream(layer.family)
        sizes = layer.num_experts, layer.hidden_size, layer.intermediate_size
        weights = placeholder_weights(*sizes, experts.group_size)
        parent, _, attribute = layer.name.rpartition(".")
        module = UpstreamMoE(weights, layer.top_k, experts.scheme, experts.group_size)
        setattr(streamed.model.get_submodule(parent), attribute, module)


def check_operators(result: CheckResult, programs: dict[str, ExportedProgram]) -> None:
    """Adds the operators of each method that the CUDA backend lacks."""
    for method, program in programs.items():
        missing = missing_operators(program)
        result.missing += missing
        for operator in dict.fromkeys(entry.operator for entry in missing):
            places = [entry for entry in missing if entry.operator == operator]
            more = f" and {len(places) - 1} more modules" if len(places) > 1 else ""
            result.add(f"operators, {method}", False, f"ExecuTorch's CUDA runtime has no kernel for {places[0]}{more}")
        if not missing:
            result.add(f"operators, {method}", True, "no missing operator predicted")


def check_numerics(result: CheckResult, options: ExportOptions, folder: Path) -> None:
    """Compares the first layers, exported and run on the CPU, with the unmodified model.

    The reference computes in fp32 on the dequantized weights.
    """
    fused, reference, layers, lines = probe_models(options, folder)
    for line in lines:
        result.add("stored weights", True, line)
    with chosen_experts(reference) as chosen:
        error = logits_error(fused, reference)
    if not math.isfinite(error):
        result.add("numerics", False, f"the logits of the first {layers} layers hold NaN or Inf: {NOT_FINITE}")
        return
    bound = BOUNDS[options.experts.scheme]
    covered, all_of_them = sum(len(ids) for ids, _ in chosen.values()), sum(count for _, count in chosen.values())
    found = (
        f"{error:.1e}, bound {bound:.1e} (relative L2 error of the logits of prefill and decode, first {layers} "
        f"layer{'s' if layers > 1 else ''}, {PROBE_TOKENS} tokens, which chose {covered} of {all_of_them} experts, "
        "fp32 on the dequantized weights)"
    )
    result.add("numerics", error <= bound, found)


@contextlib.contextmanager
def chosen_experts(model: nn.Module) -> Iterator[dict[str, tuple[set[int], int]]]:
    """Name of an experts module -> (experts that the tokens chose inside the context, number of all experts)."""
    chosen: dict[str, tuple[set[int], int]] = {}

    def watch(name: str, count: int) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            ids = next(tensor for tensor in tensors if not tensor.is_floating_point())
            chosen.setdefault(name, (set(), count))[0].update(ids.flatten().tolist())

        return before

    with contextlib.ExitStack() as hooks:
        for name, experts in find_experts(model):
            count = next(p.shape[0] for p in experts.parameters() if p.dim() == 3)
            handle = experts.register_forward_pre_hook(watch(name, count), with_kwargs=True)
            hooks.callback(handle.remove)
        yield chosen


def probe_models(options: ExportOptions, folder: Path) -> tuple[nn.Module, nn.Module, int, list[str]]:
    """The first layers in fp32 on the same weights: with fused experts, unmodified, and how many layers these are.

    The last part are the lines of `stored_weights` for these layers.

    There are as many layers as are needed to have one of each kind of expert layer and of attention.
    """
    attention = functools.partial(attention_of, Target("cpu", "fp32"))
    streamed = StreamedModel(folder, torch.float32, attention, options.experts.fusion())
    layers = _layers_for_all_kinds(streamed)
    later = tuple(f"{_layers_name(streamed.model)}.{i}" for i in range(layers, _num_layers(streamed.model)))
    records = streamed.load(skip=later)
    reference = meta_model(folder, torch.float32, "eager" if streamed.structure.sinks else "sdpa")
    names = reference.state_dict().keys()
    for name, tensor in streamed.model.state_dict(keep_vars=True).items():
        if name in names and not tensor.is_meta:
            set_weight(reference, name, tensor)
    streamed.plan.share_weights(reference)
    for layer in streamed.layers:
        experts: Any = streamed.model.get_submodule(layer.name)
        if hasattr(experts, "packed"):
            for name, value in dequantized(layer.layout, experts.packed()).items():
                set_weight(reference, f"{layer.name}.{name}", value)
    for model in (streamed.model, reference):
        model.config.num_hidden_layers = layers  # type: ignore[union-attr]
        del model.get_submodule(_layers_name(model))[layers:]  # type: ignore[operator]
    lines = stored_weights(streamed, records, options)
    return streamed.model, reference, layers, lines


def dequantized(layout: ExpertLayout, packed: PackedExperts) -> dict[str, Tensor]:
    """Packed weights as parameters of an experts module: name -> tensor in the module's own layout."""
    whole: dict[str, Tensor] = {}
    count = packed.num_experts
    # Some experts at a time: unpacking needs several times the memory of its result.
    for start in range(0, count, step := max(1, count // 16)):
        run = slice(start, start + step)
        tensors: dict[str, Any] = {name: None if t is None else t[run] for name, t in packed.tensors().items()}
        part = replace(packed, **tensors)
        for name, value in layout.stored(*unpack_experts(part), *_unpack_biases(part)).items():
            whole.setdefault(name, value.new_empty(count, *value.shape[1:]))[run] = value
    return whole


def _unpack_biases(packed: PackedExperts) -> tuple[Tensor | None, Tensor | None]:
    """Biases in the layout of `pack_experts`, [E, 2I] and [E, H]."""
    if packed.w13_bias is None or packed.w2_bias is None:
        return None, None
    halves = deinterleave_gate_up(packed.w13_bias).unflatten(1, (2, -1))[:, :, : packed.intermediate_size]
    return halves.flatten(1), packed.w2_bias[:, : packed.hidden_size]


def _layers_name(model: Any) -> str:
    """Name of the list of decoder layers."""
    return f"{model.base_model_prefix}.layers"


def _num_layers(model: nn.Module) -> int:
    return len(model.get_submodule(_layers_name(model)))  # type: ignore[arg-type]


def _layers_for_all_kinds(streamed: StreamedModel) -> int:
    """Number of decoder layers up to the first layer of the last kind of experts or attention."""
    prefix = _layers_name(streamed.model) + "."
    first: dict[object, int] = {}
    for layer in streamed.layers:
        number = int(layer.name.removeprefix(prefix).partition(".")[0])
        first.setdefault((layer.layout, _kind(layer)), number)
    config: Any = streamed.model.config
    for number, kind in enumerate(getattr(config, "layer_types", None) or ()):
        first.setdefault(kind, number)
    return max(first.values()) + 1


def logits_error(fused: nn.Module, reference: nn.Module) -> float:
    """Relative L2 error of the logits of all tokens: decode computes those of the last one, prefill all others."""
    vocabulary = fused.config.vocab_size  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (1, PROBE_TOKENS), generator=generator)
    positions = torch.arange(PROBE_TOKENS)
    programs = export_methods(_EveryToken(fused, _PROBE_CONTEXT))
    prefill = programs["prefill"].module()
    first: Tensor = prefill(ids[:, :-1], positions[:-1])
    decode: Any = programs["decode"].module()
    _copy_cache(prefill, decode)
    second: Tensor = decode(ids[:, -1:], positions[-1:])
    expected: Tensor = reference(input_ids=ids, use_cache=False).logits[0].float()
    return float((torch.cat([first, second]) - expected).norm() / expected.norm())


class _EveryToken(CausalLM):
    """`CausalLM` that returns the logits of every token: an expert that only early tokens choose changes no others."""

    def forward(self, input_ids: Tensor, cache_position: Tensor) -> Tensor:
        """fp32 [T, V]; arguments as for `CausalLM`."""
        return self.logits(input_ids, cache_position, 0)[0].float()


def _copy_cache(source: nn.Module, target: nn.Module) -> None:
    """Copies the KV cache: each program called from Python has its own, while runtimes share it by name."""
    caches = dict(source.named_buffers())
    for name, buffer in target.named_buffers():
        if "kv_cache" in name:
            buffer.copy_(caches[name])
