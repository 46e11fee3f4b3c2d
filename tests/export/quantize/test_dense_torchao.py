"""Linear layers and embeddings in 8 and 4 bits for the CPU: values, eager and exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from executorch_moe.backends.artifact.files import save
from executorch_moe.backends.fusion import ExpertFuser, FusionOptions
from executorch_moe.backends.lower import lower
from executorch_moe.backends.runtime.loader import load
from executorch_moe.export.checkpoint.whole import load_model
from executorch_moe.export.models.causal_lm import CausalLM
from executorch_moe.export.models.pretrained import resolve
from executorch_moe.export.options import Context, Dense, ExportOptions, Target
from executorch_moe.export.pipeline import export_model
from executorch_moe.export.quantize.dense_torchao import quantize_dense_, stored_bytes
from executorch_moe.export.quantize.experts import quantize_experts_

from ..families import by_name, export_logits, tokens

BITS = {"int8": 8, "int4": 4}


@pytest.mark.parametrize("dense", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_within_half_a_code(dense: str, dtype: torch.dtype) -> None:
    model = nn.ModuleDict({"up": nn.Linear(64, 8), "table": nn.Embedding(10, 32), "norm": nn.LayerNorm(32)}).to(dtype)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    quantize_dense_(model, dense)
    for name in ("up.weight", "table.weight"):
        parameter = model.get_parameter(name)
        grouped = before[name].float().unflatten(-1, (-1, 32))
        code = grouped.abs().amax(-1, keepdim=True) / (2 ** (BITS[dense] - 1) - 0.5)
        slack = 0.5 + (0.5 if dtype == torch.bfloat16 else 0.01)  # bf16 rounds scale and value as well
        error = (parameter.dequantize().float().unflatten(-1, (-1, 32)) - grouped).abs()
        assert parameter.dtype == dtype and (error <= slack * code).all()
        per_group = dtype.itemsize + (1 if dense == "int8" else dtype.itemsize)  # scale and zero point
        assert (
            stored_bytes(parameter) == before[name].numel() * BITS[dense] // 8 + grouped.shape[:2].numel() * per_group
        )
    for name in ("up.bias", "norm.weight", "norm.bias"):
        assert torch.equal(model.get_parameter(name), before[name])


def test_none_does_nothing() -> None:
    model = nn.Linear(32, 4)
    weight = model.weight
    assert quantize_dense_(model, "none").weight is weight


def test_tied_weights_stay_tied_and_routers_as_they_were() -> None:
    model = load_model(resolve("tiny"), torch.float32)
    router = model.model.layers[0].mlp.gate.weight
    quantize_dense_(model, "int8")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.layers[0].mlp.gate.weight is router and type(router) is nn.Parameter


@pytest.mark.parametrize(
    ("model", "dense", "message"),
    [
        (nn.ModuleDict({"up": nn.Linear(32, 4), "down": nn.Linear(40, 4)}), "int4", r"down has a weight \[4, 40\]"),
        (nn.Linear(32, 4), "int2", "dense='int2' is unknown: use one of none, int8, int4"),
    ],
)
def test_a_refusal_changes_nothing(model: nn.Module, dense: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_dense_(model, dense)
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())


@pytest.mark.parametrize("dense", BITS)
def test_experts_are_fused_beside_quantized_layers_while_lowering(
    dense: str, tmp_path: Path, executorch_runtime: None
) -> None:
    model = quantize_dense_(by_name("qwen2_moe").model(), dense)  # its experts' weights are exact in 4 bits
    with torch.no_grad():
        expected = model(input_ids=tokens(9), use_cache=False).logits
    fuser = ExpertFuser(FusionOptions("w4a16", 32))
    manager = lower({"forward": export_logits(model, dynamic=False, length=9)}, "cpu", fusion=fuser)
    assert len(fuser.report.layers) == 1
    (actual,) = load(save(manager, tmp_path / "model.pte").pte).run("forward", tokens(9))
    assert (actual - expected).norm() / expected.norm() < 0.01


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_exported_model_equals_eager(tmp_path: Path, executorch_runtime: None) -> None:
    pte = tmp_path / "tiny.pte"
    summary = export_model(
        ExportOptions("tiny", pte, dense=Dense("int4"), target=Target("cpu"), context=Context(32, "logits"))
    )
    # Tied embeddings are written once.
    assert pte.with_suffix(".ptd").stat().st_size < summary.dense_bytes + summary.report.bytes_after + 50_000

    eager = CausalLM(quantize_dense_(quantize_experts_(load_model(resolve("tiny"), torch.float32)), "int4"), 32)
    ids = torch.tensor([list(b"The import statement")])
    program = load(pte)
    with torch.no_grad():
        for start, end, method in ((0, 19, "prefill"), (19, 20, "decode")):
            positions = torch.arange(start, end)
            expected = eager(ids[:, start:end], positions)
            (actual,) = program.run(method, ids[:, start:end], positions)
            assert (actual - expected).norm() / expected.norm() < 1e-3
            assert int(actual.argmax()) == int(expected.argmax())
