"""The gated delta rule in ExecuTorch's CPU runtime: one program for every number of tokens, with its states inside."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, export

from executorch_moe.backends.artifact.files import save
from executorch_moe.backends.lower import lower
from executorch_moe.backends.runtime.loader import load
from executorch_moe.kernels.delta_rule.reference import gated_delta_net_reference
from tests.kernels.delta_rule_cases import EPS, LENGTHS, TINY, make, relative_error


class Layer(nn.Module):
    """A layer without its projections, with its states in buffers."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        arguments = make(TINY, 1, seed=seed)
        for name in ("conv_weight", "dt_bias", "a_log", "norm_weight"):
            self.register_buffer(name, getattr(arguments, name))
        for name in ("conv_state", "recurrent_state"):
            self.register_buffer(name, torch.zeros_like(getattr(arguments, name)))

    def forward(self, projected: Tensor, position: Tensor) -> Tensor:
        weights = self.conv_weight, self.dt_bias, self.a_log, self.norm_weight
        states = self.conv_state, self.recurrent_state
        out, *new = torch.ops.executorch_moe.gated_delta_net(
            projected, *weights, *states, position, TINY.key_heads, TINY.key_dim, EPS
        )
        for state, value in zip(states, new, strict=True):
            state.copy_(value)
        return out


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(0), Layer(1)])

    def forward(self, projected: Tensor, position: Tensor) -> Tensor:
        return sum(layer(projected, position) for layer in self.layers)


def test_every_length_in_one_program(tmp_path: Path) -> None:
    """Lengths after each other, so that each continues from the states that the one before left; then a second text."""
    model = TwoLayers()
    example = make(TINY, 9)
    tokens = {"projected": {0: Dim("tokens", min=1, max=256)}, "position": None}
    program = export(model, (example.projected, example.position), dynamic_shapes=tokens)
    loaded = load(save(lower({"forward": program}, "cpu"), tmp_path / "model").pte)
    layers = [make(TINY, 1, seed=layer) for layer in range(2)]
    position = 0
    for length in (*LENGTHS, 1, 0, 5, 1):
        if length == 0:  # the next text
            position = 0
            continue
        projected = make(TINY, length).projected
        total = torch.zeros(length, TINY.values)
        for index, layer in enumerate(layers):
            given = layer._replace(projected=projected, position=torch.tensor([position]))
            out, conv_state, state = gated_delta_net_reference(*given)
            layers[index] = layer._replace(conv_state=conv_state, recurrent_state=state)
            total += out
        found = loaded.run("forward", projected, torch.tensor([position]))
        assert relative_error(found[0], total) < 1e-5, length
        position += length
