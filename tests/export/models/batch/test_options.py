"""`--max-batch` among the options of an export."""

from __future__ import annotations

import pytest

from executorch_moe.export.models import pretrained
from executorch_moe.export.options import Context, ExportOptions, Target
from executorch_moe.export.report.metadata import STOCK_RUNNERS, constant_methods

from ...families import RECURRENT, by_name


@pytest.mark.parametrize("rows", [0, 65])
def test_a_number_out_of_range_is_refused(rows: int) -> None:
    with pytest.raises(ValueError, match=rf"max_batch={rows} must be from 1 \(one sequence\) to 64"):
        Context(max_batch=rows)


def test_recurrent_layers_are_refused_on_cuda_before_anything_is_packed() -> None:
    options = ExportOptions("tiny", target=Target("sm_90"), context=Context(32, max_batch=2))
    with pytest.raises(NotImplementedError, match="several sequences at once need layers of attention only on CUDA"):
        options.positions(RECURRENT[0].config())
    options = ExportOptions("tiny", target=Target("cpu"), context=Context(32, max_batch=2))
    assert options.positions(RECURRENT[0].config()) == 32


def test_the_cache_of_all_slots_must_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    config = by_name("qwen3_moe").config()
    monkeypatch.setattr(pretrained, "total_memory", lambda: 2 * 2 * 2 * 32 * 32 * 4)  # two slots of 32 positions
    for rows in (1, 2):
        options = ExportOptions("tiny", target=Target("cpu"), context=Context(32, max_batch=rows))
        assert options.positions(config) == 32
    options = ExportOptions("tiny", target=Target("cpu"), context=Context(32, max_batch=3))
    with pytest.raises(ValueError, match=r"max_context=32 needs a KV cache of .*: use at most 21"):
        options.positions(config)


def test_the_program_says_how_many() -> None:
    config = by_name("qwen3_moe").config()
    found = {}
    for rows in (1, 8):
        options = ExportOptions("tiny", target=Target("cpu"), context=Context(32, max_batch=rows))
        found[rows] = constant_methods(options, config, 32, "{}")
    assert found[8]["get_max_batch"] == 8 and "get_max_batch" not in found[1]
    # ExecuTorch's own runners know no slots, so that they must refuse the program.
    assert STOCK_RUNNERS in found[1] and STOCK_RUNNERS not in found[8]
