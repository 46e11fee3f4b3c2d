"""Replacing experts modules: which ones, with which values, and that an error leaves the model unchanged."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from executorch_moe.backends.fusion import ExpertFuser, FusionOptions, modules
from executorch_moe.backends.fusion.modules import find_experts
from executorch_moe.export.checkpoint import plan as checkpoint
from executorch_moe.export.checkpoint import streaming
from executorch_moe.export.checkpoint.streaming import StreamedModel
from executorch_moe.export.checkpoint.whole import load_model
from executorch_moe.export.models.experts_interface import register
from executorch_moe.export.models.pretrained import resolve
from executorch_moe.export.quantize.experts import quantize_experts_
from executorch_moe.kernels import FusedExperts, unpack_experts

from ..families import FAMILIES, Family, by_name, export_logits, tokens


@pytest.fixture
def model() -> nn.Module:
    return load_model(resolve("tiny"), torch.float32)


def routed(model: nn.Module, tokens: int = 33) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states at the first layer's experts, and their routing."""
    seen: list[tuple[torch.Tensor, ...]] = []
    handle = model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda _, args: seen.append(args))
    with torch.no_grad():
        model(input_ids=torch.randint(32, 122, (1, tokens)), use_cache=False)
    handle.remove()
    hidden, ids, weights = seen[0]
    return hidden, ids, weights


@pytest.mark.parametrize(
    ("scheme", "bound"),
    # Relative L2 error against unquantized experts in fp32: rounding to bf16, and 4-bit weights in groups of 32.
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
        ({"algorithm": "gptq"}, "algorithm='gptq' is unknown: use one of minmax, hqq"),
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


def test_a_second_time(model: nn.Module) -> None:
    first = quantize_experts_(model).model.layers[0].mlp.experts
    with pytest.raises(ValueError, match=r"is quantized already \(model\.layers\.0\.mlp\.experts\): load the model"):
        quantize_experts_(model, "w4a8")
    assert model.model.layers[0].mlp.experts is first


def test_modules_that_are_no_experts_of_ours() -> None:
    class MixtralExperts(nn.Module):
        pass

    model = nn.ModuleDict({"mlp": MixtralExperts()})
    with pytest.raises(NotImplementedError, match=r"experts mlp \(MixtralExperts\) not quantized: has parameters none"):
        quantize_experts_(model)
    assert isinstance(model["mlp"], MixtralExperts)


def test_weights_that_do_not_belong_together(model: nn.Module) -> None:
    model.model.layers[1].mlp.experts.down_proj = nn.Parameter(torch.zeros(8, 128, 32))
    with pytest.raises(
        NotImplementedError, match=r"layers\.1\..*has parameters .*down_proj \[8, 128, 32\], expected gate_up"
    ):
        quantize_experts_(model)
    assert len(list(find_experts(model))) == 2


def test_nan_and_inf_are_named(model: nn.Module) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[5, 3, 2] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts: down of expert 5 holds NaN, Inf"):
        quantize_experts_(model)
    assert len(list(find_experts(model))) == 2


def test_another_activation(model: nn.Module) -> None:
    model.model.layers[1].mlp.experts.act_fn = nn.GELU()
    with pytest.raises(
        NotImplementedError, match=r"layers\.1\.mlp\.experts .*computes something else than gated experts"
    ):
        quantize_experts_(model)
    assert len(list(find_experts(model))) == 2


class Limit(nn.Module):
    """An activation with a limit that its repr does not show."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, gate: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(gate.clamp(max=self.limit))


def test_a_limit_of_one_layer(model: nn.Module) -> None:
    for layer, limit in zip(model.model.layers, (float("inf"), 20.0), strict=True):
        layer.mlp.experts.act_fn = Limit(limit)
    with pytest.raises(NotImplementedError, match=r"layers\.1\.mlp\.experts .*it limits \(clamps\)"):
        quantize_experts_(model)


def test_layers_that_differ_in_an_attribute_are_recognized_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal layers of a folder are recognized once, but layers that differ in a limit are not equal."""
    made = checkpoint.meta_model

    def with_limits(limits: tuple[float, float], *args: Any) -> nn.Module:
        model: Any = made(*args)
        for layer, limit in zip(model.model.layers, limits, strict=True):
            layer.mlp.experts.act_fn = Limit(limit)
        return model

    calls: list[str] = []
    recognize = modules.recognize_module
    monkeypatch.setattr(streaming, "recognize_module", lambda m: (calls.append(type(m).__name__), recognize(m))[1])
    arguments = resolve("tiny"), torch.float32, "sdpa", FusionOptions("bf16")
    endless = float("inf")
    monkeypatch.setattr(streaming, "meta_model", lambda *args: with_limits((endless, 20.0), *args))
    with pytest.raises(NotImplementedError, match=r"model\.layers\.1\.mlp\.experts .*it limits \(clamps\)"):
        StreamedModel(*arguments)
    assert len(calls) == 2
    monkeypatch.setattr(streaming, "meta_model", lambda *args: with_limits((endless, endless), *args))
    assert len(StreamedModel(*arguments).layers) == 2 and len(calls) == 3


def test_shared_experts_are_no_experts_to_choose_from() -> None:
    class ZorgSharedExperts(Turned):
        pass

    shared, routed = ZorgSharedExperts(ids_first=True), Turned(ids_first=True)
    model = quantize_experts_(nn.ModuleDict({"shared": shared, "turned": routed}), "bf16")
    assert model["shared"] is shared and isinstance(model["turned"], FusedExperts)


class Turned(nn.Module):
    """Experts of an unknown class: separate gate, up and down; ids and weights in either order."""

    def __init__(self, ids_first: bool) -> None:
        super().__init__()
        self.ids_first = ids_first
        for name, shape in (("a", (4, 32, 64)), ("b", (4, 64, 32)), ("c", (4, 32, 64))):
            setattr(self, name, nn.Parameter(torch.randn(shape) / 8))

    def forward(self, x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        ids, weights = (first, second) if self.ids_first else (second, first)
        gated = nn.functional.silu(x @ self.c.mT) * (x @ self.a.mT)
        share = torch.zeros(x.shape[0], 4).scatter(1, ids, weights)
        return (gated @ self.b.mT * share.T[..., None]).sum(0)


def test_a_class_that_nobody_knows() -> None:
    model = nn.ModuleDict({"turned": Turned(ids_first=True)})
    x, ids = torch.randn(5, 64), torch.stack([torch.randperm(4)[:2] for _ in range(5)])
    weights = torch.rand(5, 2)
    expected = model["turned"](x, ids, weights)
    quantize_experts_(model, "bf16")
    assert isinstance(model["turned"], FusedExperts)
    torch.testing.assert_close(model["turned"](x, ids, weights), expected, rtol=0.03, atol=0.03)


def test_another_order_of_arguments_is_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"turned .*cannot be called as module\(hidden_states .*partitioner"):
        quantize_experts_(nn.ModuleDict({"turned": Turned(ids_first=False)}))


@pytest.mark.parametrize("family", FAMILIES, ids=str)
@pytest.mark.parametrize("implementation", ["grouped_mm", "eager", "executorch_moe"])
def test_every_family(family: Family, implementation: str) -> None:
    register()
    model = family.model(implementation)  # its experts' weights are exact in 4 bits
    with torch.no_grad():
        expected = model(input_ids=tokens(9), use_cache=False).logits
        quantize_experts_(model, "w4a16", 32)
        actual = model(input_ids=tokens(9), use_cache=False).logits
    assert sum(isinstance(module, FusedExperts) for module in model.modules()) == family.moe_layers
    assert (actual - expected).norm() / expected.norm() < 0.01


@pytest.mark.parametrize(("scheme", "gain"), [("w4a16", 0.97), ("w4a8", 1.0)])
def test_hqq_is_nearer_to_the_float_weights(model: nn.Module, scheme: str, gain: float) -> None:
    float_weights = model.model.layers[0].mlp.experts.gate_up_proj.detach().clone()
    errors = {}
    for algorithm in ("minmax", "hqq"):
        other = load_model(resolve("tiny"), torch.float32)
        quantize_experts_(other, scheme, 32, algorithm)
        packed = other.model.layers[0].mlp.experts.packed()
        assert (packed.w13_zero is not None) == (algorithm == "hqq" and scheme == "w4a16")
        errors[algorithm] = (unpack_experts(packed)[0] - float_weights).norm()
    # For w4a8, most of the gain is in the choice among multiples of a row's scale already.
    assert errors["hqq"] < gain * errors["minmax"]


@pytest.mark.parametrize("scheme", ["w4a16", "w4a8"])
def test_partitioner_and_module_pack_the_same_bytes(scheme: str) -> None:
    family = by_name("gpt_oss")
    fuser = ExpertFuser(FusionOptions(scheme, 32, algorithm="hqq"))
    fused = fuser.fuse(export_logits(family.model()))
    swapped = quantize_experts_(family.model(), scheme, 32, "hqq")
    (experts,) = (module for module in swapped.modules() if isinstance(module, FusedExperts))
    for name, tensor in experts.packed().tensors().items():
        if tensor is not None:
            assert torch.equal(fused.state_dict[f"model.model.layers.0.mlp.experts.packed_{name}"], tensor)
    (layer,) = fuser.report.layers
    assert layer.algorithm == "hqq" and json.loads(fuser.report.json())["layers"][0]["algorithm"] == "hqq"
