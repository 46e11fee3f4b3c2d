"""`bench model --batch`: what is measured, and the table."""

from __future__ import annotations

import pytest

from executorch_moe.export.bench.batch import BatchSpeed, check_batch, measure_batch
from executorch_moe.export.bench.model import ModelBenchmark

from ..generate.test_batch import generator


def test_sequences_are_decoded_at_once() -> None:
    loaded, heard = generator("greedy"), []
    speed = measure_batch(loaded, [[1, 2, 3], [4, 5, 6]], 7, 2, on_repeat=lambda: heard.append(1))
    assert (speed.sequences, speed.prompt_tokens, speed.new_tokens) == (2, 3, 7)
    assert len(speed.decode) == len(heard) == 2 and min(speed.decode) > 0
    # A warm-up of five steps and two measurements of seven, each after its prompts.
    calls = loaded.program.calls  # type: ignore[attr-defined]
    assert calls == [*["prefill"] * 2, *["decode_batch"] * 5] + 2 * [*["prefill"] * 2, *["decode_batch"] * 7]


@pytest.mark.parametrize("sequences", [[4], [0, 1], []])
def test_numbers_that_do_not_fit_are_refused(sequences: list[int]) -> None:
    with pytest.raises(ValueError, match="must be numbers of sequences from 1 to the 3 of the artifact"):
        check_batch(generator("greedy"), sequences)


def test_the_table_has_the_sum_and_each() -> None:
    speeds = [BatchSpeed(4, 9, 16, [100.0, 100.0])]
    result = ModelBenchmark("x.pte", "eager", "CPU", {}, "", [], batches=speeds)
    assert "| 4 | decode 16 after 9 | 100.0 ± 0.0 | 25.0 ± 0.0 |" in result.markdown()
