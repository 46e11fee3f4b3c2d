"""GGUF files of several architectures: names, order of values, configurations, what is refused."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from executorch_moe.export.check import dequantized
from executorch_moe.export.checkpoint.gguf import model_folder
from executorch_moe.kernels import unpack_experts

from ...families import by_name
from .gguf_files import check_configuration, gguf, only, write
from .stored import experts_of, logits_error, streamed

if not hasattr(importlib.import_module("transformers.integrations.gguf"), "convert_gguf_tokenizer"):
    pytest.skip("needs a transformers that converts tokenizers of GGUF files", allow_module_level=True)


FAMILIES = {
    "qwen2_moe": "qwen2moe",
    "mixtral": "llama",
    "olmoe": "olmoe",
    "deepseek_v3": "deepseek2",
    "glm4_moe": "glm4moe",
    "qwen3_next": "qwen3next",
    "qwen3_5_moe_text": "qwen35moe",
}
"""Name of the family -> architecture in files."""


@pytest.mark.parametrize(
    ("family", "variant"), [*((name, "") for name in FAMILIES), ("deepseek_v3", "old"), ("qwen3_5_moe_text", "fused")]
)
def test_other_families(family: str, variant: str, tmp_path: Path) -> None:
    written = write(tmp_path / "model.gguf", model_of(family), only("Q4_0"), FAMILIES[family], variant=variant)
    model = streamed(model_folder(written.path))
    assert {record.algorithm for record in model.load()} == {"kept"}
    for name, expected in written.reference.state_dict().items():
        if ".experts." not in name:
            assert torch.equal(model.model.state_dict()[name], expected), name
    # Experts of four layers compute in bf16, in the models with linear attention.
    assert logits_error(model.model, written.reference) < (2e-2 if family == "qwen3_5_moe_text" else 1e-2)
    check_configuration(model.model.config, written.reference.config)


def model_of(family: str) -> Any:
    """A small model. Keys of DeepSeek's heads have a width of 32, because blocks are along them in files."""
    kind = by_name(family)
    changed: dict[str, Any] = {}
    if family == "deepseek_v3":
        changed = {"qk_nope_head_dim": 32}
    if family == "qwen3_5_moe_text":
        rope = {**kind.options["rope_parameters"], "mrope_section": [2, 1, 1], "mrope_interleaved": True}
        changed = {"rope_parameters": rope}
    return dataclasses.replace(kind, options={**kind.options, **changed}).model()


def test_qwen35_is_what_transformers_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers loads this architecture from GGUF files itself. It asks for a package that it does not use then."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(transformers.modeling_utils, "is_accelerate_available", lambda *_, **__: True)
    written = write(tmp_path / "model.gguf", model_of("qwen3_5_moe_text"), only("Q8_0"), "qwen35moe")
    model = streamed(model_folder(written.path), "bf16")
    model.load()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    state = model.model.state_dict()
    for name, expected in theirs.state_dict().items():
        if ".experts." not in name:
            assert torch.equal(state[name], expected), name
    experts = theirs.get_submodule(model.layers[1].name)
    for name, value in dequantized(model.layers[1].layout, experts_of(model, 1)).items():
        assert torch.equal(value, experts.get_parameter(name).bfloat16().float()), name
    check_configuration(model.model.config, theirs.config)


def test_yarn_of_deepseek(tmp_path: Path) -> None:
    yarn = {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
        "beta_fast": 16.0, "beta_slow": 2.0, "mscale": 0.707, "mscale_all_dim": 0.707,
    }  # fmt: skip
    model = model_of("deepseek_v3")
    config = type(model.config)(**{**model.config.to_dict(), "rope_parameters": yarn})
    torch.manual_seed(0)
    written = write(tmp_path / "model.gguf", type(model)._from_config(config).eval(), only("Q8_0"), "deepseek2")
    found = streamed(model_folder(written.path), "bf16")
    found.load()
    check_configuration(found.model.config, written.reference.config)
    assert logits_error(found.model, written.reference) < 1e-2


def test_layers_for_prediction_are_left_out(tmp_path: Path) -> None:
    def with_one_more(writer: Any) -> None:
        writer.kv_data[0].pop("glm4moe.block_count")
        writer.add_block_count(3)
        writer.add_nextn_predict_layers(1)
        writer.add_tensor("blk.2.nextn.eh_proj.weight", np.zeros((64, 128), dtype=np.float32))
        writer.add_tensor("blk.2.attn_q.weight", np.zeros((64, 64), dtype=np.float32))

    written = write(tmp_path / "model.gguf", model_of("glm4_moe"), only("Q4_0"), "glm4moe", change=with_one_more)
    model = streamed(model_folder(written.path))
    model.load()
    assert logits_error(model.model, written.reference) < 1e-2


def test_gpt_oss(tmp_path: Path) -> None:
    """MXFP4 experts, stacked in transformers, with biases; stored gate and up are apart."""
    written = write(tmp_path / "model.gguf", by_name("gpt_oss").model(), only("MXFP4"), "gpt-oss")
    model = streamed(model_folder(written.path), "bf16")
    (record,) = model.load()
    assert record.error == 0 and record.biases
    for name, value in dequantized(model.layers[0].layout, experts_of(model)).items():
        assert torch.equal(value, written.reference.get_submodule(model.layers[0].name).get_parameter(name)), name
    for name, expected in written.reference.state_dict().items():
        if ".experts." not in name:
            assert torch.equal(model.model.get_parameter(name), expected), name
    check_configuration(model.model.config, written.reference.config)
    assert logits_error(model.model, written.reference) < 1e-2
    rounded = streamed(model_folder(written.path))
    (record,) = rounded.load()
    assert record.algorithm == "minmax" and 0.03 < (record.error or 0) < 0.15
    kept = streamed(model_folder(written.path), "mxfp4")
    (record,) = kept.load()
    assert record.algorithm == "kept" and record.error == 0
    for value, exact in zip(*(unpack_experts(experts_of(each)) for each in (kept, model)), strict=True):
        assert torch.equal(value, exact)
    cut = write(
        tmp_path / "cut.gguf",
        by_name("gpt_oss").model(),
        only("MXFP4"),
        "gpt-oss",
        change=lambda writer: writer.tensors[0].pop("blk.0.ffn_up_exps.weight"),
    )
    with pytest.raises(
        ValueError, match=r"has blk\.0\.ffn_gate_exps\.weight, but not gate and up of one shape for model"
    ):
        streamed(model_folder(cut.path))


MIXED = "kept, minmax"


@pytest.mark.parametrize(
    ("up", "down", "algorithm"),
    [
        ("Q4_0", "Q4_0", "kept"),
        ("Q4_1", "Q4_1", "kept"),
        ("Q4_0", "Q8_0", "kept, minmax"),
        ("Q4_1", "Q4_0", "kept, minmax"),
    ],
)
def test_gpt_oss_in_other_types(up: str, down: str, algorithm: str, tmp_path: Path) -> None:
    """Stacked codes, whose gate and up rows alternate in the model: kept if both have one type."""
    kinds = {"ffn_gate_exps": "Q4_0" if algorithm == MIXED else up, "ffn_up_exps": up, "ffn_down_exps": down}
    written = write(
        tmp_path / "model.gguf",
        by_name("gpt_oss").model(),
        lambda name: next((kinds[part] for part in kinds if part in name), "F32"),
        "gpt-oss",
    )
    model = streamed(model_folder(written.path))
    (record,) = model.load()
    assert record.algorithm == algorithm
    assert logits_error(model.model, written.reference) < (1e-2 if algorithm == "kept" else 0.2)
    experts = written.reference.get_submodule(model.layers[0].name)
    for name, value in dequantized(model.layers[0].layout, experts_of(model)).items():
        expected = experts.get_parameter(name)
        exact = algorithm == "kept" or name == ("gate_up_proj" if up == "Q4_0" else "down_proj") or "bias" in name
        assert (value - expected).norm() < (1e-2 if exact else 0.15) * expected.norm(), name
    empty = streamed(model_folder(written.path))
    empty.load_placeholders()
    shapes = [{name: t.shape for name, t in m.model.state_dict().items()} for m in (model, empty)]
    assert shapes[0] == shapes[1]
    eight = streamed(model_folder(written.path), "w4a8")
    assert {layer.kept for layer in eight.layers} == {None}


def without(key: str) -> Callable[[Any], object]:
    return lambda writer: writer.kv_data[0].pop(f"deepseek2.{key}")


def without_tensor(name: str) -> Callable[[Any], object]:
    return lambda writer: writer.tensors[0].pop(name)


def with_softmax(writer: Any) -> None:
    writer.kv_data[0].pop("deepseek2.expert_gating_func")
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("expert_gating_func"), r"deepseek2\.expert_gating_func is missing, which is not supported"),
        (with_softmax, r"deepseek2\.expert_gating_func=1 is not supported \(only 2, sigmoid"),
        (lambda w: w.add_attn_temperature_scale(0.1), r"deepseek2\.attention\.temperature_scale=0\.1 is not supported"),
        (without("attention.kv_lora_rank"), r"lacks deepseek2\.attention\.kv_lora_rank"),
        (without_tensor("blk.1.attn_v_b.weight"), r"has blk\.1\.attn_k_b\.weight, but not keys and values of shapes"),
        (without_tensor("blk.1.exp_probs_b.bias"), r"model\.gguf\S* lacks 1 tensor .*mlp\.gate\.e_score_correction_b"),
    ],
    ids=["no router", "softmax", "temperature", "no rank", "no values", "no correction"],
)
def test_what_is_refused_of_deepseek(change: Callable[[Any], object], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", model_of("deepseek_v3"), only("Q4_0"), "deepseek2", change=change).path
    with pytest.raises((ValueError, NotImplementedError), match=message):
        streamed(model_folder(path))
