"""Damaged checkpoints: each damage is refused by a message that names it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from executorch_moe.backends.fusion import FusionOptions
from executorch_moe.export.checkpoint.shards import INDEX_FILE
from executorch_moe.export.checkpoint.streaming import StreamedModel
from executorch_moe.export.checkpoint.whole import load_model
from executorch_moe.kernels import SCHEMES

from .checkpoints import GATE, NORM, cut, edit_config, edit_index, edit_shard, save_stacked, shard_of, stream


def remove_expert(folder: Path) -> None:
    edit_shard(folder, GATE, lambda weights: weights.pop(GATE))
    edit_index(folder, lambda index: index.pop(GATE))


def add_expert(folder: Path) -> None:
    name = GATE.replace("experts.2", "experts.4")
    edit_shard(folder, GATE, lambda weights: weights.update({name: weights[GATE].clone()}))
    edit_index(folder, lambda index: index.update({name: index[GATE]}))


def remove_norm(folder: Path) -> None:
    edit_shard(folder, NORM, lambda weights: weights.pop(NORM))
    edit_index(folder, lambda index: index.pop(NORM))


def add_tensor(folder: Path) -> None:
    edit_shard(folder, NORM, lambda weights: weights.update({"model.extra.weight": weights[NORM].clone()}))
    edit_index(folder, lambda index: index.update({"model.extra.weight": index[NORM]}))


def as_fp8(weights: dict[str, torch.Tensor]) -> None:
    weights[GATE] = weights[GATE].to(torch.float8_e4m3fn)


DAMAGES: tuple[tuple[str, Callable[[Path], object], str], ...] = (
    ("missing shard", lambda f: shard_of(f, GATE).unlink(), r"lacks model-\d+-of-\d+.safetensors of \d+ files"),
    (
        "extra shard",
        lambda f: shutil.copy(shard_of(f, GATE), f / "model-00099-of-00099.safetensors"),
        "has model-00099",
    ),
    ("no index", lambda f: (f / INDEX_FILE).unlink(), f"neither {INDEX_FILE} nor model.safetensors"),
    ("bad index", lambda f: (f / INDEX_FILE).write_text("{}"), r"is not an index of weights \(KeyError"),
    ("cut shard", lambda f: cut(shard_of(f, GATE)), "is cut short or damaged"),
    (
        "index names another file",
        lambda f: edit_index(f, lambda index: index.update({GATE: index[NORM]})),
        f"holds {GATE}, but it does not",
    ),
    (
        "index lacks a tensor",
        lambda f: edit_index(f, lambda index: index.pop(GATE)),
        f"holds {GATE}, which .* does not list",
    ),
    ("missing expert", remove_expert, rf"lacks 1 tensor \({GATE}\)"),
    ("extra expert", add_expert, r"experts.4.gate_proj.weight\) beyond the 4 experts"),
    ("missing tensor", remove_norm, r"lacks 1 tensor \(model.norm.weight\)"),
    ("extra tensor", add_tensor, r"1 tensor \(model.extra.weight\) that Qwen3MoeForCausalLM does not use"),
    (
        "shape of an expert",
        lambda f: edit_shard(f, GATE, lambda w: w.update({GATE: w[GATE][:16].clone()})),
        rf"{GATE} has shape \[16, 64\], but model.layers.1.mlp.experts.0.gate_proj.weight has \[32, 64\]",
    ),
    (
        "shape of all experts",
        lambda f: edit_config(f, moe_intermediate_size=64),
        r"makes model.layers.0.mlp.experts.down_proj \[4, 64, 32\], but config.json asks for \[4, 64, 64\]",
    ),
    (
        "shape of another weight",
        lambda f: edit_config(f, vocab_size=97),
        r"\[96, 64\], but config.json asks for \[97, 64\]",
    ),
    ("type", lambda f: edit_shard(f, GATE, as_fp8), f"{GATE} of .* is stored as F8_E4M3, expected BF16"),
    (
        "activation",
        lambda f: edit_config(f, hidden_act="gelu"),
        r"experts model.model.layers.0.mlp.experts \(Qwen3MoeExperts\) not fused: computes something else than",
    ),
)


@pytest.mark.parametrize(("damage", "message"), [pytest.param(d, m, id=name) for name, d, m in DAMAGES])
def test_a_damaged_checkpoint_is_named(spoiled: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(spoiled)
    with pytest.raises((ValueError, NotImplementedError, FileNotFoundError), match=message):
        stream(spoiled)


@pytest.mark.parametrize(
    "name",
    [
        GATE,
        NORM,
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.k_norm.weight",
        "model.layers.1.mlp.gate.weight",
    ],
)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_nan_and_inf_are_named(spoiled: Path, name: str, value: str) -> None:
    edit_shard(spoiled, name, lambda weights: weights[name].view(-1)[-1:].fill_(float(value)))
    named = rf"^{re.escape(name)} in .*/model-\d+-of-\d+\.safetensors holds NaN or Inf: compare the file's checksum"
    for scheme in SCHEMES:
        with pytest.raises(ValueError, match=named):
            stream(spoiled, scheme).load()
    with pytest.raises(ValueError, match="holds NaN or Inf"):
        load_model(spoiled, torch.float32)


@pytest.mark.parametrize("kind", ["router", "down_proj_bias", "sinks"])
def test_nan_in_biases_and_sinks(tmp_path: Path, kind: str) -> None:
    save_stacked("gpt_oss", tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if kind in name)
    weights[name].view(-1)[0] = float("nan")
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"^{re.escape(name)} in .*model\.safetensors holds NaN or Inf"):
        stream(tmp_path).load()


def test_values_that_the_models_type_cannot_hold(spoiled: Path) -> None:
    edit_shard(spoiled, NORM, lambda weights: weights[NORM].fill_(3.4e38))
    stream(spoiled).load()  # as fp32
    streamed = StreamedModel(spoiled, torch.bfloat16, "eager", FusionOptions("w4a16", 32))
    with pytest.raises(ValueError, match=rf"^{NORM} of .* holds values that bfloat16 cannot hold: export with --dtype"):
        streamed.load()


def test_group_size_is_checked_before_anything_is_read(sharded: Path) -> None:
    with pytest.raises(ValueError, match="not fused: hidden size H=64 must be a multiple of group_size=128"):
        stream(sharded, group_size=128)
