"""Swaps the experts modules of a Hugging Face model for fused experts on packed weights."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from executorch_moe.kernels import SCHEMES, FusedExperts, pack_experts

# Experts modules whose parameters are gate_up_proj [E, 2I, H] (gate rows, then up rows) and down_proj [E, H, I],
# without biases, and whose forward takes (hidden_states, top_k_index, top_k_weights).
GATE_UP_DOWN = ("Qwen3MoeExperts",)


def find_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields (qualified name, module) of each experts module not fused yet; transformers names them `*Experts`."""
    for name, module in model.named_modules():
        if type(module).__name__.endswith("Experts") and not isinstance(module, FusedExperts):
            yield name, module


def can_swap(model: nn.Module) -> bool:
    """True if `quantize_experts_` knows the experts of `model`; those of others are fused while they are lowered."""
    return all(type(module).__name__ in GATE_UP_DOWN for _, module in find_experts(model))


def quantize_experts_(model: nn.Module, scheme: str = "w4a16", group_size: int = 32) -> nn.Module:
    """Replaces, in place, every experts module by `FusedExperts` on weights packed for `scheme`.

    Routers and all other layers stay as they are.

    Args:
        model: a transformers MoE model (now: Qwen3-MoE), on any device; weights of any float dtype.
        scheme: "w4a16", "w4a8" or "bf16".
        group_size: weights that share one scale; must divide the hidden and the expert width. Ignored by scheme bf16.

    Returns:
        The same model.

    Raises:
        ValueError: an unknown scheme, a group size that does not fit, or a model without experts.
        NotImplementedError: an experts module of another architecture or with another activation. In both cases the
            model is left as it was.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme={scheme!r} is unknown: use one of {', '.join(SCHEMES)}")
    found = list(find_experts(model))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no experts modules: pass a Mixture-of-Experts model (now: Qwen3-MoE)"
        )
    for name, module in found:
        _check_supported(name, module)
    packed = []
    for name, module in found:
        try:
            packed.append(pack_experts(module.gate_up_proj, module.down_proj, scheme=scheme, group_size=group_size))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    for (name, _), weights in zip(found, packed, strict=True):
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, FusedExperts(weights, activation="silu"))
    return model


def _check_supported(name: str, module: nn.Module) -> None:
    kind = type(module).__name__
    if kind not in GATE_UP_DOWN:
        raise NotImplementedError(
            f"{name} is a {kind}, which is not supported yet: use a model with {' or '.join(GATE_UP_DOWN)} (Qwen3-MoE)"
        )
    activation = getattr(module, "act_fn", None)
    # transformers has its own SiLUActivation beside torch's SiLU.
    if type(activation).__name__ not in ("SiLU", "SiLUActivation"):
        raise NotImplementedError(
            f"{name} uses activation {type(activation).__name__}, but fused experts compute silu(gate) * up: "
            "use a model with hidden_act='silu'"
        )
