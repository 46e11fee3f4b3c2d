"""Published checkpoints: files that disagree, layers that the model does not run, and flags of training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from executorch_moe.backends.fusion import FusionOptions
from executorch_moe.export.check import check_export
from executorch_moe.export.checkpoint.plan import meta_model
from executorch_moe.export.checkpoint.streaming import StreamedModel
from executorch_moe.export.checkpoint.whole import load_model
from executorch_moe.export.models.causal_lm import CausalLM, export_methods
from executorch_moe.export.models.pretrained import resolve, special_tokens
from executorch_moe.export.options import Context, ExportOptions, Target
from executorch_moe.export.report.metadata import constant_methods

from ..families import FAMILIES, Logits, by_name, tokens

pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file

Weights = dict[str, torch.Tensor]
BOUND = 1.5e-2
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def store(
    folder: Path, name: str = "qwen3_moe", change: Callable[[Weights], object] | None = None, **config: Any
) -> Any:
    """Saves a family's model with changed weights and changed entries of config.json; returns the original model."""
    model: Any = by_name(name).model()
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    if change is not None:
        change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return model


def stream(folder: Path) -> StreamedModel:
    return StreamedModel(folder, torch.float32, "eager", FusionOptions("w4a16", 32))


@torch.no_grad()
def error(model: nn.Module, expected: nn.Module) -> float:
    actual, reference = Logits(model)(tokens(9)), Logits(expected)(tokens(9))
    return float((actual - reference).norm() / reference.norm())


def tied_pair(folder: Path, change: Callable[[Weights], object], *, tie: bool = True) -> StreamedModel:
    store(folder, change=change, tie_word_embeddings=tie)
    streamed = stream(folder)
    streamed.load()
    return streamed


def test_two_matrices_stay_two_whatever_the_configuration_says(tmp_path: Path) -> None:
    streamed = tied_pair(tmp_path, lambda weights: None)
    stored = load_file(tmp_path / "model.safetensors")
    empty = stream(tmp_path)
    empty.load_placeholders()
    for model in (streamed.model, empty.model):
        model.tie_weights()  # they remain two, whoever calls it
        assert model.lm_head.weight is not model.model.embed_tokens.weight
        assert not any(tensor.is_meta for tensor in model.state_dict().values())
    assert torch.equal(streamed.model.lm_head.weight, stored[HEAD])
    assert torch.equal(streamed.model.model.embed_tokens.weight, stored[EMBEDDING])
    assert error(streamed.model, load_model(tmp_path, torch.float32)) < BOUND


@pytest.mark.parametrize("rows", [4096, 7])
def test_two_equal_matrices_are_one(tmp_path: Path, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("executorch_moe.export.checkpoint.plan.COMPARED_ROWS", rows)
    streamed = tied_pair(tmp_path, lambda weights: weights.update({HEAD: weights[EMBEDDING].clone()}))
    assert streamed.model.lm_head.weight is streamed.model.model.embed_tokens.weight
    assert error(streamed.model, load_model(tmp_path, torch.float32)) < BOUND


def test_a_difference_in_the_last_row_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("executorch_moe.export.checkpoint.plan.COMPARED_ROWS", 7)

    def change(weights: Weights) -> None:
        weights[HEAD] = weights[EMBEDDING].clone()
        weights[HEAD][-1, -1] += 1

    streamed = tied_pair(tmp_path, change)
    assert streamed.model.lm_head.weight is not streamed.model.model.embed_tokens.weight


@pytest.mark.parametrize("absent", [HEAD, EMBEDDING])
def test_one_matrix_under_either_name(tmp_path: Path, absent: str) -> None:
    streamed = tied_pair(tmp_path, lambda weights: weights.pop(absent))
    stored = load_file(tmp_path / "model.safetensors")[HEAD if absent == EMBEDDING else EMBEDDING]
    empty = stream(tmp_path)
    empty.load_placeholders()
    for model in (streamed.model, empty.model):
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert not any(tensor.is_meta for tensor in model.state_dict().values())
    assert torch.equal(streamed.model.lm_head.weight, stored)
    assert error(streamed.model, load_model(tmp_path, torch.float32)) < BOUND


def test_a_head_that_is_missing_is_not_made_up(tmp_path: Path) -> None:
    store(tmp_path, change=lambda weights: weights.pop(HEAD), tie_word_embeddings=False)
    remedy = rf"lacks 1 tensor \({HEAD}\): set tie_word_embeddings to true in config.json if {HEAD} is {EMBEDDING}"
    with pytest.raises(ValueError, match=remedy):
        stream(tmp_path)
    # transformers would fill it with random numbers
    with pytest.raises(ValueError, match=f"lacks {HEAD}"):
        load_model(tmp_path, torch.float32)


def test_neither_matrix_is_stored(tmp_path: Path) -> None:
    store(tmp_path, change=lambda weights: [weights.pop(name) for name in (HEAD, EMBEDDING)], tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"lacks 2 tensors \(model.embed_tokens.weight, lm_head.weight\): download"):
        stream(tmp_path)


def test_the_check_takes_two_matrices(tmp_path: Path) -> None:
    store(tmp_path, change=lambda weights: None, tie_word_embeddings=True)
    (tmp_path / "tokenizer.json").write_bytes((resolve("tiny") / "tokenizer.json").read_bytes())
    result = check_export(ExportOptions(str(tmp_path), target=Target("cpu"), context=Context(32)))
    assert result.passed, result.findings


def add_prediction_layer(weights: Weights, at: int, source: int, *, whole: bool = True) -> None:
    """Adds a copy of a decoder layer after the last one, with the extra weights of multi-token prediction."""
    copied = {key: value.clone() for key, value in weights.items() if f".layers.{source}." in key}
    weights |= {key.replace(f".layers.{source}.", f".layers.{at}."): value for key, value in copied.items()}
    if whole:
        size = weights[EMBEDDING].shape[1]
        of_its_own = {"enorm.weight": (size,), "hnorm.weight": (size,), "eh_proj.weight": (size, 2 * size)}
        weights |= {f"model.layers.{at}.{name}": torch.randn(shape) for name, shape in of_its_own.items()}
        weights[f"model.layers.{at}.shared_head.head.weight"] = weights[HEAD].clone()


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
@pytest.mark.parametrize("places", [(2,), (2, 3), (7,)])
def test_prediction_layers_at_any_number_are_left_out(name: str, places: tuple[int, ...], tmp_path: Path) -> None:
    def change(weights: Weights) -> None:
        for at in places:
            add_prediction_layer(weights, at, 1)

    model = store(tmp_path, name, change, num_nextn_predict_layers=len(places))
    streamed = stream(tmp_path)
    streamed.load()
    assert error(streamed.model, model) < BOUND


@pytest.mark.parametrize("prefix", ["mtp", "model.mtp", "model.mtp_layers"])
def test_prediction_layers_under_a_name_of_their_own_are_left_out(prefix: str, tmp_path: Path) -> None:
    def change(weights: Weights) -> None:
        weights |= {f"{prefix}.0.fc.weight": torch.randn(3, 3), f"{prefix}.0.norm.weight": torch.randn(3)}

    store(tmp_path, change=change)
    assert stream(tmp_path).layers


def test_a_decoder_layer_too_many_is_refused(tmp_path: Path) -> None:
    """A stored decoder layer must not be ignored: the model would be another one."""
    store(tmp_path, change=lambda weights: add_prediction_layer(weights, 2, 1, whole=False))
    with pytest.raises(ValueError, match=r"model.layers.2.*that Qwen3MoeForCausalLM does not use"):
        stream(tmp_path)

    def both(weights: Weights) -> None:
        add_prediction_layer(weights, 2, 1, whole=False)
        add_prediction_layer(weights, 3, 1)

    store(tmp_path, change=both)
    with pytest.raises(ValueError, match=r"tensors \(model.layers.2"):
        stream(tmp_path)


TRAINING = {"output_router_logits": True, "use_cache": False}
RESEARCH = {"output_attentions": True, "output_hidden_states": True, "return_dict": False}


@pytest.mark.parametrize("flags", [TRAINING, RESEARCH], ids=["training", "research"])
@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
@torch.no_grad()
def test_outputs_that_config_asks_for_are_left_out(name: str, flags: dict[str, Any], tmp_path: Path) -> None:
    model = store(tmp_path, name, **flags)
    streamed = stream(tmp_path)
    streamed.load()
    ids = tokens(9)
    actual = CausalLM(streamed.model, 16)(ids, torch.arange(9))
    expected = Logits(model)(ids)[:, -1]
    assert (actual - expected).norm() / expected.norm() < BOUND
    # a model that the user loaded
    other: Any = by_name(name).model(attention="eager")
    for key, value in flags.items():
        setattr(other.config, key, value)
    methods = export_methods(CausalLM(other, 16))
    prefill = methods["prefill"].module()(ids, torch.arange(9))
    assert (prefill - expected).norm() / expected.norm() < 1e-4


def generation(folder: Path, **entries: Any) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(entries))
    return folder


@pytest.mark.parametrize(
    ("of_model", "of_generation", "ends"),
    [
        (3, None, [3]),
        (3, {"eos_token_id": [3, 9]}, [3, 9]),
        (3, {"eos_token_id": 9}, [9]),  # as in transformers, generation_config.json takes precedence
        ([3, 4], {"temperature": 0.7}, [3, 4]),
        (None, {"eos_token_id": [9, 9]}, [9]),
        (None, {}, []),
        (-1, {}, []),
    ],
)
def test_the_tokens_that_end_a_text(of_model: Any, of_generation: Any, ends: list[int], tmp_path: Path) -> None:
    config = SimpleNamespace(eos_token_id=of_model, bos_token_id=1)
    if of_generation is not None:
        generation(tmp_path, **of_generation)
    assert special_tokens(tmp_path, config) == (ends, 1)


@pytest.mark.parametrize("eos", ["</s>", [1, "2"], -7, 1.5, True])
def test_what_is_no_token_is_refused_before_anything_is_read(eos: Any, tmp_path: Path) -> None:
    store(tmp_path)
    generation(tmp_path, eos_token_id=eos)
    with pytest.raises(ValueError, match=r"eos_token_id=.* of generation_config.json must be a token id"):
        stream(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", '"x"'])
def test_a_damaged_generation_config_is_named(text: str, tmp_path: Path) -> None:
    store(tmp_path)
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"generation_config.json is not a generation configuration .*remove it"):
        meta_model(tmp_path, torch.float32, "eager")


def test_an_artifact_says_them(tmp_path: Path) -> None:
    model = store(tmp_path)
    generation(tmp_path, eos_token_id=[5, 6], bos_token_id=2)
    options = ExportOptions(str(tmp_path), target=Target("cpu"), context=Context(16))
    constants = constant_methods(options, model.config, 16, "tokenizer")
    assert constants["get_eos_ids"] == [5, 6] and constants["get_bos_id"] == 2
    generation(tmp_path)
    constants = constant_methods(options, model.config, 16, "tokenizer")
    assert constants["get_eos_ids"] == [-1] and constants["get_bos_id"] == -1
