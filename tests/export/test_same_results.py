"""Modules are replaced if the replacement computes the same; layers of one kind are compared once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from executorch_moe.export import same_results
from executorch_moe.export.same_results import example, gives_same_results


class Scaled(nn.Module):
    """A linear layer with a factor, and a number that has no effect."""

    def __init__(self, factor: float = 1.0, layer_idx: int = 0, config: Any = None) -> None:
        super().__init__()
        self.linear, self.factor, self.layer_idx = nn.Linear(8, 8, device="meta"), factor, layer_idx
        if config is not None:
            self.config = config

    def forward(self, x: Tensor) -> Tensor:
        factor = self.config.factors[self.layer_idx] if hasattr(self, "config") else self.factor
        return self.linear(x) * factor  # type: ignore[no-any-return]


class Plain(nn.Module):
    def __init__(self, module: Any) -> None:
        super().__init__()
        self.linear = module.linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)  # type: ignore[no-any-return]


class Config:
    """As transformers' configurations: a list with an entry for each layer."""

    num_hidden_layers, _attn_implementation = 3, "eager"

    def __init__(self) -> None:
        self.factors = [1.0, 2.0, 1.0]

    def to_json_string(self, use_diff: bool) -> str:
        return str(self.factors)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Forgets comparisons; the list has the modules that are compared from now on."""
    compared: list[nn.Module] = []
    compare = same_results._compare

    def counted(module: nn.Module, *rest: Any) -> bool:
        compared.append(module)
        return compare(module, *rest)

    monkeypatch.setattr(same_results, "_KNOWN", {})
    monkeypatch.setattr(same_results, "_compare", counted)
    return compared


def run(module: Any) -> tuple[Tensor]:
    return (module(example(3, 8)),)


def test_a_replacement_must_compute_the_same(nothing_known: list[nn.Module]) -> None:
    assert gives_same_results(Scaled(), Plain, run)
    assert not gives_same_results(Scaled(1.01), Plain, run)
    assert gives_same_results(Scaled(layer_idx=7), Plain, run)  # another layer of the first kind
    assert len(nothing_known) == 2


def test_a_module_that_cannot_be_called_is_kept() -> None:
    assert not gives_same_results(nn.Linear(8, 8), Plain, run)
    assert not gives_same_results(Scaled(), Plain, lambda module: (module(example(3, 9)),))


def test_layers_differ_if_their_configuration_says_so() -> None:
    config = Config()
    found = [gives_same_results(Scaled(layer_idx=layer, config=config), Plain, run) for layer in range(3)]
    assert found == [True, False, True]


def test_weights_are_neither_read_nor_changed() -> None:
    module = Scaled()
    module.linear = nn.Linear(8, 8)
    before = module.linear.weight.clone()
    assert gives_same_results(module, Plain, run)
    assert torch.equal(module.linear.weight, before)


def test_submodules_can_be_stubs() -> None:
    module = Scaled()
    module.linear.register_forward_pre_hook(lambda *_: pytest.fail("the stub was not called"))
    assert gives_same_results(module, Plain, run, {"linear": nn.Tanh()})
