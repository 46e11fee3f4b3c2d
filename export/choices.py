"""Options of an export that change what is computed: which experts, how dense layers are stored, what comes out."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from executorch_moe.backends.cuda.placeholders import MakeWeights
from executorch_moe.backends.fusion.modules import find_experts
from executorch_moe.kernels.benchmark import Shape
from executorch_moe.kernels.op import forced
from executorch_moe.kernels.plan import Options

from . import attention, dense_torchao, synthetic
from .decoder_layer import streamline_layers_
from .dense import KINDS, quantize_dense_
from .router import replace_routers_
from .upstream_experts import PREFILL, UpstreamMoE, pack, random_weights

EXPERTS = ("ours", "ours-tile", "upstream")
OUTPUTS = ("token", "greedy", "logits")


def check_choices(options: Any, target: str) -> None:
    """Check the choices of `pipeline.ExportOptions` against each other; `target` is the resolved one.

    Raises:
        ValueError: an unknown choice, or one that the target, the scheme or the model does not have.
    """
    for what, value, known in (
        ("output", options.output, OUTPUTS),
        ("experts", options.experts, EXPERTS),
        ("dense", options.dense, KINDS),
        ("lm_head", options.lm_head, (*KINDS, None)),
        ("embedding", options.embedding, KINDS[:2]),
    ):
        if value not in known:
            raise ValueError(f"{what}={value!r} is unknown: use one of {', '.join(filter(None, known))}")
    if synthetic.is_synthetic(options.model):
        synthetic.parse(options.model, options.layers)
    elif options.layers is not None:
        raise ValueError(
            f"layers={options.layers} is for synthetic models, {options.model!r} has its own: leave it out, "
            f"or use {synthetic.PREFIX}{next(iter(synthetic.PRESETS))}"
        )
    if target == "cpu":
        for what, usual in (("experts", "ours"), ("lm_head", None), ("embedding", "none")):
            if (value := getattr(options, what)) != usual:
                raise ValueError(f"{what}={value!r} is for CUDA targets: name a GPU as target='sm_90', or leave it out")
    if options.check and synthetic.is_synthetic(options.model):
        raise ValueError(f"check=True is for models in folders, {options.model!r} is made on the spot: leave it out")
    if options.experts == "upstream" and options.algorithm != "minmax":
        raise ValueError(f"experts='upstream' has no algorithm={options.algorithm!r}: use minmax")
    if options.thin and (target == "cpu" or not synthetic.is_synthetic(options.model)):
        raise ValueError(
            f"thin=True is for synthetic models and CUDA targets, not for {options.model!r} on {target}: leave it out"
        )
    if options.experts == "upstream" and options.scheme not in PREFILL:
        raise ValueError(f"experts='upstream' has no scheme={options.scheme!r}: use one of {', '.join(PREFILL)}")


def attention_of(target: str, dtype: str) -> str:
    """transformers' `attn_implementation` for a target, "cpu" or any GPU."""
    if target == "cpu":
        return "sdpa"
    # ExecuTorch's Triton attention for CUDA writes bf16 whatever it is given.
    return "eager" if dtype == "fp32" else attention.register()


def streamline_(module: nn.Module) -> nn.Module:
    """Replaces, in place, parts of a Qwen3-MoE model or layer by ones that need fewer kernels on CUDA; others stay."""
    return streamline_layers_(replace_routers_(attention.merge_attention_(module)))


def build_synthetic(
    options: Any, dtype: torch.dtype, implementation: str, device: synthetic.Device | None = None
) -> nn.Module:
    """The synthetic model that the options name, packed, its dense layers quantised one by one.

    `device`: where weights are made; None: on the CPU, or nowhere if the artifact is to have none.
    """

    def upstream(shape: Shape, scheme: str, device: synthetic.Device, generator: torch.Generator) -> nn.Module:
        return UpstreamMoE(random_weights(shape, str(device), generator), shape.top_k, scheme, shape.group_size)

    def prepare(part: nn.Module) -> None:
        if implementation == attention.NAME:
            streamline_(part)
        quantize_dense(part, options)

    return synthetic.build(
        synthetic.parse(options.model, options.layers),
        options.scheme,
        options.group_size,
        seed=options.seed,
        dtype=dtype,
        attention=implementation,
        device=device or ("meta" if options.thin else "cpu"),
        make_experts=upstream if options.experts == "upstream" else None,
        prepare=prepare,
    )


def quantize_dense(module: nn.Module, options: Any) -> None:
    """Quantises linear layers and embedding as the options say: torchao's tensors on the CPU, `dense` on CUDA."""
    if options.resolved_target() == "cpu":
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
        if type(module).__name__ != "Qwen3MoeExperts":
            raise ValueError(f"experts='upstream' is not for {type(module).__name__}: use a Qwen3-MoE model")
        experts: Any = module
        try:
            weights = pack(experts.gate_up_proj, experts.down_proj, group_size)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        parent, _, attribute = name.rpartition(".")
        replacement = UpstreamMoE(weights, config.num_experts_per_tok, scheme, group_size)
        setattr(model.get_submodule(parent), attribute, replacement)
    return model


def made_again(options: Any, dtype: torch.dtype, device: torch.device) -> MakeWeights:
    """What makes the weights of an artifact that was exported with `thin`; the cache starts at zero.

    `options` are those of the export, with `dtype` decided.

    All of them are made at once, on the first call.
    """
    made: dict[str, torch.Tensor] = {}

    def make(name: str, nbytes: int) -> torch.Tensor | None:
        if name.startswith("kv_cache."):
            return torch.zeros(nbytes, dtype=torch.uint8, device=device)
        if not made:
            implementation = attention_of("cuda", options.dtype)
            made.update(build_synthetic(options, dtype, implementation, device).state_dict())
        tensor = made.get(name.removeprefix("model."))
        return None if tensor is None else tensor.detach().contiguous().flatten().view(torch.uint8)

    return make


def forced_schedule(experts: str) -> AbstractContextManager[None]:
    """Round lowering: the schedule that `experts` names."""
    return forced(Options(persistent=False)) if experts == "ours-tile" else contextlib.nullcontext()
