"""The gated delta rule in a CUDA delegate: one token and longer prompts, with states that are updated in place."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from requirements import needs_cross_export
from torch import Tensor, nn
from torch._inductor.codecache import AotCodeCompiler
from torch.export import Dim, ExportedProgram, export

import executorch_moe.kernels.delta_rule.op  # noqa: F401  registers the operator
from executorch_moe.backends.artifact.files import open_artifact, save
from executorch_moe.backends.artifact.inspect import check_cuda_artifact, inspect_artifact
from executorch_moe.backends.lower import lower
from executorch_moe.backends.runtime.loader import load
from tests.kernels.delta_rule_cases import EPS, TINY, make, relative_error

HIDDEN = 64


class Layer(nn.Module):
    """A layer of linear attention, without its residual. Its states are buffers."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        arguments = make(TINY, 1, seed=seed, dtype=torch.bfloat16)
        for name in ("conv_weight", "dt_bias", "a_log", "norm_weight"):
            self.register_buffer(name, getattr(arguments, name))
        for name in ("conv_state", "recurrent_state"):
            self.register_buffer(name, torch.zeros_like(getattr(arguments, name)))
        generator = torch.Generator().manual_seed(seed)
        for name, rows, columns in (("in_proj", TINY.columns, HIDDEN), ("out_proj", HIDDEN, TINY.values)):
            weight = torch.randn(rows, columns, generator=generator) * columns**-0.5
            self.register_buffer(name, weight.bfloat16())

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        states = self.conv_state, self.recurrent_state
        out, *new = torch.ops.executorch_moe.gated_delta_net(
            x @ self.in_proj.T, self.conv_weight, self.dt_bias, self.a_log, self.norm_weight, *states, position,
            TINY.key_heads, TINY.key_dim, EPS,
        )  # fmt: skip
        for state, value in zip(states, new, strict=True):
            state.copy_(value)
        return out @ self.out_proj.T


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(0), Layer(1)])

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, position)
        return x


def methods() -> dict[str, ExportedProgram]:
    model = Layers()
    position, tokens = torch.tensor([3]), {"x": {0: Dim("tokens", min=2, max=1024)}, "position": None}
    return {
        "decode": export(model, (torch.randn(1, HIDDEN, dtype=torch.bfloat16), position)),
        "prefill": export(model, (torch.randn(9, HIDDEN, dtype=torch.bfloat16), position), dynamic_shapes=tokens),
    }


def state_arguments(host_code: str) -> dict[str, list[str]]:
    """State of a layer -> the launches that take it, as often as they do."""
    found: dict[str, list[str]] = {}
    for kernel, arguments in re.findall(r"^\s*call_(\w+?)_\d+\(([^()]*?(?:_state)\b.*)\);", host_code, re.M):
        for argument in re.findall(r"\w+_state\b", arguments):
            found.setdefault(argument, []).append(kernel)
    return found


class Generated(BaseException):  # Inductor wraps an Exception
    """Ends a compilation when host code and kernels are generated, before the C++ compiler."""


@needs_cross_export
@pytest.mark.slow
def test_states_are_updated_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels get each buffer as the old and as the new state, and nothing else touches it."""
    host_code: list[str] = []

    def compile(cls: Any, graph: Any, wrapper_code: str, *args: Any, **kwargs: Any) -> Any:
        host_code.append(wrapper_code)
        raise Generated

    monkeypatch.setattr(AotCodeCompiler, "compile", classmethod(compile))
    for name, program in methods().items():
        with pytest.raises(Generated):
            lower({name: program}, "sm_90")
    decode, prefill = host_code
    token = "moe_delta_rule_one_token"
    inputs, state = "moe_delta_rule_inputs", "moe_delta_rule_state"
    for text, conv, recurrent in ((decode, [token] * 2, [token] * 2), (prefill, [inputs, state], [state] * 2)):
        expected = {}
        for layer in range(2):
            expected[f"layers_{layer}_conv_state"] = conv
            expected[f"layers_{layer}_recurrent_state"] = recurrent
        assert state_arguments(text) == expected


@needs_cross_export
@pytest.mark.slow
@pytest.mark.exhaustive
def test_an_artifact_takes_any_length(tmp_path: Path) -> None:
    artifact = save(lower(methods(), "sm_90"), tmp_path / "model")
    check_cuda_artifact(inspect_artifact(artifact.pte))
    assert open_artifact(artifact.pte)[0].inputs("prefill")[0].sizes == (1024, HIDDEN)  # not only the length traced


@pytest.mark.gpu
@pytest.mark.slow
def test_a_text_in_pieces_equals_eager(tmp_path: Path) -> None:
    artifact = save(lower(methods(), "cuda"), tmp_path / "model")
    loaded, eager = load(artifact.pte, runtime="delegate-host"), Layers()
    text = torch.randn(300, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()
    for pieces in ((300,), (1,) * 20 + (64, 65, 130, 1, 20), (7, 1, 292)):
        position = 0
        for piece in pieces:
            x, at = text[position : position + piece], torch.tensor([position])
            (found,) = loaded.run("decode" if piece == 1 else "prefill", x, at)
            assert relative_error(found.cpu(), eager(x, at)) < 1.5e-2, (pieces, position)
            position += piece
