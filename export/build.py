"""Builds the model that an export's options name: loaded, streamed from a folder, or made of random weights."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from executorch_moe.backends.artifact.method_targets import cpu_method
from executorch_moe.backends.artifact.ptd import MakeWeights
from executorch_moe.backends.fusion import FusedLayer, FusionReport
from executorch_moe.backends.fusion.modules import find_experts
from executorch_moe.export.checkpoint import stored_codes
from executorch_moe.export.checkpoint.formats import check_format
from executorch_moe.export.checkpoint.gguf import find_folder
from executorch_moe.export.checkpoint.streaming import StreamedModel
from executorch_moe.export.checkpoint.structure import Structure, structure_of
from executorch_moe.export.checkpoint.whole import load_model
from executorch_moe.export.models import attention, synthetic
from executorch_moe.export.models.batch.methods import BatchedLM, export_batched
from executorch_moe.export.models.batch.sampling import sorted_nucleus_rows
from executorch_moe.export.models.causal_lm import (
    BY_OUTPUT,
    CausalLM,
    SamplingLM,
    check_kinds,
    export_methods,
    export_prefill,
)
from executorch_moe.export.models.decoder_layer import replace_decoder_layers_
from executorch_moe.export.models.delta_rule import replace_delta_rule_
from executorch_moe.export.models.pretrained import TINY, check_supported, layer_kinds, require_transformers
from executorch_moe.export.models.router import replace_routers_
from executorch_moe.export.models.sampling import sorted_nucleus
from executorch_moe.export.models.upstream_experts import UpstreamMoE, pack, random_weights
from executorch_moe.export.quantize import dense_torchao
from executorch_moe.export.quantize.dense import check_widths, quantize_dense_
from executorch_moe.kernels import FusedExperts
from executorch_moe.kernels.experts.plan import Options
from executorch_moe.kernels.op import forced
from executorch_moe.kernels.shapes import LayerShape

from .options import Experts, ExportOptions, Target


def check_folder(options: ExportOptions) -> Path:
    """The model's folder, checked to be a supported model; for a synthetic model, the folder of the tiny model, whose
    tokenizer it uses.

    Raises:
        ValueError, NotImplementedError, FileNotFoundError: see `find_folder`, `check_supported`, `check_activation`,
            `check_kinds` and `check_format`.
        RuntimeError: see `require_transformers`.
    """
    require_transformers()
    folder = find_folder(TINY if synthetic.is_synthetic(options.model) else options.model)
    config = check_supported(folder)
    check_activation(config, folder / "config.json")
    check_kinds(layer_kinds(folder, config))
    check_format(folder)
    return folder


def usual_scheme(model: str) -> str:
    """The scheme for a model for which none is given: mxfp4 if its experts are stored in MXFP4, else w4a16."""
    if synthetic.is_synthetic(model):
        return "w4a16"
    try:
        return stored_codes.usual_scheme(find_folder(model))
    except (ValueError, OSError, NotImplementedError, RuntimeError):  # the export reports it
        return "w4a16"


def check_activation(config: Mapping[str, Any], where: Path) -> None:
    """Check that transformers knows the activation of a config.json.

    Raises:
        ValueError: it does not.
    """
    from transformers.activations import ACT2FN

    name = config.get("hidden_act")
    if name is not None and name not in ACT2FN:
        raise ValueError(
            f"hidden_act={name!r} in {where} is no activation of transformers: put the name there that the model was "
            "published with, for example 'silu'"
        )


def stream(options: ExportOptions, folder: Path) -> StreamedModel:
    """The plan to load the model with packed experts; reads headers only.

    Raises:
        ValueError, NotImplementedError, FileNotFoundError: see `StreamedModel` and `check_dense`.
    """
    attention = functools.partial(attention_of, options.target)
    streamed = StreamedModel(folder, options.target.torch_dtype, attention, options.experts.fusion())
    check_dense(streamed.model, options)
    return streamed


def load_whole(options: ExportOptions, folder: Path) -> nn.Module:
    """The model in memory. Its experts are unpacked, those of a synthetic model packed.

    Raises:
        ValueError: see `load_model` and `synthetic.build`. NotImplementedError: see `structure_of`.
    """
    if synthetic.is_synthetic(options.model):
        return build_synthetic(options)
    model: Any = load_model(folder, options.target.torch_dtype, "eager")
    model.set_attn_implementation(attention_of(options.target, structure_of(model)))
    return streamline(model)


def streamline(model: nn.Module) -> nn.Module:
    """The same model, changed in place: gated delta rule layers can be traced, and it needs fewer kernels where its
    target allows it."""
    config: Any = model.config
    replace_delta_rule_(model)
    return streamline_(model) if config._attn_implementation == attention.NAME else model


def prepare_(model: nn.Module, options: ExportOptions) -> None:
    """Replaces, in place, every part of a model except its experts by the modules for its target. Idempotent.

    Raises:
        ValueError: layers whose width does not fit.
    """
    streamline(model)
    if not options.dense.unchanged:
        quantize_dense(model, options)


def trace_methods(
    model: nn.Module, options: ExportOptions, max_context: int
) -> tuple[CausalLM, dict[str, ExportedProgram]]:
    """A model that `prepare_` changed, with its KV cache, and the methods that an export lowers.

    With `max_batch` above 1 they are those of `batch.methods`. Else those for the CPU are `prefill@cpu`, `decode@cpu`
    and `forward`, which is for ExecuTorch's `TextLLMRunner`: tokens and positions -> logits. That runner shares the KV
    cache of two methods only if a delegate holds it. It uses one method for prompt and tokens if the program has none
    of the plain name `decode`.

    Raises:
        ValueError, NotImplementedError: see `causal_lm.check_context`.
    """
    if options.context.max_batch > 1:
        return _trace_batched(model, options, max_context)
    module = BY_OUTPUT[options.context.output](model, max_context)
    if not options.target.is_cpu:
        return module, export_methods(module, one_token_linears=True)
    if isinstance(module, SamplingLM):
        module.find_nucleus = sorted_nucleus
    methods = {cpu_method(name): program for name, program in export_methods(module).items()}
    if options.context.output == "logits":
        methods["forward"] = methods.pop(cpu_method("prefill"))
    else:
        methods["forward"] = export_prefill(CausalLM(model, max_context))
    return module, methods


def _trace_batched(
    model: nn.Module, options: ExportOptions, max_context: int
) -> tuple[CausalLM, dict[str, ExportedProgram]]:
    """`trace_methods` for several sequences. None of the methods is for ExecuTorch's runners, which know no slots."""
    module = BatchedLM(model, max_context, options.context.max_batch, options.context.output)
    if not options.target.is_cpu:
        return module, export_batched(module, one_token_linears=True)
    module.find_nucleus, module.find_nucleus_rows = sorted_nucleus, sorted_nucleus_rows
    return module, {cpu_method(name): program for name, program in export_batched(module).items()}


def needs_whole_model(options: ExportOptions) -> bool:
    """True for models that are not packed layer by layer from a folder: synthetic ones, and upstream's experts."""
    return synthetic.is_synthetic(options.model) or options.experts.implementation == "upstream"


def load_packed(options: ExportOptions, folder: Path, report: FusionReport) -> nn.Module:
    """`load_whole` with packed experts: upstream's in place of the model's own, or a synthetic model.

    Its layers are added to `report`.

    Raises:
        ValueError: see `load_whole` and `use_upstream_`.
    """
    model = load_whole(options, folder)
    before = {
        name: (type(module).__name__, sum(p.nbytes for p in module.parameters()))
        for name, module in find_experts(model)
    }
    if not synthetic.is_synthetic(options.model):
        check_dense(model, options)
        use_upstream_(model, options.experts.scheme, options.experts.group_size)
    config: Any = model.config
    for name, module in model.named_modules():
        if isinstance(module, (FusedExperts, UpstreamMoE)):
            as_bf16 = 2 * 3 * module.num_experts * module.hidden_size * module.intermediate_size
            family, bytes_before = before.get(name, ("synthetic", as_bf16))
            report.add(
                FusedLayer.of(
                    f"model.{name}",  # its name in the exported program
                    family,
                    module,
                    top_k=config.num_experts_per_tok,
                    activation=module.activation,
                    algorithm="minmax",
                    bytes_before=bytes_before,
                    bytes_after=module.packed().nbytes(),
                )
            )
    return model


def attention_of(target: Target, structure: Structure | None = None) -> str:
    """transformers' `attn_implementation` for a resolved target and what a model asks of its attention.

    Without a structure, it is that of a model without sinks or latent attention.
    """
    if structure is not None and structure.sinks:  # transformers implements sinks in plain PyTorch only
        return "eager"
    if target.is_cpu:
        return attention.register(attention.CPU_NAME)
    # ExecuTorch's Triton attention for CUDA always writes bf16, and needs keys and values of the same width.
    latents = structure is not None and structure.latents
    return "eager" if target.dtype == "fp32" or latents else attention.register()


def streamline_(module: nn.Module) -> nn.Module:
    """Replaces, in place, parts of a Qwen3 model or layer by parts that need fewer kernels on CUDA.

    Models of other families are not changed.
    """
    return replace_decoder_layers_(replace_routers_(attention.merge_attention_(replace_delta_rule_(module))))


def build_synthetic(options: ExportOptions, device: synthetic.Device | None = None) -> nn.Module:
    """The synthetic model that the options name, with packed experts; its dense layers are quantized one by one.

    Args:
        device: where weights are made; None: on the CPU, or nowhere ("meta") for placeholder weights.

    Raises:
        ValueError: see `synthetic.parse` and `synthetic.build`.
    """
    experts, implementation = options.experts, attention_of(options.target)

    def upstream(shape: LayerShape, scheme: str, device: synthetic.Device, generator: torch.Generator) -> nn.Module:
        return UpstreamMoE(random_weights(shape, str(device), generator), shape.top_k, scheme, shape.group_size)

    def prepare(part: nn.Module) -> None:
        replace_delta_rule_(part)
        if implementation == attention.NAME:
            streamline_(part)
        quantize_dense(part, options)

    return synthetic.build(
        synthetic.parse(options.model, options.layers),
        experts.scheme,
        experts.group_size,
        seed=options.seed,
        dtype=options.target.torch_dtype,
        attention=implementation,
        device=device or ("meta" if options.placeholder_weights else "cpu"),
        make_experts=upstream if experts.implementation == "upstream" else None,
        prepare=prepare,
    )


def check_dense(module: nn.Module, options: ExportOptions) -> None:
    """Check, before anything is packed, that `quantize_dense` can quantize every layer; reads shapes only.

    Raises:
        ValueError: a layer whose width does not fit.
    """
    dense = options.dense
    if options.target.is_cpu:
        dense_torchao.check_widths(module, dense.linears)
        return
    check_widths(module, dense.linears, options.experts.group_size, lm_head=dense.lm_head)


def quantize_dense(module: nn.Module, options: ExportOptions) -> None:
    """Quantizes, in place, linear layers and embedding: to torchao's tensors on the CPU, else to modules of `dense`.

    Raises:
        ValueError: a layer whose width does not fit.
    """
    dense = options.dense
    if options.target.is_cpu:
        dense_torchao.quantize_dense_(module, dense.linears)
        return
    group_size = options.experts.group_size
    quantize_dense_(module, dense.linears, group_size, lm_head=dense.lm_head, embedding=dense.embedding)


@torch.no_grad()
def use_upstream_(model: nn.Module, scheme: str, group_size: int) -> nn.Module:
    """Replaces, in place, every experts module by `UpstreamMoE` with the same 4-bit codes as our packing.

    Raises:
        ValueError: experts of another layout than Qwen3-MoE's, or a group size that does not fit.
    """
    config: Any = model.config
    for name, module in list(find_experts(model)):
        check_upstream(type(module).__name__)
        experts: Any = module
        try:
            weights = pack(experts.gate_up_proj, experts.down_proj, group_size)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        parent, _, attribute = name.rpartition(".")
        replacement = UpstreamMoE(weights, config.num_experts_per_tok, scheme, group_size)
        setattr(model.get_submodule(parent), attribute, replacement)
    return model


def check_upstream(family: str) -> None:
    """Check that upstream's operators compute the same function as an experts class.

    Raises:
        ValueError: another layout than Qwen3-MoE's.
    """
    if family != "Qwen3MoeExperts":
        raise ValueError(f"experts='upstream' does not support {family}: use a Qwen3-MoE model")


def made_again(options: ExportOptions, device: torch.device) -> MakeWeights:
    """A function that makes the weights of an artifact with placeholder weights; the KV cache starts at zero.

    The first call makes all of them.

    Args:
        options: those of the export, from `metadata.read_made_from`.
        device: where weights are made, and where the program will run.
    """
    made: dict[str, torch.Tensor] = {}

    def make(name: str, nbytes: int) -> torch.Tensor | None:
        if name.startswith("kv_cache."):
            return torch.zeros(nbytes, dtype=torch.uint8, device=device)
        if not made:
            made.update(build_synthetic(options, device).state_dict())
        tensor = made.get(name.removeprefix("model."))
        return None if tensor is None else tensor.detach().contiguous().flatten().view(torch.uint8)

    return make


def forced_schedule(experts: Experts) -> AbstractContextManager[None]:
    """Context in which lowering uses the schedule of the experts' implementation."""
    if experts.implementation == "ours-tile":
        return forced(Options(persistent=False))
    return contextlib.nullcontext()
