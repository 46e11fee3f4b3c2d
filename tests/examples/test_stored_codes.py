"""The second table of docs/quality.md: kept codes are nearer to a checkpoint than codes that are rounded again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from executorch_moe.examples.quality import Logits, perplexity, windows
from executorch_moe.examples.stored_codes import AGAIN, CHECKPOINTS, GROUP_SIZES, checkpoint, error, keep_
from executorch_moe.export.quantize.experts import quantize_experts_

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_kept_codes_are_the_checkpoints(group_size: int) -> None:
    model, codes = checkpoint(group_size)
    for gate_up, down in codes.values():
        for code in (gate_up, down):
            assert code.group_size == group_size and code.q.min() == -8 and code.q.max() == 7
    data = windows(2)
    expected = perplexity(Logits(model), data)
    kept = keep_(model, codes)
    assert 0 < error(kept, codes) < 4e-3
    assert perplexity(Logits(kept), data) == pytest.approx(expected, rel=2e-3)
    for algorithm, size in AGAIN:
        again = quantize_experts_(checkpoint(group_size)[0], "w4a16", size, algorithm)
        # HQQ finds a group's own codes again, where it has the same groups.
        bound = 2e-3 if (algorithm, size) == ("hqq", group_size) else 3e-2
        assert error(again, codes) > max(bound, 2 * error(kept, codes))


def test_mxfp4_is_kept_exactly() -> None:
    model, codes = checkpoint(None)
    data = windows(2)
    expected = perplexity(Logits(model), data)
    kept = keep_(model, codes)
    assert error(kept, codes) == 0
    assert perplexity(Logits(kept), data) == pytest.approx(expected, rel=2e-3)
    assert error(quantize_experts_(checkpoint(None)[0], "w4a16", 32, "minmax"), codes) > 0.05


def test_the_table_in_the_documentation_is_whole() -> None:
    text = (ROOT / "docs" / "quality.md").read_text()
    assert "python examples/stored_codes.py" in text
    for name in CHECKPOINTS:
        rows = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
        assert len(rows) == 2 + len(AGAIN)


def test_values_are_those_of_the_codes() -> None:
    model, codes = checkpoint(32)
    (name, (gate_up, down)), *_ = codes.items()
    experts = model.get_submodule(name)
    assert torch.equal(experts.gate_up_proj, gate_up.dequantize())
    assert torch.equal(experts.down_proj, down.dequantize())
