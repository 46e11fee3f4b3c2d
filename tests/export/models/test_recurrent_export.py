"""`executorch-moe export` for models with gated delta rule layers: checkpoints, artifacts, refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from executorch_moe.backends.fusion import FusionOptions
from executorch_moe.backends.runtime.loader import LoadedProgram, load
from executorch_moe.export.build import prepare_, stream
from executorch_moe.export.checkpoint.streaming import StreamedModel
from executorch_moe.export.cli.app import app
from executorch_moe.export.models.attention import MergedAttention
from executorch_moe.export.models.causal_lm import CausalLM
from executorch_moe.export.models.decoder_layer import Norm
from executorch_moe.export.models.delta_rule import GatedDeltaNet
from executorch_moe.export.models.router import SharedExpert
from executorch_moe.export.options import Dense, Experts, ExportOptions, Target

from ...combinations import EXHAUSTIVE, combinations
from ..cli.refusals import refused
from ..families import Logits, tokens
from ..recurrent_checkpoints import TWO_LAYERS, TYPES, save_recurrent, write_multimodal

NEW = 64
SPLITS = {"whole": (0,), "chunks of 7": (7,), "chunks of 64": (64,), "one by one": (1,)}
BOUND = 5e-3
"""Relative error of the logits, with fused experts, whose activations are bf16."""


@torch.no_grad()
def greedy(model: torch.nn.Module, prompt: Tensor, count: int) -> Tensor:
    """The prompt and the likeliest tokens after it, by the unmodified model without a cache, [1, T + count]."""
    ids = prompt
    for _ in range(count):
        ids = torch.cat([ids, Logits(model)(ids)[:, -1:].argmax(-1)], 1)
    return ids


def run(program: LoadedProgram, ids: Tensor, start: int, chunk: int) -> Tensor:
    """Logits after each chunk, [chunks, V]."""
    found = []
    for at in range(0, ids.shape[1], chunk):
        part = ids[:, at : at + chunk]
        method = "prefill" if part.shape[1] > 1 else "decode"
        found += program.run(method, part, torch.arange(part.shape[1]) + start + at)
    return torch.cat(found)


def export(folder: Path, pte: Path, *more: object) -> Any:
    arguments = ["export", folder, "-o", pte, "--target", "cpu", "--output", "logits", "--max-context", 256, *more]
    return CliRunner().invoke(app, [str(argument) for argument in arguments], terminal_width=400)


@pytest.mark.parametrize(
    # Seeds of prompts after which no two logits are nearly equal: experts have bf16 activations.
    ("model_type", "options", "seed"),
    [
        ("qwen3_5_moe", TWO_LAYERS, 0),
        pytest.param("qwen3_next", TWO_LAYERS, 0, marks=EXHAUSTIVE),
        *(
            pytest.param(model_type, {}, seed, marks=EXHAUSTIVE)
            for model_type, seed in zip(TYPES, (3, 3, 0), strict=True)
        ),
    ],
)
def test_artifact_equals_the_unmodified_model(
    model_type: str, options: dict[str, Any], seed: int, tmp_path: Path, executorch_runtime: None
) -> None:
    model, pte = save_recurrent(model_type, tmp_path / "model", **options), tmp_path / "out" / "model.pte"
    result = export(tmp_path / "model", pte)
    assert result.exit_code == 0, result.output
    left_out = "left out, not of the text model: model.visual.* (2 tensors), mtp.* (1 tensor)"
    assert (left_out in " ".join(result.stderr.split())) == (model_type == "qwen3_5_moe")
    program = load(pte)
    assert program.constant("has_recurrent_state") is True
    for prompt in (1, 2, 63, 64, 65, 130):
        generator = torch.Generator().manual_seed(1000 * seed + prompt)
        ids = greedy(model, torch.randint(0, 96, (1, prompt), generator=generator), NEW)
        with torch.no_grad():
            expected = Logits(model)(ids)[0, prompt - 1 : -1]
        for (chunk,) in SPLITS.values():
            # Position 0 starts a new text without a reset.
            last = run(program, ids[:, :prompt], 0, chunk or prompt)[-1:]
            logits = torch.cat([last, run(program, ids[:, prompt:-1], prompt, 1)])
            assert (logits - expected).norm() / expected.norm() < BOUND
            assert torch.equal(logits.argmax(-1), ids[0, prompt:])


@pytest.mark.parametrize("model_type", TYPES)
@torch.no_grad()
def test_checkpoints_are_read_as_transformers_reads_them(model_type: str, tmp_path: Path) -> None:
    model = save_recurrent(model_type, tmp_path / "model")
    streamed = StreamedModel(tmp_path / "model", torch.float32, "eager", FusionOptions("bf16"))
    streamed.load()
    expected = Logits(model)(tokens(66))[0, -1]
    logits = CausalLM(streamed.model, 128)(tokens(66), torch.arange(66))[0]
    assert (logits - expected).norm() / expected.norm() < BOUND


def weight_of(linear: torch.nn.Module, inputs: int) -> Tensor:
    """The weight [N, K] that a linear layer multiplies with, as it was stored and dequantized."""
    return linear(torch.eye(inputs)).T  # type: ignore[no-any-return]


def set_rows_(linears: list[Any], weight: Tensor, rows: Tensor | None = None) -> None:
    """Gives linear layers the rows of a merged one, which are in the order `rows`."""
    if rows is not None:
        weight = torch.empty_like(weight).index_copy_(0, rows, weight)
    for linear, part in zip(linears, weight.split([len(linear.weight) for linear in linears]), strict=True):
        linear.weight.copy_(part)


def with_weights_of_(model: Any, prepared: Any) -> torch.nn.Module:
    """Gives an unmodified model the rounded and dequantized weights of one that `prepare_` changed."""
    there, hidden = dict(prepared.named_modules()), model.config.hidden_size
    for name, parameter in model.named_parameters():
        if name in prepared.state_dict() and name.endswith(("mlp.gate.weight", "norm.weight", "layernorm.weight")):
            stored = prepared.state_dict()[name]
            parameter.copy_(stored - 1 if isinstance(there[name.rpartition(".")[0]], Norm) else stored)
    model.model.embed_tokens.weight.copy_(prepared.model.embed_tokens(torch.arange(model.config.vocab_size)))
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and path in there and not path.endswith(("k_proj", "v_proj", "q_proj")):
            module.weight.copy_(weight_of(there[path], module.in_features))
    for path, module in there.items():
        layer = (
            model.get_submodule(path) if isinstance(module, (GatedDeltaNet, MergedAttention, SharedExpert)) else None
        )
        if isinstance(module, GatedDeltaNet):
            assert torch.equal(layer.A_log, module.a_log)  # kept in fp32
            layer.conv1d.weight.copy_(module.conv_weight[:, None])
            layer.norm.weight.copy_(module.norm_weight)
            linears = [layer.in_proj_qkv, layer.in_proj_z, layer.in_proj_b, layer.in_proj_a]
            set_rows_(linears, weight_of(module.in_proj, hidden))
        elif isinstance(module, MergedAttention):
            order = module._order()
            set_rows_(
                [layer.q_proj, layer.k_proj, layer.v_proj], weight_of(module.qkv_proj, hidden), module._rows(order)
            )
            for name in ("q_norm", "k_norm"):
                getattr(layer, name).weight[order] = getattr(module, name).flatten() - 1
        elif isinstance(module, SharedExpert):
            gate = model.get_submodule(path.rpartition(".")[0]).shared_expert_gate
            weight = weight_of(module.gate_up, hidden)[: 2 * module.width + 1]
            set_rows_([layer.gate_proj, layer.up_proj, gate], weight)
        elif path.endswith("self_attn"):  # in order, with the same input
            one = torch.eye(hidden)
            for linear in ("q_proj", "k_proj", "v_proj"):
                model.get_submodule(path).get_submodule(linear).weight.copy_(module.get_submodule(linear)(one).T)
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("scheme", "dense", "target"),
    combinations(["w4a16", "w4a8", "bf16"], ["none", "int8", "int4"], ["cpu", "sm_90"], one_of=3),
)
@torch.no_grad()
def test_every_storage_is_that_of_its_weights(scheme: str, dense: str, target: str, tmp_path: Path) -> None:
    """The modules that both targets trace, in PyTorch, against the unmodified model with the weights as stored."""
    folder = tmp_path / "model"
    model = save_recurrent("qwen3_5_moe_text", folder)
    options = ExportOptions(str(folder), experts=Experts(scheme), dense=Dense(dense), target=Target(target))
    streamed = stream(options, folder)
    streamed.load()
    prepare_(streamed.model, options)
    streamed.model.float()  # in bf16, routers choose other experts in near-ties
    lm = CausalLM(streamed.model, 128)
    ids, positions = tokens(70), torch.arange(70)
    parts = [slice(0, 64), *(slice(at, at + 1) for at in range(64, 70))]
    logits = torch.cat([lm.logits(ids[:, part], positions[part], 0)[0] for part in parts])
    expected = Logits(with_weights_of_(model, streamed.model))(ids)[0]
    changed = [module for module in streamed.model.modules() if isinstance(module, (MergedAttention, SharedExpert))]
    assert len(changed) == (5 if target == "sm_90" else 0)
    errors = (logits - expected).norm(dim=-1) / expected.norm(dim=-1)
    # The median, because a few tokens choose other experts in near-ties. w4a8 rounds the experts' activations to int8.
    assert max(errors.median(), errors[64:].median()) < (3 * BOUND if scheme == "w4a8" else BOUND)


def test_the_check_command_passes(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_recurrent("qwen3_5_moe", folder)
    result = CliRunner().invoke(app, ["export", str(folder), "--check", "--target", "cpu"], terminal_width=400)
    assert result.exit_code == 0, result.output
    assert "first 4 layers" in " ".join(result.stderr.split())  # up to the first layer with full attention
    assert "model.visual.* (2 tensors)" in result.stderr


def folder_with(tmp_path: Path, **changes: Any) -> Path:
    """A checkpoint whose text configuration has other values."""
    folder = tmp_path / "model"
    save_recurrent("qwen3_5_moe", folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["text_config"] |= changes
    path.write_text(json.dumps(config))
    return folder


def refusal(folder: Path, tmp_path: Path, *more: object) -> str:
    pte = tmp_path / "out" / "model.pte"
    line = refused("export", folder, "-o", pte, "--target", "cpu", *more)
    assert not pte.parent.exists() or not list(pte.parent.iterdir())
    return line


def test_an_unknown_kind_of_layer_is_named(tmp_path: Path) -> None:
    kinds = ["linear_attention", "mamba", "linear_attention", "full_attention"]
    line = refusal(folder_with(tmp_path, layer_types=kinds), tmp_path)
    assert re.search(r"layers of type mamba are not supported: use a model whose layers are full_attention or", line)


def test_a_configuration_without_a_text_model(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write_multimodal(folder, {}, None)
    line = refusal(folder, tmp_path)
    assert re.search(r"model_type='qwen3_5_moe' in .*config.json has no text_config, so there is no text model", line)


def test_weights_without_a_text_model(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in weights.items() if "visual" in name or "mtp" in name},
        folder / "model.safetensors",
    )
    line = refusal(folder, tmp_path)
    assert re.search(r"has 3 tensors \(.*model.visual.*\) but none of a text model: download the missing", line)


@pytest.mark.parametrize("context", [1089, 7])
def test_a_context_over_the_model_s(context: int, tmp_path: Path) -> None:
    line = refusal(folder_with(tmp_path), tmp_path, "--max-context", context)
    assert re.search(rf"max-context {context} must be between 8 and the model's max_position_embeddings=1088", line)
