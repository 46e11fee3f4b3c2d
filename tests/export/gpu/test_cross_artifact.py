"""On a GPU: artifacts from a machine without one, in the folder that EXECUTORCH_MOE_CROSS names.

executorch-moe export tiny -o FOLDER/tiny-fp32.pte --target sm_90 --max-context 128 --dtype fp32
executorch-moe export tiny -o FOLDER/tiny-bf16.pte --target sm_90 --max-context 128
executorch-moe export tiny -o FOLDER/tiny-both.pte --target sm_80,sm_90 --max-context 128 --dtype fp32
executorch-moe export tiny -o FOLDER/tiny-other.pte --target sm_80 --max-context 128 --dtype fp32

On a GPU that is not sm_90, name its architecture in place of sm_90 (and another one in place of sm_80, if need be).
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from executorch_moe.backends.runtime.loader import load
from executorch_moe.export.bench.model import benchmark_model

from ..generate.test_tokens import NEW_TOKENS, PROMPTS, TextGenerator, compare

pytestmark = pytest.mark.gpu
FOLDER = os.environ.get("EXECUTORCH_MOE_CROSS", "")
TURNS = 9


def cross(name: str) -> Path:
    if not FOLDER:
        pytest.skip("EXECUTORCH_MOE_CROSS names no folder of artifacts that were exported without a GPU")
    return Path(FOLDER) / f"tiny-{name}.pte"


@pytest.mark.parametrize("name", ["fp32", "both"])
def test_tokens_equal_eager(name: str) -> None:
    compare(cross(name), "w4a16", "cuda", "delegate-host", "fp32")


def test_another_architecture_is_named() -> None:
    with pytest.raises(
        RuntimeError, match=r"method decode was exported for sm_\d+a?, this GPU is sm_\d+: export it again"
    ):
        load(cross("other"), runtime="delegate-host")


def test_tokens_equal_those_of_the_export_made_here(exported: Callable[..., Path]) -> None:
    here = TextGenerator.load(exported("w4a16", "cuda", "fp32"), runtime="delegate-host")
    there = TextGenerator.load(cross("fp32"), runtime="delegate-host")
    for prompt in PROMPTS:
        ids = here.encode(prompt)
        expected = here.generate(ids, NEW_TOKENS, ignore_eos=True).tokens
        assert there.generate(ids, NEW_TOKENS, ignore_eos=True).tokens == expected, f"prompt {prompt!r}"


def test_speed_is_within_a_tenth_of_the_export_made_here(exported: Callable[..., Path]) -> None:
    """Both are measured in turns and compared turn by turn, because other tests may use the GPU at the same time."""
    ptes = {"there": cross("bf16"), "here": exported("w4a16", "cuda")}
    generators = {name: TextGenerator.load(pte, "delegate-host") for name, pte in ptes.items()}
    ratios: dict[str, list[float]] = {"prefill": [], "decode": []}
    for _ in range(TURNS):
        rates = {}
        for name, pte in ptes.items():
            (speed,) = benchmark_model(pte, [32], 64, 3, generator=generators[name]).speeds
            rates[name] = {"prefill": max(speed.prefill), "decode": max(speed.decode)}
        for what, found in ratios.items():
            found.append(rates["there"][what] / rates["here"][what])
    print(f"speed of an export made without a GPU by that of one made here, turn by turn: {ratios}")
    for what, found in ratios.items():
        assert statistics.median(found) >= 0.9, (what, found)
