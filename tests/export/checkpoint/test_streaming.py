"""Streaming checkpoints gives the same model as loading them whole, for every stored layout."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from executorch_moe.export.check import dequantized
from executorch_moe.export.checkpoint.formats import check_format
from executorch_moe.export.checkpoint.shards import INDEX_FILE
from executorch_moe.export.checkpoint.whole import load_model
from executorch_moe.kernels import pack_experts

from ..families import FAMILIES, Logits, by_name, tokens
from .checkpoints import GATE, edit_shard, save_fp8, save_hub, save_stacked, stream


@pytest.mark.transformers
@pytest.mark.parametrize("save", [save_hub, save_stacked])
@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
def test_streamed_equals_loaded_whole(name: str, save: Callable[..., Any], tmp_path: Path) -> None:
    if name == "gpt_oss" and save is save_hub:
        pytest.skip("on the Hub its experts are stacked too")
    model: Any = save(name, tmp_path)
    streamed = stream(tmp_path)
    records = streamed.load()
    assert [record.module for record in records] == [f"model.{layer.name}" for layer in streamed.layers]
    assert len(records) == by_name(name).moe_layers
    for layer, record in zip(streamed.layers, records, strict=True):
        parameters = dict(model.get_submodule(layer.name).named_parameters())
        gate_up, down, *biases = layer.layout.canonical({key: p.detach() for key, p in parameters.items()})
        whole = pack_experts(gate_up, down, group_size=32, gate_up_bias=biases[0], down_bias=biases[1])
        streamed_experts: Any = streamed.model.get_submodule(layer.name)
        for key, tensor in whole.tensors().items():
            found = getattr(streamed_experts, key)
            assert (found is None) == (tensor is None)
            assert tensor is None or torch.equal(found, tensor), key
        for key, value in dequantized(layer.layout, streamed_experts.packed()).items():
            assert torch.equal(value, parameters[key]), key
        assert record.bytes_after == whole.nbytes()
        assert record.bytes_before == sum(p.nbytes for p in parameters.values())
    dense = {k: v for k, v in model.state_dict().items() if ".experts." not in k}
    for key, value in streamed.model.state_dict().items():
        assert ".experts." in key or torch.equal(value, dense.pop(key)), key
    assert not dense
    with torch.no_grad():
        expected, actual = Logits(model)(tokens(9)), Logits(streamed.model)(tokens(9))
    # The experts' weights are exact in 4 bits.
    assert (actual - expected).norm() / expected.norm() < 1.5e-2


@pytest.mark.transformers
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_fp8_in_blocks_is_read_as_the_bf16_it_stands_for(name: str, tmp_path: Path) -> None:
    plain = save_fp8(name, tmp_path / "fp8")
    check_format(tmp_path / "fp8")
    found, expected = stream(tmp_path / "fp8"), stream(plain)
    assert found.shards.tensors.keys() == expected.shards.tensors.keys()
    for model in (found, expected):
        model.load()
    state = expected.model.state_dict()
    assert found.model.state_dict().keys() == state.keys()
    for key, value in found.model.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_fp8_that_is_not_whole_or_of_another_kind(tmp_path: Path) -> None:
    save_fp8("qwen3_moe", folder := tmp_path / "fp8")
    with pytest.raises(
        NotImplementedError, match=r"are quantized \(fp8, blocks of 16 x 24 .*which only --experts ours"
    ):
        load_model(folder, torch.float32)
    config, text = folder / "config.json", (folder / "config.json").read_text()
    config.write_text(text.replace("[16, 24]", "[8, 24]"))
    with pytest.raises(
        ValueError, match=r"_scale_inv of .* has shape \[\d, \d\], but .* has \d+ x \d blocks of 8 x 24"
    ):
        stream(folder)
    config.write_text(text.replace("[16, 24]", "null"))
    check_format(folder)
    with pytest.raises(ValueError, match=r"_scale_inv of .* needs one scale, or one for each of \d+ rows"):
        stream(folder)
    config.write_text(text)
    index = json.loads((folder / INDEX_FILE).read_text())
    name, file = next(item for item in index["weight_map"].items() if item[0].endswith("_scale_inv"))
    kept = {key: tensor for key, tensor in load_file(folder / file).items() if key != name}
    save_file(kept, folder / file, {"format": "pt"})
    del index["weight_map"][name]
    (folder / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="is stored as F8_E4M3, expected BF16"):
        stream(folder)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize("name", [GATE, "model.layers.0.self_attn.v_proj.weight"])
@pytest.mark.parametrize("what", ["codes", "scale"])
def test_nan_in_fp8(tmp_path: Path, name: str, code: int, what: str) -> None:
    save_fp8("qwen3_moe", folder := tmp_path / "fp8")
    stored = name if what == "codes" else f"{name}_scale_inv"

    def spoil(weights: dict[str, torch.Tensor]) -> None:
        if what == "codes":
            weights[name].view(torch.uint8).view(-1)[-1] = code
        else:
            weights[stored].view(-1)[0] = float("inf" if code == 0x7F else "nan")

    edit_shard(folder, stored, spoil)
    with pytest.raises(ValueError, match=rf"^{re.escape(stored)} in .* holds NaN or Inf"):
        stream(folder).load()


@pytest.mark.transformers
def test_tied_embeddings(tmp_path: Path) -> None:
    family = by_name("qwen3_moe")
    tied = replace(family, options={**family.options, "tie_word_embeddings": True})
    model: Any = tied.model()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert "lm_head.weight" not in json.loads((tmp_path / INDEX_FILE).read_text())["weight_map"]
    streamed = stream(tmp_path)
    streamed.load()
    with torch.no_grad():
        expected, actual = Logits(model)(tokens(9)), Logits(streamed.model)(tokens(9))
    assert (actual - expected).norm() / expected.norm() < 1.5e-2
    empty = stream(tmp_path)
    empty.load_placeholders()
    for found in (streamed.model, empty.model):
        assert found.lm_head.weight is found.model.embed_tokens.weight  # type: ignore[union-attr]
        assert not any(tensor.is_meta for tensor in found.state_dict().values())
