"""`export --check`: everything that can be known about an export without a GPU and without exporting.

Checkpoint and experts are checked, both methods are traced at full size without weights, operators that the CUDA
backend lacks are predicted, and the first layers are run with their weights against the unmodified model. Nothing is
written.
"""

from __future__ import annotations

import contextlib
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
from executorch_moe.export.models.pretrained import check_supported, tokenizer_json
from executorch_moe.export.models.upstream_experts import UpstreamMoE, placeholder_weights
from executorch_moe.export.quantize.dense_torchao import stored_bytes
from executorch_moe.kernels import PackedExperts
from executorch_moe.kernels.packing.experts import unpack_experts
from executorch_moe.kernels.packing.fragments import deinterleave_gate_up

from .build import attention_of, check_folder, check_upstream, needs_whole_model, prepare_, stream, trace_methods
from .options import ExportOptions

BOUNDS = {"bf16": 1.5e-2, "w4a16": 1.5e-2, "w4a8": 4e-2}
"""Largest relative L2 error of the logits that passes, by scheme. The reference is fp32 on the dequantized weights; our
experts take bf16 activations (int8 in gate and up for w4a8)."""

PROBE_TOKENS = 16
_PROBE_CONTEXT = 32


@dataclass(frozen=True)
class Finding:
    """One line of the result."""

    name: str
    passed: bool
    found: str


@dataclass
class Preflight:
    """What a check found."""

    options: ExportOptions
    findings: list[Finding] = field(default_factory=list)
    missing: list[MissingOperator] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """True if nothing was found that stands against the export."""
        return all(finding.passed for finding in self.findings)

    def add(self, name: str, passed: bool, found: str) -> None:
        """One line more."""
        self.findings.append(Finding(name, passed, found))

    def table(self) -> Table:
        """The result for the terminal."""
        verdict = "no problem found" if self.passed else "cannot be exported as it is"
        title = f"{self.options.model} for {self.options.resolved_target()}: {verdict}"
        table = Table(title=escape(title), show_header=False, title_justify="left")
        for _ in range(3):
            table.add_column(overflow="fold")
        for finding in self.findings:
            mark = "[green]ok[/green]" if finding.passed else "[red]fail[/red]"
            table.add_row(mark, finding.name, escape(finding.found))
        return table


def preflight(options: ExportOptions, console: Console | None = None) -> Preflight:
    """Checks an export without making it.

    Raises:
        ValueError, NotImplementedError, FileNotFoundError: input that cannot be exported, as from `export_model`.
    """
    result = Preflight(options)
    folder = check_folder(options)
    tokenizer_json(folder)
    if needs_whole_model(options):
        check_loadable(folder)
    note(console, "reading headers")
    streamed = stream(options, folder)
    context = options.context(streamed.model.config)
    check_checkpoint(result, streamed)
    note(console, "tracing prefill and decode")
    with torch.no_grad():
        programs = trace(result, streamed, context, options)
        if programs is not None and options.resolved_target() != "cpu":
            note(console, "looking for operators without a kernel")
            check_operators(result, programs)
        del programs, streamed
        note(console, "comparing with the unmodified model")
        check_numerics(result, options, folder)
    return result


def note(console: Console | None, doing: str) -> None:
    """What is done now, for whoever waits."""
    if console is not None:
        console.print(f"[dim]{doing}[/dim]", highlight=False)


def check_checkpoint(result: Preflight, streamed: StreamedModel) -> None:
    """What headers say: files, tensors, experts."""
    tensors, layers = streamed.shards.tensors, streamed.layers
    stored = sum(tensor.nbytes for tensor in tensors.values())
    result.add("checkpoint", True, f"{len(tensors)} tensors in {len(streamed.shards.files)} files, {size(stored)}")
    for kind in dict.fromkeys(map(_kind, layers)):
        count = sum(_kind(layer) == kind for layer in layers)
        family, experts, top_k, hidden, intermediate, activation = kind
        found = f"{count} layers of {family}: E={experts}, top-{top_k}, H={hidden}, I={intermediate}, {activation}"
        result.add("experts", True, found)


def _kind(layer: LayerPlan) -> tuple[str, int, int, int, int, str]:
    """What the layers of one kind have in common."""
    sizes = layer.num_experts, layer.top_k, layer.hidden_size, layer.intermediate_size
    return layer.family, *sizes, layer.layout.activation


def trace(
    result: Preflight, streamed: StreamedModel, context: int, options: ExportOptions
) -> dict[str, ExportedProgram] | None:
    """Both methods as an export for the same options traces them, fused; None if they cannot be traced."""
    load_prepared(streamed, options)
    try:
        module, traced = trace_methods(streamed.model, options, context)
    except Exception as error:  # whatever a layer raises under torch.export
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
        result.add("trace", False, f"{type(error).__name__}: {reason}")
        return None
    fuser = ExpertFuser(options.fusion())
    programs = {name: fuser.fuse(program) for name, program in traced.items()}
    nodes = ", ".join(f"{name} {len(program.graph.nodes)} nodes" for name, program in programs.items())
    result.add("trace", True, f"{nodes}; prefill takes 2 to {context} tokens")
    operator = "triton.fused_moe" if options.experts == "upstream" else "executorch_moe.fused_experts."
    counts = {
        name: sum(str(node.target).startswith(operator) for node in program.graph.nodes)
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
    """The model that an export traces, without the values of its weights.

    Raises:
        ValueError: experts that upstream's operators do not compute.
    """
    if options.resolved_target() == "cpu":
        streamed.load_placeholders()
        prepare_(streamed.model, options)  # torchao's tensors are not made on the meta device
    else:
        streamed.load_placeholders(lambda model: prepare_(model, options))
    if options.experts != "upstream":
        return
    for layer in streamed.layers:
        check_upstream(layer.family)
        sizes = layer.num_experts, layer.hidden_size, layer.intermediate_size
        weights = placeholder_weights(*sizes, options.group_size)
        parent, _, attribute = layer.name.rpartition(".")
        experts = UpstreamMoE(weights, layer.top_k, options.scheme, options.group_size)
        setattr(streamed.model.get_submodule(parent), attribute, experts)


def check_operators(result: Preflight, programs: dict[str, ExportedProgram]) -> None:
    """Operators that the CUDA backend would refuse, in any method."""
    for method, program in programs.items():
        missing = missing_operators(program)
        result.missing += missing
        for operator in dict.fromkeys(entry.operator for entry in missing):
            places = [entry for entry in missing if entry.operator == operator]
            more = f" and {len(places) - 1} more modules" if len(places) > 1 else ""
            result.add(f"operators, {method}", False, f"ExecuTorch's CUDA runtime has no kernel for {places[0]}{more}")
        if not missing:
            result.add(f"operators, {method}", True, "none is missing, as far as can be predicted")


def check_numerics(result: Preflight, options: ExportOptions, folder: Path) -> None:
    """The first layers, exported, on the CPU against the unmodified model in fp32 on the dequantized weights."""
    fused, reference, layers = probe_models(options, folder)
    with chosen_experts(reference) as chosen:
        error = logits_error(fused, reference)
    bound = BOUNDS[options.scheme]
    covered, all_of_them = sum(len(ids) for ids, _ in chosen.values()), sum(count for _, count in chosen.values())
    found = (
        f"{error:.1e}, bound {bound:.1e} (relative L2 error of the logits of prefill and decode, first {layers} "
        f"layer{'s' if layers > 1 else ''}, {PROBE_TOKENS} tokens, which chose {covered} of {all_of_them} experts, "
        "fp32 on the dequantized weights)"
    )
    result.add("numerics", error <= bound, found)


@contextlib.contextmanager
def chosen_experts(model: nn.Module) -> Iterator[dict[str, tuple[set[int], int]]]:
    """Experts module -> those that a model's tokens choose within it, and how many there are."""
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


def probe_models(options: ExportOptions, folder: Path) -> tuple[nn.Module, nn.Module, int]:
    """The first layers with fused experts and unmodified, in fp32, on the same weights; and how many they are.

    As many layers as it takes to have one of each kind of expert layer.
    """
    attention = attention_of("cpu", "fp32", check_supported(folder)["model_type"])
    streamed = StreamedModel(folder, torch.float32, attention, options.fusion())
    layers = _layers_for_all_kinds(streamed)
    later = tuple(f"{_layers_name(streamed.model)}.{i}" for i in range(layers, _num_layers(streamed.model)))
    streamed.load(skip=later)
    reference = meta_model(folder, torch.float32, attention)
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
    return streamed.model, reference, layers


def dequantized(layout: ExpertLayout, packed: PackedExperts) -> dict[str, Tensor]:
    """Parameters of an experts module, by name and stored as it stores them, from packed weights."""
    whole: dict[str, Tensor] = {}
    count = packed.num_experts
    # In runs: unpacking takes several times the memory of its result.
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
    """Decoder layers up to the first of the last kind of experts."""
    prefix = _layers_name(streamed.model) + "."
    first: dict[object, int] = {}
    for layer in streamed.layers:
        number = int(layer.name.removeprefix(prefix).partition(".")[0])
        first.setdefault((layer.layout, _kind(layer)), number)
    return max(first.values()) + 1


def logits_error(fused: nn.Module, reference: nn.Module) -> float:
    """Relative L2 error of the exported methods' logits after each token: the last by decode, the others by prefill."""
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
    """`CausalLM` with the logits after every token: an expert that only early ones choose shows in no other."""

    def forward(self, input_ids: Tensor, cache_position: Tensor) -> Tensor:
        """fp32 [T, V]; arguments as for `CausalLM`."""
        return self.logits(input_ids, cache_position, 0)[0].float()


def _copy_cache(source: nn.Module, target: nn.Module) -> None:
    """Each program called from Python has its own cache; runtimes share it by name."""
    caches = dict(source.named_buffers())
    for name, buffer in target.named_buffers():
        if "kv_cache" in name:
            buffer.copy_(caches[name])
