"""On a GPU: artifacts of every family in the delegate host, against transformers' own model in PyTorch on the CPU.

Artifacts are taken from the folder that EXECUTORCH_MOE_CROSS names, if family_artifacts.py wrote them there on a
machine without a GPU; otherwise they are exported here. Each family has one of dynamic and one of fixed length.
models/test_families.py shows that other ways to export give the same programs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from executorch_moe.backends.runtime.loader import load

from ..families import Logits, tokens
from ..models.test_families import BOUND, relative_error
from .family_artifacts import MODES, STATIC_LENGTH, Mode

pytestmark = pytest.mark.gpu
FOLDER = os.environ.get("EXECUTORCH_MOE_CROSS", "")
LENGTHS = (2, 11, 40)


def files(mode: Mode, made_once: Callable[[str, Callable[[Path], None]], Path]) -> tuple[Path, Path]:
    if FOLDER and mode.files(Path(FOLDER))[0].is_file():
        return mode.files(Path(FOLDER))
    return mode.files(made_once(f"family-{mode}", lambda folder: mode.write("cuda", folder)))


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode.dynamic], ids=str)
@torch.no_grad()
def test_any_length_in_fp32_with_4_bit_weights(mode: Mode, made_once, record_property) -> None:
    """The experts' weights are exact in 4 bits, and only experts round to bf16: the bound of the CPU target holds."""
    pte, weights = files(mode, made_once)
    program, eager = load(pte, runtime="delegate-host"), Logits(mode.eager(weights))
    errors = [relative_error(program.run("forward", tokens(n))[0].cpu(), eager(tokens(n))) for n in LENGTHS]
    record_property("families", f"{mode}: relative errors {errors} for lengths {LENGTHS}")
    assert max(errors) < BOUND


@pytest.mark.parametrize("mode", [mode for mode in MODES if not mode.dynamic], ids=str)
@torch.no_grad()
def test_a_fixed_length_in_bf16(mode: Mode, made_once, record_property) -> None:
    """The error against the model in fp32 is at most twice that of transformers' own model in bf16."""
    pte, weights = files(mode, made_once)
    program, exact = load(pte, runtime="delegate-host"), Logits(mode.eager(weights))
    rounded = Logits(mode.eager(weights, torch.bfloat16))
    # Rounding may change a router's choice in a near-tie, which is correct: take the text with the least error.
    texts = torch.randint(0, 96, (8, 1, STATIC_LENGTH), generator=torch.Generator().manual_seed(0))
    allowed, ids = min(((relative_error(rounded(text), exact(text)), text) for text in texts), key=lambda pair: pair[0])
    error = relative_error(program.run("forward", ids)[0].cpu(), exact(ids))
    record_property("families", f"{mode}: relative error {error}, of transformers' bf16 model {allowed}")
    assert error < 2 * allowed
