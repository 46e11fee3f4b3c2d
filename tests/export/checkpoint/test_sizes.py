"""Absurd sizes in config.json are refused before a model is built; those of published families are not."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from executorch_moe.export.checkpoint import sizes
from executorch_moe.export.checkpoint.shards import Shards
from executorch_moe.export.checkpoint.sizes import check_sizes
from executorch_moe.export.checkpoint.whole import load_model
from executorch_moe.export.models.pretrained import check_supported, read_config

from ..families import FAMILIES
from .checkpoints import edit_config, save_stacked, stream

ABSURD: tuple[tuple[dict[str, object], str], ...] = (
    ({"num_hidden_layers": 999_999}, r"num_hidden_layers=999999 in .* about .* weights, but the checkpoint has 2 lay"),
    ({"num_experts": 10**9}, r"num_experts=1000000000 in .*, with hidden_size=64, moe_intermediate_size=32, asks for "),
    ({"vocab_size": 10**12}, r"vocab_size=1000000000000 in .* asks for 64\.0 trillion weights or more, but the check"),
    ({"hidden_size": 2**31}, r"hidden_size=2147483648 in .*, with vocab_size=96, asks for 206\.2 billion weights"),
    ({"moe_intermediate_size": 10**15}, r"moe_intermediate_size=1000000000000000 in .* asks for 7\.7e\+17 weights"),
    ({"num_attention_heads": 10**9}, r"num_attention_heads=1000000000 in .*, with head_dim=32, hidden_size=64, asks"),
    ({"num_key_value_heads": 10**9}, "num_key_value_heads=1000000000 in .* asks for 2.0 trillion weights or more, but"),
    ({"head_dim": 10**30}, r"head_dim=1000000000000000000000000000000 in .* asks for 1\.3e\+32 weights"),
    ({"hidden_size": "64"}, "hidden_size='64' in .*config.json must be a whole number of at least 1: use the number"),
    ({"num_hidden_layers": -1}, "num_hidden_layers=-1 in .* must be a whole number of at least 1"),
    ({"num_experts": 4.0}, "num_experts=4.0 in .* must be a whole number"),
    ({"vocab_size": float("nan")}, "vocab_size=nan in .* must be a finite number"),
    ({"num_experts_per_tok": True}, "num_experts_per_tok=True in .* must be a whole number"),
    ({"max_position_embeddings": 0}, "max_position_embeddings=0 in .* must be a whole number"),
)


@pytest.mark.parametrize(("changes", "message"), ABSURD, ids=[str(changes) for changes, _ in ABSURD])
def test_absurd_sizes_are_refused_before_anything_is_built(
    spoiled: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], message: str
) -> None:
    def built(*_: object, **__: object) -> None:
        raise AssertionError("a model was built")

    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_config", built)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", built)
    edit_config(spoiled, **changes)
    for read in (stream, lambda folder: load_model(folder, torch.float32)):
        start = time.perf_counter()
        with pytest.raises(ValueError, match=message):
            read(spoiled)
        assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    "text",
    ["[]", "7", "null", "{", "[" * 100_000, '{"model_type": "qwen3_moe", "quantization_config": "fp8"}', "\ufeff{}"],
)
def test_a_config_that_is_none(spoiled: Path, text: str) -> None:
    (spoiled / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json is not a model configuration .*: use the one that"):
        check_supported(spoiled)


@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
def test_no_family_is_taken_for_absurd(name: str, tmp_path: Path) -> None:
    save_stacked(name, tmp_path)
    shards, config = Shards(tmp_path), read_config(tmp_path)
    check_sizes(config, shards)
    for field in ("num_hidden_layers", "vocab_size", "hidden_size", *sizes.EXPERTS):
        if field in config:
            with pytest.raises(ValueError, match=f"^{field}=1000000000 in "):
                check_sizes(config | {field: 10**9}, shards)
