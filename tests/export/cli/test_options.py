"""`ExportOptions` as one object: resolved once, as JSON for a child process, and as artifacts store it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from executorch_moe.backends.fusion import FusionOptions
from executorch_moe.export.bench.model import ModelBenchmark
from executorch_moe.export.options import Context, Dense, Experts, ExportOptions, Target
from executorch_moe.export.report.metadata import made_from, read_made_from, stored_options


def full(folder: Path) -> ExportOptions:
    (folder / "configs.json").write_text("{}")
    return ExportOptions(
        "synthetic:tiny",
        folder / "x.pte",
        experts=Experts("w4a8", 64, "minmax", "upstream"),
        dense=Dense("int4", "int8", "int8"),
        target=Target("h200", "fp32", folder / "configs.json"),
        context=Context(77, "logits"),
        layers=3,
        seed=11,
        placeholder_weights=True,
    )


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("executorch_moe.backends.cuda.cross.target.check_target", lambda target: None)
    monkeypatch.setattr("executorch_moe.export.options.read_configs", lambda path: {})


def test_json_gives_the_same_options(tmp_path: Path) -> None:
    for options in (full(tmp_path), ExportOptions("tiny", target=Target("cpu"))):
        assert ExportOptions.from_json(options.to_json()) == options


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"thin": True}, "ExportOptions has the unknown key 'thin': use model, out, experts, dense"),
        ({"experts": {"schema": "w4a16"}}, "Experts has the unknown key 'schema': use scheme, group_size"),
        ({"dense": "int8"}, "Dense is 'int8', expected a JSON object"),
        ({"target": {"name": "tpu"}}, "target='tpu' is unknown"),
    ],
)
def test_json_with_other_keys_is_refused(change: dict[str, object], message: str) -> None:
    text = json.dumps({"model": "tiny", "target": {"name": "cpu"}} | change)
    with pytest.raises(ValueError, match=message):
        ExportOptions.from_json(text)
    with pytest.raises(ValueError, match="lacks the key 'model'"):
        ExportOptions.from_json("{}")


@pytest.mark.parametrize("gpu", [True, False])
def test_auto_is_resolved_when_the_options_are_made(gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    options = ExportOptions("tiny", tmp_path / "x.pte")
    assert options.target == (Target("cuda", "bf16") if gpu else Target("cpu", "fp32"))
    assert ExportOptions("tiny").target == Target("cuda", "bf16")  # nothing is written: no GPU is needed
    assert replace(options, out=None).target == options.target


def test_group_size_has_one_default() -> None:
    import inspect

    from executorch_moe.export.cli.export import export
    from executorch_moe.export.models import synthetic
    from executorch_moe.export.quantize.experts import quantize_experts_
    from executorch_moe.kernels import pack_experts

    functions = (export, quantize_experts_, pack_experts, synthetic.build)
    defaults = {inspect.signature(function).parameters["group_size"].default for function in functions}
    assert defaults == {Experts().group_size} == {FusionOptions().group_size}


# The record and the metadata of artifacts that were exported before options were nested.
RECORDED = {
    "model": "synthetic:tiny", "out": "x.pte", "target": "h200", "scheme": "w4a8", "group_size": 64,
    "max_context": 77, "dtype": "fp32", "output": "logits", "experts": "upstream", "dense": "int4", "lm_head": "int8",
    "embedding": "int8", "layers": 3, "seed": 11, "thin": True, "algorithm": "minmax",
}  # fmt: skip
MADE_FROM = (
    '{"model": "synthetic:tiny", "scheme": "w4a8", "group_size": 64, "dtype": "fp32", "output": "logits", '
    '"experts": "upstream", "dense": "int4", "lm_head": "int8", "embedding": "int8", "layers": 3, "seed": 11, '
    '"thin": true, "algorithm": "minmax", "check": false}'
)


def test_stored_options_keep_their_keys(tmp_path: Path) -> None:
    options = full(tmp_path)
    later = {"kernel_configs": str(tmp_path / "configs.json"), "max_batch": 1}
    assert stored_options(options) == RECORDED | later
    assert json.loads(made_from(options)) == {k: v for k, v in json.loads(MADE_FROM).items() if k != "check"}


def test_weights_of_earlier_artifacts_are_made_from_the_same_options(tmp_path: Path) -> None:
    options = full(tmp_path)
    for text in (MADE_FROM, made_from(options)):
        read = read_made_from(text)
        assert (read.model, read.layers, read.seed) == ("synthetic:tiny", 3, 11)
        assert (read.experts, read.dense) == (options.experts, options.dense)
        assert read.target == Target("cuda", "fp32") and read.placeholder_weights
    # The first versions stored fewer keys.
    old = {"model": "synthetic:tiny", "scheme": "w4a16", "group_size": 32, "dtype": "bf16", "seed": 1}
    assert read_made_from(json.dumps(old)).experts == Experts()


def test_records_of_earlier_exports_name_the_model() -> None:
    benchmark = ModelBenchmark("x.pte", "a runtime", "a device", {}, "", [], export={"options": RECORDED})
    assert benchmark.model_name() == "synthetic:tiny, 3 layers, w4a8, experts upstream, dense int4"
