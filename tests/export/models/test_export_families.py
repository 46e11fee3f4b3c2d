"""`executorch-moe export` for families other than Qwen3-MoE."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from executorch_moe.backends.fusion.modules import find_experts
from executorch_moe.backends.runtime.loader import load
from executorch_moe.export.cli.app import app
from executorch_moe.export.models.pretrained import resolve

from ...combinations import EXHAUSTIVE
from ..families import FAMILIES, FURTHER, Logits, by_name, tokens

OTHERS = [family for family in (*FAMILIES, *FURTHER) if family.name != "qwen3_moe"]
# A window shorter than the prompt; GPT-OSS has it in every other layer.
WINDOWS = {"mixtral": {"sliding_window": 4}, "gpt_oss": {"sliding_window": 4, "num_hidden_layers": 2}}


# Sliding windows, another attention with groups of experts. test_families.py has what the others need, and
# checkpoint/formats/test_exports.py has GPT-OSS as it is published.
APART: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "deepseek_v3": {"num_hidden_layers": 1, "first_k_dense_replace": 0},
}
"""Families that `make test` exports, with options."""


def save_model(name: str, folder: Path, **options: Any) -> torch.nn.Module:
    """Writes a random model of a family as a model folder, with the tiny model's tokenizer."""
    family = by_name(name)
    model = dataclasses.replace(family, options=family.options | WINDOWS.get(name, {}) | options).model()
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(resolve("tiny") / file, folder / file)
    return model


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(pytest.param(name, options, id=f"{name}-one_layer" if options else name) for name, options in APART.items()),
        *(
            pytest.param(family.name, {}, marks=EXHAUSTIVE, id=family.name)
            for family in OTHERS
            if APART.get(family.name) != {}
        ),
    ],
)
def test_prefill_and_decode_equal_the_unmodified_model(
    name: str, options: dict[str, Any], tmp_path: Path, executorch_runtime: None
) -> None:
    model = save_model(name, tmp_path / "model", **options)
    pte, report = tmp_path / "out" / "model.pte", tmp_path / "report.json"
    arguments = ["export", tmp_path / "model", "-o", pte, "--target", "cpu", "--max-context", 48, "--report", report]
    arguments += ["--output", "logits"]
    result = CliRunner().invoke(app, [str(argument) for argument in [*arguments, "--verbose"]])
    assert result.exit_code == 0, result.output
    assert "fused layers" in result.stderr
    # The work folder was removed, and no other files remain.
    assert {path.suffix for path in pte.parent.iterdir()} == {".pte", ".ptd", ".json"}

    layers = json.loads(report.read_text())["layers"]
    assert len(layers) == sum(1 for _ in find_experts(model)) and layers[0]["scheme"] == "w4a16"
    loaded = load(pte)
    ids = tokens(10)
    (prefill,) = loaded.run("prefill", ids[:, :9], torch.arange(9))
    (decode,) = loaded.run("decode", ids[:, 9:], torch.tensor([9]))
    with torch.no_grad():
        expected = Logits(model)(ids)[0, 8:]
    # The experts' weights are exact in 4 bits.
    assert (torch.cat([prefill, decode]) - expected).norm() / expected.norm() < 1.5e-2


@pytest.mark.parametrize(
    ("name", "option", "value", "message"),
    [
        (
            "mixtral",
            "--group-size",
            "64",
            "model.layers.0.mlp.experts (MixtralExperts) not fused: intermediate size I=96 must be",
        ),
    ],
)
def test_a_refusal_is_one_line_and_writes_nothing(
    name: str, option: str, value: str, message: str, tmp_path: Path
) -> None:
    save_model(name, tmp_path / "model")
    pte = tmp_path / "model.pte"
    arguments = ["export", str(tmp_path / "model"), "-o", str(pte), "--target", "cpu", option, value]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert message in result.stderr.strip().splitlines()[-1], result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
