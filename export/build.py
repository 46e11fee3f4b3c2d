"""The model that an export's options name, computed as its target wants it: loaded, streamed, or made on the spot."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from executorch_moe.backends.artifact.ptd import MakeWeights
from executorch_moe.backends.fusion import FusedLayer, FusionReport
from executorch_moe.backends.fusion.modules import find_experts
from executorch_moe.export.checkpoint.streaming import StreamedModel
from executorch_moe.export.checkpoint.whole import load_model
from executorch_moe.export.models import attention, synthetic
from executorch_moe.export.models.causal_lm import BY_OUTPUT, CausalLM, export_methods
from executorch_moe.export.models.decoder_layer import replace_decoder_layers_
from executorch_moe.export.models.pretrained import (
    TINY,
    WITH_LATENTS,
    WITH_SINKS,
    check_supported,
    require_transformers,
    resolve,
)
from executorch_moe.export.models.router import replace_routers_
from executorch_moe.export.models.upstream_experts import UpstreamMoE, pack, random_weights
from executorch_moe.export.quantize import dense_torchao
from executorch_moe.export.quantize.dense import check_widths, quantize_dense_
from executorch_moe.kernels import FusedExperts
from executorch_moe.kernels.experts.plan import Options
from executorch_moe.kernels.op import forced
from executorch_moe.kernels.shapes import LayerShape

from .options import DTYPES, ExportOptions


def check_folder(options: ExportOptions) -> Path:
    """The model's folder, if its kind of model is supported; of a synthetic model, that of the tokenizer it borrows.

    Raises:
        ValueError, NotImplementedError, FileNotFoundError: see `resolve` and `check_supported`.
        RuntimeError: see `require_transformers`.
    """
    require_transformers()
    folder = resolve(TINY if synthetic.is_synthetic(options.model) else options.model)
    check_supported(folder)
    return folder


def precision(options: ExportOptions, folder: Path) -> tuple[torch.dtype, str]:
    """Type of everything but the experts, and an attention (transformers' name) that the target has in it."""
    dtype = options.resolved_dtype()
    return DTYPES[dtype], attention_of(options.resolved_target(), dtype, check_supported(folder)["model_type"])


def stream(options: ExportOptions, folder: Path) -> StreamedModel:
    """The model, to be loaded with packed experts; reads headers only.

    Raises:
        ValueError, NotImplementedError, FileNotFoundError: see `StreamedModel` and `check_dense`.
    """
    streamed = StreamedModel(folder, *precision(options, folder), options.fusion())
    check_dense(streamed.model, options, options.resolved_target())
    return streamed


def load_whole(options: ExportOptions, folder: Path) -> nn.Module:
    """The model in memory, with its experts unpacked; those of a synthetic model are packed.

    Raises:
        ValueError: see `load_model` and `synthetic.build`.
    """
    if synthetic.is_synthetic(options.model):
        return build_synthetic(options, options.resolved_target(), options.resolved_dtype())
    return streamline(load_model(folder, *precision(options, folder)))


def streamline(model: nn.Module) -> nn.Module:
    """The same model, changed in place to what its target can do in fewer kernels."""
    config: Any = model.config
    return streamline_(model) if config._attn_implementation == attention.NAME else model


def prepare_(model: nn.Module, options: ExportOptions) -> None:
    """Replaces, in place, every part of a model except its experts by what the target runs. Idempotent.

    Raises:
        ValueError: layers whose width does not fit.
    """
    streamline(model)
    if not options.leaves_dense:
        quantize_dense(model, options, options.resolved_target())


def trace_methods(
    model: nn.Module, options: ExportOptions, max_context: int
) -> tuple[CausalLM, dict[str, ExportedProgram]]:
    """A model that `prepare_` changed, with its cache, and the methods that an export lowers.

    Raises:
        ValueError, NotImplementedError: see `causal_lm.check_context`.
    """
    module = BY_OUTPUT[options.output](model, max_context)
    return module, export_methods(module, one_token_linears=options.resolved_target() != "cpu")


def needs_whole_model(options: ExportOptions) -> bool:
    """True for what cannot be packed layer by layer from a folder: synthetic models and upstream's experts."""
    return synthetic.is_synthetic(options.model) or options.experts == "upstream"


def load_packed(options: ExportOptions, folder: Path, report: FusionReport) -> nn.Module:
    """`load_whole` with upstream's experts in the place of the model's, or a synthetic model; its layers in `report`.

    Raises:
        ValueError: see `load_whole` and `use_upstream_`.
    """
    model = load_whole(options, folder)
    before = {
        name: (type(module).__name__, sum(p.nbytes for p in module.parameters()))
        for name, module in find_experts(model)
    }
    if not synthetic.is_synthetic(options.model):
        check_dense(model, options, options.resolved_target())
        use_upstream_(model, options.scheme, options.group_size)
    config: Any = model.config
    for name, module in model.named_modules():
        if isinstance(module, (FusedExperts, UpstreamMoE)):
            as_bf16 = 2 * 3 * module.num_experts * module.hidden_size * module.intermediate_size
            family, bytes_before = before.get(name, ("synthetic", as_bf16))
            report.add(
                FusedLayer.of(
                    f"model.{name}",  # as it is named in the exported program
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


def attention_of(target: str, dtype: str, model_type: str = "") -> str:
    """transformers' `attn_implementation` for a target, "cpu" or any GPU."""
    if model_type in WITH_SINKS:  # which transformers has in plain PyTorch only
        return "eager"
    if target == "cpu":
        return "sdpa"
    # ExecuTorch's Triton attention for CUDA writes bf16 whatever it is given, and takes keys and values of one width.
    return "eager" if dtype == "fp32" or model_type in WITH_LATENTS else attention.register()


def streamline_(module: nn.Module) -> nn.Module:
    """Replaces, in place, parts of a Qwen3-MoE model or layer by ones that need fewer kernels on CUDA; others stay."""
    return replace_decoder_layers_(replace_routers_(attention.merge_attention_(module)))


def build_synthetic(
    options: ExportOptions, target: str, dtype: str, device: synthetic.Device | None = None
) -> nn.Module:
    """The synthetic model that the options name, packed, its dense layers quantized one by one.

    Args:
        options: of the export; `target` and `dtype` are those of them with "auto" decided.
        device: where weights are made; None: on the CPU, or nowhere if the artifact is to have none.

    Raises:
        ValueError: see `synthetic.parse` and `synthetic.build`.
    """
    implementation = attention_of(target, dtype)

    def upstream(shape: LayerShape, scheme: str, device: synthetic.Device, generator: torch.Generator) -> nn.Module:
        return UpstreamMoE(random_weights(shape, str(device), generator), shape.top_k, scheme, shape.group_size)

    def prepare(part: nn.Module) -> None:
        if implementation == attention.NAME:
            streamline_(part)
        quantize_dense(part, options, target)

    return synthetic.build(
        synthetic.parse(options.model, options.layers),
        options.scheme,
        options.group_size,
        seed=options.seed,
        dtype=DTYPES[dtype],
        attention=implementation,
        device=device or ("meta" if options.thin else "cpu"),
        make_experts=upstream if options.experts == "upstream" else None,
        prepare=prepare,
    )


def check_dense(module: nn.Module, options: ExportOptions, target: str) -> None:
    """Check, before anything is packed, that `quantize_dense` will find layers that fit; reads shapes only.

    Raises:
        ValueError: layers whose width does not fit.
    """
    if target == "cpu":
        dense_torchao.check_widths(module, options.dense)
        return
    check_widths(module, options.dense, options.group_size, lm_head=options.lm_head)


def quantize_dense(module: nn.Module, options: ExportOptions, target: str) -> None:
    """Quantizes, in place, linear layers and embedding as the options say: torchao's tensors on the CPU, else `dense`.

    Raises:
        ValueError: layers whose width does not fit.
    """
    if target == "cpu":
        dense_torchao.quantize_dense_(module, options.dense)
        return
    quantize_dense_(module, options.dense, options.group_size, lm_head=options.lm_head, embedding=options.embedding)


@torch.no_grad()
def use_upstream_(model: nn.Module, scheme: str, group_size: int) -> nn.Module:
    """Replaces every experts module by `UpstreamMoE`, with the codes that our packing has.

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
    """Check that upstream's operators compute what an experts class does.

    Raises:
        ValueError: another layout than Qwen3-MoE's.
    """
    if family != "Qwen3MoeExperts":
        raise ValueError(f"experts='upstream' is not for {family}: use a Qwen3-MoE model")


def made_again(options: ExportOptions, device: torch.device) -> MakeWeights:
    """What makes the weights of an artifact that was exported with `thin`; the cache starts at zero.

    All of them are made at once, on the first call.

    Args:
        options: those of the export, as `metadata.made_from` kept them, with `dtype` decided.
        device: where weights are made, and where the program will run.
    """
    made: dict[str, torch.Tensor] = {}

    def make(name: str, nbytes: int) -> torch.Tensor | None:
        if name.startswith("kv_cache."):
            return torch.zeros(nbytes, dtype=torch.uint8, device=device)
        if not made:
            made.update(build_synthetic(options, "cuda", options.dtype, device).state_dict())
        tensor = made.get(name.removeprefix("model."))
        return None if tensor is None else tensor.detach().contiguous().flatten().view(torch.uint8)

    return make


def forced_schedule(experts: str) -> AbstractContextManager[None]:
    """Round lowering: the schedule that `experts` names."""
    return forced(Options(persistent=False)) if experts == "ours-tile" else contextlib.nullcontext()
