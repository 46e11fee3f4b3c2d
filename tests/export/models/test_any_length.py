"""Unmodified transformers models with gated delta rule layers: exported for any length, lowered by the partitioners."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers import DynamicCache

import executorch_moe as moe
from executorch_moe.backends.artifact.files import open_artifact
from executorch_moe.backends.artifact.inspect import check_cuda_artifact, inspect_artifact

from ...backends.requirements import needs_cross_export
from ...combinations import EXHAUSTIVE, combinations
from ..families import RECURRENT, Logits, by_name, tokens
from ..recurrent_checkpoints import FEW_CHOICES, TWO_LAYERS, family_of

NAMES = [family.name for family in RECURRENT]
LENGTHS = (2, 11, 63, 64, 65, 130)
"""Around a chunk of transformers' layer, and more than two of them."""
BOUND = 1.5e-2
FUSION = moe.FusionOptions("w4a16", group_size=32)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def two_layers(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """One layer of each kind; experts add little, so that their rounding changes few choices of later experts."""
    model = family_of(name, **TWO_LAYERS).model()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(tuple(FEW_CHOICES)):
                parameter.mul_(next(iter(FEW_CHOICES.values())))
    return model.to(dtype)


def export(model: nn.Module, strict: bool = False) -> ExportedProgram:
    """Logits(model) exported with T from 2 to 256."""
    shapes = {"input_ids": {1: Dim.DYNAMIC(min=2, max=256)}}
    with moe.any_length(model), torch.no_grad():
        return torch.export.export(Logits(model), (tokens(9),), strict=strict, dynamic_shapes=shapes)


def save(program: ExportedProgram, partitioner: Any, path: Path) -> Path:
    """ExecuTorch's own call with one of our partitioners."""
    edge = to_edge_transform_and_lower(program, partitioner=[partitioner])
    return moe.save(edge.to_executorch(ExecutorchBackendConfig(external_constants=True)), path).pte


@pytest.mark.transformers
@pytest.mark.parametrize(("name", "strict"), combinations(NAMES, {"non-strict": False, "strict": True}, one_of=2))
@torch.no_grad()
def test_a_program_for_any_length_equals_the_model(name: str, strict: bool) -> None:
    model = two_layers(name)
    before = dict(model.named_modules(remove_duplicate=False))
    program = export(model, strict)
    assert program.state_dict.keys() == Logits(model).state_dict().keys()
    after = dict(model.named_modules(remove_duplicate=False))
    assert before.keys() == after.keys() and all(after[place] is module for place, module in before.items())
    module = program.module()
    for length in LENGTHS:
        assert relative_error(module(tokens(length)), Logits(model)(tokens(length))) < 1e-5, length


@pytest.mark.slow
@pytest.mark.parametrize("name", [NAMES[0], pytest.param(NAMES[1], marks=EXHAUSTIVE)])
@torch.no_grad()
def test_the_cpu_partitioner_alone(name: str, tmp_path: Path, executorch_runtime: None) -> None:
    model, partitioner = two_layers(name), moe.MoECpuPartitioner(FUSION)
    loaded = moe.load(save(export(model), partitioner, tmp_path / "model"))
    assert len(partitioner.report.layers) == 2 and not partitioner.report.unfused
    for length in LENGTHS:
        (actual,) = loaded.run("forward", tokens(length))
        expected = Logits(model)(tokens(length))
        assert relative_error(actual, expected) < BOUND, length
        assert torch.equal(actual[0, -1].argmax(), expected[0, -1].argmax()), length


@needs_cross_export
@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", NAMES)
def test_the_cuda_partitioner_alone(name: str, tmp_path: Path) -> None:
    program = export(two_layers(name, torch.bfloat16))
    with moe.target_cuda("sm_90"):
        pte = save(program, moe.MoECudaPartitioner(fusion=FUSION), tmp_path / "model")
    report = inspect_artifact(pte)
    check_cuda_artifact(report)
    assert open_artifact(pte)[0].inputs("forward")[0].sizes == (1, 256)  # not only the length traced
    (delegate,) = report.methods["forward"].delegates
    assert {"moe_delta_rule_inputs", "moe_delta_rule_state", "moe_grouped_gemm"} <= set(delegate.kernels)


@pytest.mark.gpu
@pytest.mark.slow
@torch.no_grad()
def test_the_cuda_partitioner_alone_on_a_gpu(tmp_path: Path) -> None:
    """Attention in plain PyTorch, because ExecuTorch's kernel writes bf16 for any input type."""
    model: Any = two_layers(NAMES[1])
    model.set_attn_implementation("eager")
    program = moe.lower({"forward": export(model)}, "cuda", fusion=FUSION)
    loaded = moe.load(moe.save(program, tmp_path / "model").pte, runtime="delegate-host")
    for length in LENGTHS:
        (actual,) = loaded.run("forward", tokens(length))
        assert relative_error(actual.cpu(), Logits(model)(tokens(length))) < BOUND, length


@torch.no_grad()
def test_several_texts_and_what_it_does_not_compute() -> None:
    model: Any = two_layers(NAMES[0])
    both = torch.cat([tokens(65), tokens(65).flip(1)])
    expected = Logits(model)(both)
    with moe.any_length(model) as same:
        assert same is model
        with moe.any_length(model):
            assert relative_error(Logits(model)(both), expected) < 1e-5
        assert relative_error(Logits(model)(both), expected) < 1e-5
        with pytest.raises(ValueError, match=r"a model with a cache: call the model with use_cache=False, or export"):
            model(both, past_key_values=DynamicCache(config=model.config), use_cache=True)
        with pytest.raises(ValueError, match=r"with an attention mask: pass texts without padding"):
            model(both, attention_mask=torch.tensor([[0] + [1] * 64, [1] * 65]), use_cache=False)
    assert type(model.model.layers[0].linear_attn).__name__ == "Qwen3_5MoeGatedDeltaNet"


def test_a_layer_that_the_operator_cannot_compute_is_refused_and_others_are_left_alone() -> None:
    model: Any = two_layers(NAMES[0])
    model.model.layers[0].linear_attn.activation = "gelu"
    layer = model.model.layers[0].linear_attn
    with pytest.raises(NotImplementedError, match="activation 'gelu'"), moe.any_length(model):
        pass
    assert model.model.layers[0].linear_attn is layer
    other = by_name("qwen3_moe").model()
    modules = list(other.modules())
    with moe.any_length(other):
        assert all(mine is theirs for mine, theirs in zip(other.modules(), modules, strict=True))
