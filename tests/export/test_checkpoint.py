"""Streaming of checkpoints: the same model as loaded whole, every damage named, and resumed where it was."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from executorch_moe.backends.fusion import FusedLayer, FusionOptions
from executorch_moe.export.check import dequantized
from executorch_moe.export.checkpoint.shards import INDEX_FILE, Shards, read_config
from executorch_moe.export.checkpoint.streaming import StreamedModel
from executorch_moe.export.checkpoint.work_folder import MANIFEST, WorkFolder
from executorch_moe.export.models.pretrained import check_supported, load_model
from executorch_moe.export.report import sizes
from executorch_moe.export.report.sizes import check_sizes
from executorch_moe.kernels import SCHEMES, pack_experts

from .families import FAMILIES, Logits, by_name, tokens

pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file


def save_hub(name: str, folder: Path) -> torch.nn.Module:
    """As checkpoints on the Hub: one matrix an expert, in several files."""
    model: Any = by_name(name).model()
    model.save_pretrained(folder, max_shard_size="40KB")
    return model


def save_stacked(name: str, folder: Path) -> torch.nn.Module:
    """As transformers holds it: stacked experts, in one file."""
    model: Any = by_name(name).model()
    model.config.save_pretrained(folder)
    weights = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return model


def stream(folder: Path, scheme: str = "w4a16", group_size: int = 32) -> StreamedModel:
    # GPT-OSS has no other attention.
    return StreamedModel(folder, torch.float32, "eager", FusionOptions(scheme, group_size))


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
    # The experts' weights are such that 4 bits hold them.
    assert (actual - expected).norm() / expected.norm() < 1.5e-2


BLOCK = (16, 24)  # neither divides the sizes of the weights


def in_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """fp8 codes, the scales of blocks, and the bf16 weight that they stand for, element by element."""
    rows, columns = (-(-size // of) for size, of in zip(weight.shape, BLOCK, strict=True))
    codes, scales = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
    exact = torch.empty_like(weight, dtype=torch.bfloat16)
    for i, j in itertools.product(range(rows), range(columns)):
        part = slice(i * BLOCK[0], (i + 1) * BLOCK[0]), slice(j * BLOCK[1], (j + 1) * BLOCK[1])
        scales[i, j] = weight[part].abs().max() / 448
        codes[part] = (weight[part] / scales[i, j]).to(torch.float8_e4m3fn)
        exact[part] = (codes[part].float() * scales[i, j]).bfloat16()
    return codes, scales, exact


def save_fp8(name: str, folder: Path) -> Path:
    """A model in fp8 as it would be published, and beside it the same in bf16; returns the folder of the latter."""
    save_hub(name, folder)
    plain = folder.parent / "plain"
    shutil.copytree(folder, plain)
    index = json.loads((folder / INDEX_FILE).read_text())
    for file in sorted(set(index["weight_map"].values())):
        quantized, exact = {}, {}
        for key, tensor in load_file(folder / file).items():
            quantized[key] = exact[key] = tensor
            if key.endswith("_proj.weight"):
                quantized[key], quantized[f"{key}_scale_inv"], exact[key] = in_blocks(tensor)
                index["weight_map"][f"{key}_scale_inv"] = file
        save_file(quantized, folder / file, {"format": "pt"})
        save_file(exact, plain / file, {"format": "pt"})
    (folder / INDEX_FILE).write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK)}
    (folder / "config.json").write_text(json.dumps(config))
    return plain


@pytest.mark.transformers
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_fp8_in_blocks_is_read_as_the_bf16_it_stands_for(name: str, tmp_path: Path) -> None:
    plain = save_fp8(name, tmp_path / "fp8")
    check_supported(tmp_path / "fp8")
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
    with pytest.raises(NotImplementedError, match="are in fp8, which only --experts ours reads"):
        load_model(folder, torch.float32)
    config, text = folder / "config.json", (folder / "config.json").read_text()
    config.write_text(text.replace("[16, 24]", "[8, 24]"))
    with pytest.raises(
        ValueError, match=r"_scale_inv of .* has shape \[\d, \d\], but .* has \d+ x \d blocks of 8 x 24"
    ):
        stream(folder)
    config.write_text(text.replace("[16, 24]", "null"))
    with pytest.raises(NotImplementedError, match=r"are quantized \(fp8\), which is not supported yet"):
        check_supported(folder)
    config.write_text(text)
    index = json.loads((folder / INDEX_FILE).read_text())
    name, file = next(item for item in index["weight_map"].items() if item[0].endswith("_scale_inv"))
    kept = {key: tensor for key, tensor in load_file(folder / file).items() if key != name}
    save_file(kept, folder / file, {"format": "pt"})
    del index["weight_map"][name]
    (folder / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="is stored as F8_E4M3, expected BF16"):
        stream(folder)


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
    empty.load_empty()
    for found in (streamed.model, empty.model):
        assert found.lm_head.weight is found.model.embed_tokens.weight  # type: ignore[union-attr]
        assert not any(tensor.is_meta for tensor in found.state_dict().values())


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    save_hub("qwen3_moe", folder)
    return folder


@pytest.fixture
def spoiled(sharded: Path, tmp_path: Path) -> Path:
    """A copy of a sharded checkpoint, to be spoiled."""
    return Path(shutil.copytree(sharded, tmp_path / "model"))


def shard_of(folder: Path, name: str) -> Path:
    index = json.loads((folder / INDEX_FILE).read_text())["weight_map"]
    return folder / str(index[name])


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    change(index["weight_map"])
    (folder / INDEX_FILE).write_text(json.dumps(index))


def edit_shard(folder: Path, name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = shard_of(folder, name)
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


GATE = "model.layers.1.mlp.experts.2.gate_proj.weight"
NORM = "model.norm.weight"


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


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


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
    ("bad index", lambda f: (f / INDEX_FILE).write_text("{}"), r"is no index of weights \(KeyError"),
    ("cut shard", lambda f: cut(shard_of(f, GATE)), "is cut short or damaged"),
    (
        "index names another file",
        lambda f: edit_index(f, lambda index: index.update({GATE: index[NORM]})),
        f"holds {GATE}, but it does not",
    ),
    ("index lacks a tensor", lambda f: edit_index(f, lambda index: index.pop(GATE)), f"holds {GATE}, of which"),
    ("missing expert", remove_expert, rf"lacks 1 tensor \({GATE}\)"),
    ("extra expert", add_expert, r"experts.4.gate_proj.weight\) beyond the 4 experts"),
    ("missing tensor", remove_norm, r"lacks 1 tensor \(model.norm.weight\)"),
    ("extra tensor", add_tensor, r"1 tensor \(model.extra.weight\) that Qwen3MoeForCausalLM has no use for"),
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


def test_values_that_the_models_type_cannot_hold(spoiled: Path) -> None:
    edit_shard(spoiled, NORM, lambda weights: weights[NORM].fill_(3.4e38))
    stream(spoiled).load()  # as fp32
    streamed = StreamedModel(spoiled, torch.bfloat16, "eager", FusionOptions("w4a16", 32))
    with pytest.raises(ValueError, match=rf"^{NORM} of .* holds values that bfloat16 cannot hold: export with --dtype"):
        streamed.load()


ABSURD: tuple[tuple[dict[str, object], str], ...] = (
    ({"num_hidden_layers": 999_999}, r"num_hidden_layers=999999 in .* about .* weights, but the checkpoint has 2 lay"),
    ({"num_experts": 10**9}, r"num_experts=1000000000 in .*, with hidden_size=64, moe_intermediate_size=32, asks for "),
    ({"vocab_size": 10**12}, r"vocab_size=1000000000000 in .* asks for 64\.0 trillion weights or more, but the check"),
    ({"hidden_size": 2**31}, r"hidden_size=2147483648 in .*, with vocab_size=96, asks for 206\.2 billion weights"),
    ({"moe_intermediate_size": 10**15}, r"moe_intermediate_size=1000000000000000 in .* asks for 7\.7e\+17 weights"),
    ({"num_attention_heads": 10**9}, r"num_attention_heads=1000000000 in .*, with head_dim=32, hidden_size=64, asks"),
    ({"num_key_value_heads": 10**9}, "num_key_value_heads=1000000000 in .* asks for 2.0 trillion weights or more, but"),
    ({"head_dim": 10**30}, r"head_dim=1000000000000000000000000000000 in .* asks for 1\.3e\+32 weights"),
    ({"hidden_size": "64"}, "hidden_size='64' in .*config.json must be a whole number of at least 1: put the number"),
    ({"num_hidden_layers": -1}, "num_hidden_layers=-1 in .* must be a whole number of at least 1"),
    ({"num_experts": 4.0}, "num_experts=4.0 in .* must be a whole number"),
    ({"vocab_size": float("nan")}, "vocab_size=nan in .* must be a whole number"),
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
    with pytest.raises(ValueError, match=r"config\.json is no model configuration .*: take the one that the model was"):
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


def test_group_size_is_checked_before_anything_is_read(sharded: Path) -> None:
    with pytest.raises(ValueError, match="not fused: hidden size H=64 must be a multiple of group_size=128"):
        stream(sharded, group_size=128)


class Interrupted(Exception):
    pass


def interrupt(record: FusedLayer) -> None:
    raise Interrupted


def packed_layers(streamed: StreamedModel, work: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Loads, and says which layers were packed rather than found in the work folder."""
    packed = []
    real = StreamedModel._pack

    def pack(self: StreamedModel, layer: Any) -> Any:
        packed.append(layer.name)
        return real(self, layer)

    monkeypatch.setattr(StreamedModel, "_pack", pack)
    with WorkFolder(work, streamed.manifest()) as folder:
        streamed.load(folder)
    monkeypatch.setattr(StreamedModel, "_pack", real)
    return packed


def test_an_interrupted_run_goes_on(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "x.work"
    first = stream(sharded)
    with pytest.raises(Interrupted), WorkFolder(work, first.manifest()) as folder:
        first.load(folder, interrupt)
    names = [layer.name for layer in first.layers]
    assert {path.name for path in work.iterdir()} == {".lock", MANIFEST, f"model.{names[0]}.safetensors"}

    second = stream(sharded)
    assert packed_layers(second, work, monkeypatch) == names[1:]
    whole = stream(sharded)
    whole.load()
    for key, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[key], value), key

    # A layer that was cut short, other options, another source: packed again.
    cut(work / f"model.{names[1]}.safetensors")
    assert packed_layers(stream(sharded), work, monkeypatch) == names[1:]
    assert packed_layers(stream(sharded, scheme="w4a8"), work, monkeypatch) == names
    other = Path(shutil.copytree(sharded, tmp_path / "other"))
    edit_shard(other, GATE, lambda weights: weights[GATE].add_(1))
    assert packed_layers(stream(other, scheme="w4a8"), work, monkeypatch) == names


@pytest.mark.parametrize("manifest", [None, "{}", "[]", '{"name": "my extension", "format": 3}'])
def test_a_folder_of_someone_else_is_left_alone(sharded: Path, tmp_path: Path, manifest: str | None) -> None:
    work = tmp_path / "x.work"
    work.mkdir()
    (work / "notes.txt").write_text("mine")
    if manifest == "[]":
        (work / ".lock").write_text("mine too")
    if manifest is not None:
        (work / MANIFEST).write_text(manifest)
    before = {path.name: path.read_text() for path in work.iterdir()}
    with pytest.raises(ValueError, match=r"x.work is in the way, it is not the work folder"):
        WorkFolder(work, stream(sharded).manifest())
    assert {path.name: path.read_text() for path in work.iterdir()} == before


def test_only_our_own_files_leave_a_work_folder(sharded: Path, tmp_path: Path) -> None:
    work = tmp_path / "x.work"
    with WorkFolder(work, stream(sharded).manifest()) as folder:
        (work / "notes.txt").write_text("mine")
        folder.remove()
    assert [path.name for path in work.iterdir()] == ["notes.txt"]
    # Put there between two runs, it would be in the way of the second, whatever that has to remove.
    (work / "notes.txt").unlink()
    with WorkFolder(work, stream(sharded).manifest()):
        (work / "notes.txt").write_text("mine")
    for scheme in ("w4a16", "w4a8"):
        with pytest.raises(ValueError, match=r"has other files in it \(notes.txt\): move them"):
            WorkFolder(work, stream(sharded, scheme=scheme).manifest())
    assert {path.name for path in work.iterdir()} == {".lock", MANIFEST, "notes.txt"}


def test_a_work_folder_without_a_manifest_is_never_left(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed while it removes the folder leaves one that the next export still knows."""
    work, streamed = tmp_path / "x.work", stream(sharded)
    real, removed = Path.unlink, []

    def killed(self: Path, missing_ok: bool = False) -> None:
        if self.parent == work and self.name in (MANIFEST, ".lock"):
            removed.append(sorted(path.name for path in work.iterdir()))
        real(self, missing_ok)

    with WorkFolder(work, streamed.manifest()) as folder:
        streamed.load(folder)
        monkeypatch.setattr(Path, "unlink", killed)
        folder.remove()
    assert removed == [[".lock", MANIFEST], [".lock"]] and not work.exists()
    work.mkdir()
    (work / ".lock").touch()
    (work / f".manifest.{os.getpid()}.new.json").touch()
    with WorkFolder(work, streamed.manifest()):
        assert {path.name for path in work.iterdir()} == {".lock", MANIFEST}


def test_one_export_at_a_time_has_a_work_folder(sharded: Path, tmp_path: Path) -> None:
    work, manifest = tmp_path / "x.work", stream(sharded).manifest()
    code = (
        "import json, os, pathlib, signal, sys\n"
        "from executorch_moe.export.checkpoint.work_folder import WorkFolder\n"
        "work = WorkFolder(pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]))\n"
        "print('mine', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(work), json.dumps(manifest)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "mine\n"
        before = sorted(path.name for path in work.iterdir())
        for asked in (manifest, stream(sharded, scheme="w4a8").manifest()):
            with pytest.raises(RuntimeError, match=r"another export is writing there, it has .*x.work: wait until"):
                WorkFolder(work, asked)
        assert sorted(path.name for path in work.iterdir()) == before
        other.kill()
    with WorkFolder(work, manifest) as folder:  # the system has freed it
        folder.remove()
    assert not work.exists()
