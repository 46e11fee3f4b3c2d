"""Each row is sampled as it is alone."""

from __future__ import annotations

import pytest
import torch

from executorch_moe.export.models.batch.sampling import nucleus_rows, sample_rows, sorted_nucleus_rows
from executorch_moe.export.models.sampling import nucleus, sample, sorted_nucleus

TEMPERATURES = [0.0, 0.7, 1.5, 1.0, 0.2]
TOP_P = [1.0, 0.9, 0.5, 1.0, 0.05]
SEEDS = [0, 5, 5, 1 << 40, 77]


@pytest.mark.parametrize(("rows", "alone"), [(nucleus_rows, nucleus), (sorted_nucleus_rows, sorted_nucleus)])
@pytest.mark.parametrize("vocabulary", [300, 2048])
def test_rows_are_as_alone(rows, alone, vocabulary: int) -> None:  # type: ignore[no-untyped-def]
    logits = 4 * torch.randn(5, vocabulary, generator=torch.Generator().manual_seed(0))
    logits[0, 7] = logits[0, 3] = 50.0  # the first of ties
    positions = torch.tensor([0, 3, 3, 900, 12])
    temperature, top_p, seed = torch.tensor(TEMPERATURES), torch.tensor(TOP_P), torch.tensor(SEEDS)
    found = sample_rows(logits, positions, temperature, top_p, seed, rows)
    assert found.shape == (5, 1) and found[0] == 3
    for row in range(5):
        one = slice(row, row + 1)
        expected = sample(logits[one], positions[one], temperature[one], top_p[one], seed[one], alone)
        assert torch.equal(found[one], expected), row
