"""Replaces the experts modules of an eager model by fused experts on packed weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from executorch_moe.backends.fusion.modules import find_experts, pack_layer, recognize_module
from executorch_moe.backends.fusion.regions import NotFusable
from executorch_moe.backends.versions import check_versions
from executorch_moe.kernels import FusedExperts, PackedExperts
from executorch_moe.kernels.packing.rounding import check_algorithm
from executorch_moe.kernels.schemes import get_scheme

from .int4_tensors import is_quantized, pack_executorch_experts, pack_quantized


class ExecutorchExperts(FusedExperts):
    """Fused experts with the `forward` signature of `FusedMoEExperts` in ExecuTorch's models."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, top_k: int
    ) -> Tensor:
        """hidden_states [T, H], topk_weights and topk_ids [T, top_k] -> [T, H].

        Raises:
            ValueError: topk_ids has a width other than `top_k`.
        """
        if topk_ids.shape[1] != top_k:
            raise ValueError(f"topk_ids has {topk_ids.shape[1]} columns, but top_k={top_k}: pass [T, top_k]")
        return super().forward(hidden_states, topk_ids, topk_weights)


def quantize_experts_(
    model: nn.Module, scheme: str = "w4a16", group_size: int = 32, algorithm: str = "minmax"
) -> nn.Module:
    """Replaces, in place, each experts module by `FusedExperts` on weights packed for `scheme`.

    It recognizes experts, their layout and their activation as the partitioners do: each module is run on random
    weights and must agree with the fp32 oracle. Routers and other layers are left alone.
    4-bit weights keep their codes: tensors of torchao and ExecuTorch (see `int4_tensors`), and the experts of
    ExecuTorch's own models. For these, `group_size` and `algorithm` are ignored.

    Args:
        model: a Mixture-of-Experts model on any device, with weights of any float dtype.
        scheme: "w4a16", "w4a8", "mxfp4" or "bf16".
        group_size: weights along K that share one scale; must divide the hidden and the expert width. 32 for scheme
            mxfp4, ignored by scheme bf16.
        algorithm: "minmax" or "hqq", see `kernels.packing.rounding`. Ignored by schemes mxfp4 and bf16.

    Returns:
        The same model.

    Raises:
        ValueError: an unknown scheme or algorithm, a group size that does not divide a width, 4-bit weights that the
            scheme cannot store, or a model without experts or with fused ones.
        NotImplementedError: experts that compute another function, or unsupported tensors.
        RuntimeError: see `check_versions`.
        After an error, the model is unchanged.
    """
    check_versions()
    get_scheme(scheme)
    check_algorithm(algorithm)
    found = list(find_experts(model))
    if not found:
        raise ValueError(_why_none(model))
    fused = []
    for name, module in found:
        try:
            fused.append(_fuse(module, scheme, group_size, algorithm))
        except NotFusable as error:
            raise NotImplementedError(f"experts {name} ({type(module).__name__}) not quantized: {error}") from error
        except (ValueError, NotImplementedError) as error:
            raise type(error)(f"{name}: {error}") from None
    for (name, _), experts in zip(found, fused, strict=True):
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, experts)
    return model


def _why_none(model: nn.Module) -> str:
    """Error message for a model without experts to quantize."""
    kind = type(model).__name__
    for name, module in model.named_modules():
        if isinstance(module, FusedExperts):
            return f"{kind} is quantized already ({name or 'all of it'}): load the model again to quantize it otherwise"
    return f"{kind} has no experts modules: pass a Mixture-of-Experts model"


def holds_codes(module: nn.Module) -> bool:
    """True for experts whose weights are 4-bit codes already."""
    return _is_executorch(module) or any(is_quantized(parameter) for parameter in module.parameters())


def _is_executorch(module: nn.Module) -> bool:
    return type(module).__name__ == "FusedMoEExperts" and hasattr(module, "w1_scale")


def _fuse(module: nn.Module, scheme: str, group_size: int, algorithm: str) -> FusedExperts:
    if _is_executorch(module):
        stored: Any = module
        packed = pack_executorch_experts(stored.w1, stored.w1_scale, stored.w2, stored.w2_scale, scheme=scheme)
        return ExecutorchExperts(packed)
    layout = recognize_module(module)
    parameters = dict(module.named_parameters())
    weights: PackedExperts
    if holds_codes(module):
        weights = pack_quantized(layout, parameters, scheme)
    else:
        weights = pack_layer(layout, parameters, scheme, group_size, algorithm)
    return FusedExperts(weights, activation=layout.activation)
