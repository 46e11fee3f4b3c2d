"""Complex numbers of exported programs, as in the rotation of DeepSeek-V2, become pairs of real ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from executorch_moe.backends.cuda.missing_operators import missing_operators
from executorch_moe.backends.fusion import ExpertFuser, FusionOptions
from executorch_moe.backends.fusion.complex_numbers import is_complex, without_complex_numbers

from ..families import Logits, by_name, export_logits, tokens


class Rotation(nn.Module):
    """Every operator that is replaced."""

    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        turn = torch.polar(1.0 + angle.abs(), angle) * 1.5
        turn = turn.unsqueeze(0).unsqueeze(-2).to("cpu")
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        turned = pairs * turn * angle.unsqueeze(-2) * turn.expand(pairs.shape)
        return torch.view_as_real(turned.reshape(1, -1, 2, 4).clone()).flatten(2)


class Other(nn.Module):
    """An operator on complex numbers that stays."""

    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        return torch.polar(x, angle).abs()


def exported(module: nn.Module) -> Any:
    length = torch.export.Dim("T", min=2, max=64)
    example = torch.randn(1, 5, 2, 8), torch.randn(5, 4)
    shapes = {"x": {1: length}, "angle": {0: length}}
    return torch.export.export(module, example, dynamic_shapes=shapes, strict=False)


@pytest.mark.parametrize("length", [2, 9])
def test_pairs_of_real_numbers_compute_the_same(length: int) -> None:
    before = exported(Rotation())
    after = without_complex_numbers(before)
    assert any(map(is_complex, before.graph.nodes)) and not any(map(is_complex, after.graph.nodes))
    x, angle = torch.randn(1, length, 2, 8), torch.randn(length, 4)
    torch.testing.assert_close(after.module()(x, angle), Rotation()(x, angle))


def test_a_program_with_another_operator_is_unchanged() -> None:
    x, angle = torch.rand(5, 4), torch.randn(5, 4)
    program = torch.export.export(Other(), (x, angle))
    assert without_complex_numbers(program) is program


@pytest.mark.transformers
@torch.no_grad()
def test_deepseek_v2_is_fused_and_has_no_operator_that_the_cuda_runtime_lacks() -> None:
    model = by_name("deepseek_v2").model()
    fused = ExpertFuser(FusionOptions("bf16", 32)).fuse(export_logits(model))
    assert not any(map(is_complex, fused.graph.nodes)) and not missing_operators(fused)
    expected = Logits(model)(tokens(11))
    assert (fused.module()(tokens(11)) - expected).norm() / expected.norm() < 1.5e-2
