"""`export` of models that are damaged, unsupported or disagree with their weights: one line each."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from .refusals import refused


def test_export_folders_that_are_no_models(tmp_path: Path) -> None:
    out = tmp_path / "x.pte"
    assert "is not a folder: give a folder with config.json" in refused("export", tmp_path / "none", "-o", out)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no config.json" in refused("export", empty, "-o", out)
    (empty / "config.json").write_text("{}")
    assert "has no *.safetensors" in refused("export", empty, "-o", out)
    assert not out.exists()


def test_export_spoiled_models(model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.pte"
    config = (model_folder / "config.json").read_text()
    (model_folder / "config.json").write_text(config[: len(config) // 2])
    assert "is not a model configuration (JSONDecodeError" in refused("export", model_folder, "-o", out)
    (model_folder / "config.json").write_text(json.dumps(json.loads(config) | {"model_type": "zorg"}))
    assert "is no causal language model of the installed transformers" in refused("export", model_folder, "-o", out)
    (model_folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64}))
    assert "model_type='llama'" in (line := refused("export", model_folder, "-o", out))
    assert "is not a Mixture-of-Experts model (no experts in its configuration): use a model with experts" in line
    quantized = json.loads(config) | {"quantization_config": {"quant_method": "bitsandbytes"}}
    (model_folder / "config.json").write_text(json.dumps(quantized))
    assert "are quantized (bitsandbytes), which is not supported yet" in refused("export", model_folder, "-o", out)
    (model_folder / "config.json").write_text(config)
    weights = model_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    line = refused("export", model_folder, "-o", out, "--target", "cpu")
    assert "model.safetensors is cut short or damaged" in line and line.endswith("download it again")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_export_weights_that_do_not_fit_the_configuration(model_folder: Path, tmp_path: Path) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    line = refused("export", model_folder, "-o", tmp_path / "x.pte", "--target", "cpu")
    assert "but config.json asks for" in line and "check that config.json and weights are of the same model" in line
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_export_of_a_router_that_chooses_more_experts_than_there_are(model_folder: Path, tmp_path: Path) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 99}))
    line = refused("export", model_folder, "-o", tmp_path / "x.pte", "--target", "cpu")
    assert "num_experts_per_tok=99 of config.json must be between 1 and its 8 experts" in line
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


ROPE = {"factor": 4.0, "rope_theta": 10000.0}
FACTORS = {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("dynamic", {"rope_parameters": {**ROPE, "rope_type": "dynamic"}}),
        ("longrope", {"rope_parameters": {**ROPE, **FACTORS, "rope_type": "longrope"}}),
        ("dynamic", {"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": {"type": "dynamic", "factor": 4.0}}),
    ],
    ids=["dynamic", "longrope", "as before transformers 5"],
)
def test_export_of_positions_that_are_encoded_by_length(
    kind: str, change: dict[str, object], model_folder: Path, tmp_path: Path
) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps(config | change))
    for how in (("-o", tmp_path / "x.pte"), ("--check",)):
        line = refused("export", model_folder, "--target", "cpu", *how, steps=("reading headers",))
        assert f"RoPE of type {kind} is not supported: its frequencies depend on the length of the text; use" in line
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_export_of_a_model_for_very_short_texts(model_folder: Path, tmp_path: Path) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4}))
    line = refused("export", model_folder, "-o", tmp_path / "x.pte", "--target", "cpu")
    assert "the model's max_position_embeddings=4 is less than the smallest cache, 8: use another model" in line


def test_export_without_a_tokenizer(model_folder: Path, tmp_path: Path) -> None:
    for path in model_folder.glob("tokenizer*"):
        path.unlink()
    assert "has no usable tokenizer" in refused("export", model_folder, "-o", tmp_path / "x.pte", "--target", "cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rms_norm_eps": math.nan}, "rms_norm_eps=nan in {config} must be a finite number: use the number"),
        ({"rope_parameters": {"rope_theta": 0, "rope_type": "default"}}, "rope_theta=0 in {config} must be greater"),
        ({"hidden_act": "nosuch"}, "hidden_act='nosuch' in {config} is no activation of transformers: put the name"),
    ],
    ids=["NaN", "RoPE", "activation"],
)
def test_export_of_numbers_that_nothing_can_be_computed_with(
    change: dict[str, object], message: str, model_folder: Path, tmp_path: Path
) -> None:
    file = model_folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    for how in (("-o", tmp_path / "x.pte"), ("--check",)):
        line = refused("export", model_folder, "--target", "cpu", *how, steps=("reading headers",))
        assert message.format(config=file) in line
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
