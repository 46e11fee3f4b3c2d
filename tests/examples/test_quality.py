"""The table of docs/quality.md: what it measures on, and that exported models have the quality of eager ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from executorch_moe.backends.fusion.modules import find_experts
from executorch_moe.backends.runtime.pybindings import why_not_pybindings
from executorch_moe.examples.quality import (
    RECIPES,
    WINDOW,
    Recipe,
    exported,
    held_out,
    perplexity,
    quantized,
    weight_error,
    windows,
)
from executorch_moe.examples.tiny import train
from executorch_moe.kernels import SCHEMES, FusedExperts, unpack_experts
from executorch_moe.kernels.packing.rounding import round_weights

ROOT = Path(__file__).resolve().parents[2]


def test_the_text_was_not_read_in_training() -> None:
    text, seen = held_out(), bytes(train.corpus().tolist())
    assert len(text) > 100_000
    shared = [start for start in range(0, len(text) - 100, 97) if text[start : start + 100] in seen]
    assert not shared
    assert windows(3).shape == (3, WINDOW + 1)


def test_perplexity_of_a_model_that_knows_nothing() -> None:
    assert perplexity(lambda ids: torch.zeros(1, ids.shape[1], 264), windows(2)) == pytest.approx(264, rel=1e-5)


@pytest.mark.parametrize("scheme", ["w4a16", "w4a8"])
def test_groups_longer_than_a_row_are_whole_rows(scheme: str) -> None:
    model = quantized(Recipe(scheme, "hqq", 128))
    original = quantized(Recipe("bf16")).model.model.layers[0].mlp.experts
    experts = model.model.model.layers[0].mlp.experts
    assert isinstance(experts, FusedExperts) and not list(find_experts(model))
    gate_up, down = unpack_experts(original.packed())  # bf16 is what the checkpoint holds
    stored_gate_up, stored_down = unpack_experts(experts.packed())
    zeros = scheme == "w4a16"
    assert torch.equal(stored_gate_up, round_weights(gate_up, 128, "hqq", zeros, not zeros).dequantize())
    assert torch.equal(stored_down, round_weights(down, 64, "hqq", zeros).dequantize())


def test_hqq_is_nearer_to_the_weights_in_every_row() -> None:
    errors = {recipe: weight_error(quantized(recipe)) for recipe in RECIPES}
    assert errors[Recipe("bf16")] == 0
    for scheme, gain in (("w4a16", 0.97), ("w4a8", 0.99)):
        for group_size in (32, 64, 128):
            nearest = errors[Recipe(scheme, "minmax", group_size)]
            assert 0.02 < errors[Recipe(scheme, "hqq", group_size)] < gain * nearest < 0.2


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [pytest.param(Recipe("w4a16", "hqq", 64), marks=pytest.mark.exhaustive), Recipe("w4a8", "minmax", 32)],
    ids=str,
)
def test_exported_equals_eager_within_a_thousandth(recipe: Recipe, tmp_path: Path) -> None:
    if why := why_not_pybindings():
        pytest.skip(why)
    data, model = windows(8), quantized(recipe)
    run = exported(model, tmp_path, WINDOW)
    assert perplexity(run, data) == pytest.approx(perplexity(model, data), rel=1e-3)


def test_the_table_in_the_documentation_is_whole() -> None:
    text = (ROOT / "docs" / "quality.md").read_text()
    assert "python examples/quality.py" in text
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    rows = [row for row in cells if row[0] in SCHEMES]
    assert [Recipe(row[0], row[1] or "minmax", int(row[2] or 0)) for row in rows] == list(RECIPES)
    assert all(abs(float(row[6].rstrip("%"))) < 0.1 for row in rows)
