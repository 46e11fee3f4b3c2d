"""GGUF files: codes kept, other types rounded, families, configuration and tokenizer, what is refused."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from executorch_moe.export.build import check_folder
from executorch_moe.export.check import dequantized
from executorch_moe.export.checkpoint.gguf import model_folder
from executorch_moe.export.checkpoint.gguf.blocks import GgufEncoding
from executorch_moe.export.checkpoint.gguf.changes import Change
from executorch_moe.export.checkpoint.whole import load_model
from executorch_moe.export.models.pretrained import tokenizer_json
from executorch_moe.export.options import ExportOptions, Target
from executorch_moe.kernels import unpack_experts

from .gguf_files import TYPES, big_model, check_configuration, gguf, only, write
from .stored import LAYERS, codes_of, edit_json, experts_of, logits_error, of_experts, streamed

if not hasattr(importlib.import_module("transformers.integrations.gguf"), "convert_gguf_tokenizer"):
    pytest.skip("needs a transformers that converts tokenizers of GGUF files", allow_module_level=True)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q4_K"])
def test_codes_are_kept(kind: str, tmp_path: Path) -> None:
    written = write(tmp_path / "model.gguf", big_model(), only(kind))
    model = streamed(model_folder(written.path))
    (record,) = model.load()
    packed = experts_of(model)
    assert record.algorithm == "kept" and packed.group_size == 32 and (packed.w13_zero is None) == (kind == "Q4_0")
    assert 0 < (record.error or 0) < (4e-3 if kind == "Q4_0" else 1e-2)
    for name, expected in written.reference.state_dict().items():
        if ".experts." not in name:
            assert torch.equal(model.model.get_parameter(name), expected), name
    assert logits_error(model.model, written.reference) < 1e-2

    def nibbles(prefix: str) -> Tensor:
        """Codes of an expert by ggml's definition of the types, value by value."""
        expert, projection = int(prefix.split(".")[5]), prefix.split(".")[6].removesuffix("_proj")
        rows = written.blocks[f"blk.0.ffn_{projection}_exps.weight"][expert]
        run, skip, block = (16, {"Q4_0": 2, "Q4_1": 4}.get(kind, 0), {"Q4_0": 18, "Q4_1": 20}.get(kind, 0))
        if kind == "Q4_K":
            run, skip, block = 32, 16, 144
        runs = rows.reshape(len(rows), -1, block)[:, :, skip:].reshape(len(rows), -1, run)
        both = np.concatenate([runs & 15, runs >> 4], -1).reshape(len(rows), -1)
        return torch.from_numpy(both.astype(np.float32)) - 8

    for found, expected in zip(codes_of(packed), of_experts(nibbles), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "MXFP4", "F16", "BF16", "F32"])
def test_other_types_are_rounded(kind: str, tmp_path: Path) -> None:
    written = write(tmp_path / "model.gguf", big_model(), only(kind))
    model = streamed(model_folder(written.path), "bf16")
    (record,) = model.load()
    for name, expected in written.reference.state_dict().items():
        if ".experts." not in name:
            assert torch.equal(model.model.get_parameter(name), expected), name
    exact = kind in ("MXFP4", "BF16")
    assert (record.error == 0) == exact and (record.error or 0) < 3e-3
    check_configuration(model.model.config, written.reference.config)
    assert logits_error(model.model, written.reference) < 1e-2
    rounded = streamed(model_folder(written.path))
    (record,) = rounded.load()
    assert record.algorithm == "minmax" and 0.03 < (record.error or 0) < 0.15
    coded = streamed(model_folder(written.path), "mxfp4")
    (record,) = coded.load()
    assert (record.algorithm == "kept" and record.error == 0) == (kind == "MXFP4")
    if kind == "MXFP4":
        for value, exact in zip(*(unpack_experts(experts_of(each)) for each in (coded, model)), strict=True):
            assert torch.equal(value, exact)


@pytest.mark.parametrize("algorithm", ["minmax", "hqq"])
def test_layers_of_several_types(algorithm: str, tmp_path: Path) -> None:
    """As in Q4_K_M: some down projections have more bits. Codes of the others are kept."""
    from executorch_moe.backends.fusion import FusionOptions
    from executorch_moe.export.checkpoint.streaming import StreamedModel

    kinds = {"down": "Q6_K", "output": "Q6_K", "inp": "F32"}
    written = write(
        tmp_path / "model.gguf", big_model(), lambda name: next((kinds[k] for k in kinds if k in name), "Q4_K")
    )
    options = FusionOptions("w4a16", 32, algorithm=algorithm)
    model = StreamedModel(model_folder(written.path), torch.float32, "eager", options)
    (record,) = model.load()
    assert record.algorithm == f"kept, {algorithm}" and 0.01 < (record.error or 0) < 0.1
    experts = written.reference.get_submodule(model.layers[0].name)
    found = dequantized(model.layers[0].layout, experts_of(model))
    gate_up, down = (found[name] - experts.get_parameter(name) for name in ("gate_up_proj", "down_proj"))
    assert gate_up.norm() < 1e-2 * experts.gate_up_proj.norm() and 0.02 < down.norm() / experts.down_proj.norm() < 0.15
    empty = StreamedModel(model_folder(written.path), torch.float32, "eager", options)
    empty.load_placeholders()
    shapes = [{name: t.shape for name, t in m.model.state_dict().items()} for m in (model, empty)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("gate", "up", "down"),
    [("Q4_0", "Q4_0", "Q4_1"), ("Q4_1", "Q4_1", "Q4_0"), ("Q4_0", "Q4_K", "Q4_0"), ("Q4_K", "Q4_0", "Q4_1")],
)
def test_matrices_with_and_without_zero_points(gate: str, up: str, down: str, tmp_path: Path) -> None:
    """As in files of Q4_0, where some down projections are Q4_1."""
    kinds = {"gate_exps": gate, "up_exps": up, "down_exps": down}
    written = write(
        tmp_path / "model.gguf", big_model(), lambda name: next((kinds[k] for k in kinds if k in name), "F32")
    )
    model = streamed(model_folder(written.path))
    (record,) = model.load()
    assert record.algorithm == "kept" and (record.error or 0) < 1e-2
    experts = written.reference.get_submodule(model.layers[0].name)
    for name, value in dequantized(model.layers[0].layout, experts_of(model)).items():
        expected = experts.get_parameter(name)
        assert (value - expected).norm() < 1e-2 * expected.norm(), name
    empty = streamed(model_folder(written.path))
    empty.load_placeholders()
    shapes = [{name: t.shape for name, t in m.model.state_dict().items()} for m in (model, empty)]
    assert shapes[0] == shapes[1]


def test_groups_that_columns_cut() -> None:
    """Only whole groups of columns can be moved with their codes."""
    whole = Change(columns=(*range(32, 64), *range(32)))
    assert whole.keeps_groups(32) and GgufEncoding("Q4_0", whole).group_size == 32
    cut = Change(columns=(*range(16, 64), *range(16)))
    assert not cut.keeps_groups(32) and GgufEncoding("Q4_0", cut).group_size == 0
    assert not GgufEncoding("MXFP4", cut).microscaled and GgufEncoding("MXFP4", whole).microscaled
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    stored = {"codes": torch.from_numpy(gguf.quants.quantize(weight.numpy(), TYPES.Q4_0))}
    values = GgufEncoding("Q4_0").dequantize(stored)
    for change in (whole, cut):
        assert torch.equal(GgufEncoding("Q4_0", change).dequantize(stored), values[:, list(change.columns or ())])
    assert torch.equal(GgufEncoding("Q4_0", whole).codes(stored).dequantize(), values[:, list(whole.columns or ())])


def test_configuration_and_tokenizer(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    written = write(tmp_path / "model.gguf", big_model(), only("Q4_0"))
    options = ExportOptions(str(written.path), target=Target("cpu"))
    folder = check_folder(options)
    assert folder == model_folder(written.path)  # made once
    config = json.loads((folder / "config.json").read_text())
    expected = written.reference.config
    for name in ("hidden_size", "moe_intermediate_size", "num_experts", "head_dim", "norm_topk_prob", "vocab_size"):
        assert config[name] == getattr(expected, name), name
    assert config["eos_token_id"] == 94 and config["tie_word_embeddings"] is False
    tokenizer = Tokenizer.from_str(tokenizer_json(folder))
    assert tokenizer.encode("ab<|end|>b").ids == [95, 94, ord("b") - 33]
    with pytest.raises(NotImplementedError, match=r"are quantized \(GGUF with Q4_0 .*which only --experts ours reads"):
        load_model(folder, torch.float32)


@pytest.mark.parametrize(
    ("split", "text", "parts"),
    [
        ("qwen2", "It's 12345", ["It", "'s", " ", "1", "2", "3", "4", "5"]),
        ("glm4", "It'S 12345", ["It", "'S", " ", "123", "45"]),
        ("deepseek-v3", "It's 12345 \u6f22\u5b57+\n", ["It", "'s", " ", "123", "45", " ", "\u6f22\u5b57", "+\n"]),
        ("olmo", "It's 12345", ["It", "'s", " 12345"]),
        ("kimi-k2", "", None),
    ],
)
def test_how_text_is_split(split: str, text: str, parts: list[str] | None, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    def other(writer: Any) -> None:
        writer.kv_data[0].pop("tokenizer.ggml.pre")
        writer.add_tokenizer_pre(split)

    path = write(tmp_path / "model.gguf", big_model(), only("Q4_0"), change=other).path
    if parts is None:
        with pytest.raises(ValueError, match=r"cannot be converted \(tokenizer\.ggml\.pre='kimi-k2', supported: deep"):
            model_folder(path)
        return
    tokenizer: Any = Tokenizer.from_str(tokenizer_json(model_folder(path)))
    found = tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in found] == parts


def test_a_folder_with_a_configuration_of_its_own(tmp_path: Path) -> None:
    written = write(tmp_path / "model.gguf", big_model(), only("Q4_0"))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model.gguf").symlink_to(written.path)
    written.reference.config.save_pretrained(folder)
    model = streamed(folder)
    model.load()
    assert logits_error(model.model, written.reference) < 1e-2


def test_a_folder_with_two_models(file: Path, tmp_path: Path) -> None:
    """As of a repository on the Hub, with several quantizations of a model."""
    for name in ("model-Q4_0.gguf", "model-Q8_0.gguf"):
        (tmp_path / name).symlink_to(file)
    (tmp_path / "config.json").write_bytes((model_folder(file) / "config.json").read_bytes())
    with pytest.raises(
        ValueError, match=r"is in model-Q4_0\.gguf and in model-Q8_0\.gguf of .*: give one of the files"
    ):
        streamed(tmp_path)


def test_the_other_order_of_bytes(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "qwen3moe", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(NotImplementedError, match=r"big\.gguf has big-endian numbers, which are not supported"):
        model_folder(tmp_path / "big.gguf")


def test_a_model_in_several_files(tmp_path: Path) -> None:
    written = write(tmp_path / "model.gguf", big_model(), only("Q4_0"), most_tensors=6)
    files = sorted(tmp_path.glob("model-*.gguf"))
    assert len(files) == 3
    folders = [model_folder(file) for file in files]
    assert len({(folder / "config.json").read_bytes() for folder in folders}) == 1
    model = streamed(folders[1])
    model.load()
    assert len(model.shards.files) == 3
    assert logits_error(model.model, written.reference) < 1e-2


def test_rope_scaling(tmp_path: Path) -> None:
    def yarn(writer: Any) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(16)

    written = write(tmp_path / "yarn.gguf", big_model(), only("Q4_0"), change=yarn)
    rope = json.loads((model_folder(written.path) / "config.json").read_text())["rope_parameters"]
    assert rope["rope_type"] == "yarn" and rope["factor"] == 4 and rope["original_max_position_embeddings"] == 16
    written = write(
        tmp_path / "long.gguf",
        big_model(),
        only("Q4_0"),
        change=lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE),
    )
    with pytest.raises(NotImplementedError, match=r"rope.scaling.type='longrope' is not supported"):
        model_folder(written.path)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "model.gguf", big_model(), only("Q4_0")).path


@pytest.mark.parametrize("length", [0, 3, 100, 2000, -1000])
def test_a_truncated_file(length: int, file: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"cut\.gguf is cut short, damaged or not a GGUF file .*download it again"):
        model_folder(cut)


def test_files_that_are_missing_or_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model='.*none\.gguf' is not a file"):
        model_folder(tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("hello " * 100)
    with pytest.raises(ValueError, match=r"text\.gguf is cut short, damaged or not a GGUF file \(GGUF magic invalid\)"):
        model_folder(tmp_path / "text.gguf")
    (tmp_path / "m-00001-of-00002.gguf").write_text("")
    with pytest.raises(FileNotFoundError, match=r"lacks m-00002-of-00002\.gguf: download all 2 parts"):
        model_folder(tmp_path / "m-00001-of-00002.gguf")


def test_a_transformers_that_is_too_old(file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "transformers.integrations.gguf", ModuleType("gguf"))
    (tmp_path / "old.gguf").symlink_to(file)
    with pytest.raises(
        RuntimeError, match=r"does not convert the tokenizer in .*old\.gguf exactly: install transformers"
    ):
        model_folder(tmp_path / "old.gguf")


def test_without_the_package_gguf(file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "new.gguf").symlink_to(file)
    with pytest.raises(
        RuntimeError, match=r"needs the package gguf, which is not installed: pip install 'executorch-moe"
    ):
        model_folder(tmp_path / "new.gguf")


def test_what_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write(path, big_model(), only("Q4_0"), "qwen3vlmoe")
    with pytest.raises(NotImplementedError, match=r"model\.gguf: architecture 'qwen3vlmoe' is not supported yet"):
        model_folder(path)
    write(path, big_model(), only("Q4_0"), change=lambda writer: writer.kv_data[0].pop("qwen3moe.expert_used_count"))
    with pytest.raises(ValueError, match=r"model\.gguf lacks qwen3moe\.expert_used_count: download it again"):
        model_folder(path)
    extra = np.zeros((4, 32), dtype=np.float32)
    write(path, big_model(), only("Q4_0"), change=lambda writer: writer.add_tensor("blk.0.extra.weight", extra))
    with pytest.raises(ValueError, match=r"has blk\.0\.extra\.weight, which Qwen3MoeForCausalLM does not use"):
        streamed(model_folder(path))
    other = np.zeros((4, 84), dtype=np.uint8)
    write(path, big_model(), only("Q4_0"), change=lambda w: w.add_tensor("blk.0.x.weight", other, raw_dtype=TYPES.Q2_K))
    with pytest.raises(NotImplementedError, match=r"blk\.0\.x\.weight of .* has the type Q2_K, which is not supported"):
        model_folder(path)


def test_scales_that_are_not_finite(tmp_path: Path) -> None:
    def spoil(writer: Any) -> None:
        (tensors,) = writer.tensors
        tensors["blk.0.ffn_up_exps.weight"].tensor[2, 5, :2] = np.frombuffer(np.float16("inf").tobytes(), np.uint8)

    written = write(tmp_path / "model.gguf", big_model(), only("Q4_0"), change=spoil)
    with pytest.raises(ValueError, match=r"^blk\.0\.ffn_up_exps\.weight\[2\] in .*model\.gguf holds NaN or Inf"):
        streamed(model_folder(written.path)).load()


def test_widths_that_do_not_fit(file: Path) -> None:
    folder = model_folder(file)
    text = (folder / "config.json").read_text()
    try:
        edit_json(folder / "config.json", moe_intermediate_size=128)
        with pytest.raises(ValueError, match=rf"experts.* makes {LAYERS}mlp.experts.* but config.json asks for"):
            streamed(folder)
    finally:
        (folder / "config.json").write_text(text)
