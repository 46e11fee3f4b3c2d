"""Swapping experts modules: which, how exactly, and that a refusal leaves the model as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from executorch_moe.export.pretrained import load_model, resolve
from executorch_moe.export.quantize import find_experts, quantize_experts_
from executorch_moe.kernels import FusedExperts


@pytest.fixture
def model() -> nn.Module:
    return load_model(resolve("tiny"), torch.float32)


def routed(model: nn.Module, tokens: int = 33) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states as they come to the first layer's experts, and that layer's own routing of them."""
    seen: list[tuple[torch.Tensor, ...]] = []
    handle = model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda _, args: seen.append(args))
    with torch.no_grad():
        model(input_ids=torch.randint(32, 122, (1, tokens)), use_cache=False)
    handle.remove()
    hidden, ids, weights = seen[0]
    return hidden, ids, weights


@pytest.mark.parametrize(
    ("scheme", "bound"),
    # Relative L2 against the unquantised experts in fp32: rounding to bf16, and 4-bit weights with 32 to a scale.
    [("bf16", 0.01), ("w4a16", 0.15), ("w4a8", 0.15)],
)
def test_fused_experts_take_the_place_of_the_originals(model: nn.Module, scheme: str, bound: float) -> None:
    inputs = routed(model)
    with torch.no_grad():
        expected = model.model.layers[0].mlp.experts(*inputs)
        quantize_experts_(model, scheme, 32)
        actual = model.model.layers[0].mlp.experts(*inputs)
    assert actual.dtype == expected.dtype
    assert (actual - expected).norm() / expected.norm() < bound
    assert sum(isinstance(module, FusedExperts) for module in model.modules()) == 2
    assert not list(find_experts(model))


def test_only_the_experts_change(model: nn.Module) -> None:
    before = {name: p.clone() for name, p in model.named_parameters() if ".experts." not in name}
    quantize_experts_(model, "w4a16", 32)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheme": "int4"}, "scheme='int4' is unknown: use one of"),
        ({"group_size": 48}, "group_size=48"),
        ({"group_size": 256}, "layers.0.mlp.experts: .*group_size=256"),
    ],
)
def test_a_refusal_names_value_and_rule_and_changes_nothing(model: nn.Module, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_experts_(model, **arguments)
    assert len(list(find_experts(model))) == 2


def test_a_model_without_experts() -> None:
    with pytest.raises(ValueError, match="Sequential has no experts modules"):
        quantize_experts_(nn.Sequential(nn.Linear(4, 4)))


def test_experts_of_another_architecture() -> None:
    class MixtralExperts(nn.Module):
        pass

    model = nn.ModuleDict({"mlp": MixtralExperts()})
    with pytest.raises(NotImplementedError, match="mlp is a MixtralExperts, which is not supported yet"):
        quantize_experts_(model)
    assert isinstance(model["mlp"], MixtralExperts)


def test_another_activation(model: nn.Module) -> None:
    model.model.layers[1].mlp.experts.act_fn = nn.GELU()
    with pytest.raises(NotImplementedError, match=r"layers\.1\.mlp\.experts uses activation GELU"):
        quantize_experts_(model)
    assert len(list(find_experts(model))) == 2
