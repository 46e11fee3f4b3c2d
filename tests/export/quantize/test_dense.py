"""Linear layers in INT8 and INT4 against their dequantized weights, and in a model."""

from __future__ import annotations

import copy
import io
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from executorch_moe.export.models import synthetic
from executorch_moe.export.models.causal_lm import CausalLM, export_methods
from executorch_moe.export.models.linears import Int4Linear, Int8Embedding, Int8Linear, MergedLinear, OneTokenLinears
from executorch_moe.export.options import Dense, Experts, ExportOptions, Target
from executorch_moe.export.quantize import dense_torchao
from executorch_moe.export.quantize.dense import CPU_GROUP_SIZE, quantize_dense_
from executorch_moe.export.report.summary import ExportSummary
from executorch_moe.kernels.packing.rounding import quantize_int4

N, K, GROUP = 24, 128, 32


def dequantized(weight: Tensor, kind: str) -> Tensor:
    """The dequantized weight of a layer, computed in another way."""
    if kind == "int8":
        step = (weight.abs().amax(-1, keepdim=True) / 127).float()
        return (weight / step).round() * step
    codes, scale = quantize_int4(weight, GROUP)
    return (codes.float().unflatten(-1, (-1, GROUP)) * scale.float()[..., None]).flatten(-2)


def layer(weight: Tensor, kind: str, bias: Tensor | None = None) -> nn.Module:
    return Int8Linear(weight, bias) if kind == "int8" else Int4Linear(weight, GROUP, bias)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("tokens", [1, 2, 7])
@pytest.mark.parametrize("biased", [False, True])
def test_equals_the_dequantized_product(kind: str, tokens: int, biased: bool) -> None:
    weight, x = torch.randn(N, K), torch.randn(1, tokens, K)
    bias = torch.randn(N) if biased else None
    expected = nn.functional.linear(x, dequantized(weight, kind), bias)
    got = layer(weight, kind, bias)(x)
    assert got.shape == (1, tokens, N)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_bytes(kind: str) -> None:
    module = layer(torch.randn(N, K), kind)
    assert module.qdata.nbytes == N * K // (1 if kind == "int8" else 2)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_one_row_and_more_agree_in_bf16(kind: str) -> None:
    module, x = layer(torch.randn(N, K).bfloat16(), kind), torch.randn(1, 2, K).bfloat16()
    assert module(x).dtype == torch.bfloat16
    torch.testing.assert_close(module(x)[:, :1], module(x[:, :1]), rtol=0.02, atol=0.05)


def test_a_row_of_zeros_stays_zero() -> None:
    assert torch.equal(Int8Linear(torch.zeros(2, K))(torch.randn(1, 1, K)), torch.zeros(1, 1, 2))


def test_embedding() -> None:
    weight, ids = torch.randn(10, K), torch.tensor([[3, 0, 9]])
    torch.testing.assert_close(Int8Embedding(weight)(ids), dequantized(weight, "int8")[ids], rtol=1e-5, atol=1e-5)


def test_merged_projections_are_those_of_each() -> None:
    weights, x = [torch.randn(rows, K) for rows in (6, 2, 4)], torch.randn(1, 3, K)
    merged = MergedLinear(Int8Linear(torch.cat(weights)), [6, 2, 4])
    got = [merged(x), *(follower(x) for follower in merged.followers)]
    for part, weight in zip(got, weights, strict=True):
        torch.testing.assert_close(part, Int8Linear(weight)(x), rtol=1e-5, atol=1e-5)
    merged(x)
    with pytest.raises(AssertionError, match="the same input"):
        merged.followers[0](x.clone())


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """Logits after a prompt and after one more token."""
    module, ids = CausalLM(model, 32), torch.arange(10)[None]
    return torch.cat((module(ids, torch.arange(10)), module(ids[:, :1], torch.tensor([10]))))


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.03), ("int4", 0.3)])
def test_a_model_stays_near_itself(kind: str, bound: float) -> None:
    shape = synthetic.parse("synthetic:tiny")
    plain = synthetic.build(shape, group_size=32, dtype=torch.float32)
    quantized = quantize_dense_(copy.deepcopy(plain), kind, 32, embedding="int8")
    attention = quantized.model.layers[1].self_attn  # type: ignore[union-attr, index]
    assert isinstance(attention.q_proj, MergedLinear) and type(attention.o_proj).__name__ == f"Int{kind[3:]}Linear"
    assert type(quantized.lm_head).__name__ == f"Int{kind[3:]}Linear"
    expected, got = logits(plain), logits(quantized)
    assert 0 < (got - expected).norm() / expected.norm() < bound
    # Layer by layer, as for a synthetic model, the result is the same.
    stepwise = synthetic.build(
        shape,
        group_size=32,
        dtype=torch.float32,
        prepare=lambda part: quantize_dense_(part, kind, 32, embedding="int8"),
    )
    assert torch.equal(logits(stepwise), got)


def test_lm_head_by_choice() -> None:
    model = synthetic.build(synthetic.parse("synthetic:tiny", 1), group_size=32)
    quantize_dense_(model, "int4", 32, lm_head="int8")
    assert isinstance(model.lm_head, Int8Linear)
    model = synthetic.build(synthetic.parse("synthetic:tiny", 1), group_size=32)
    assert type(quantize_dense_(model, "int8", lm_head="none").lm_head) is nn.Linear


def test_what_cannot_be_quantized() -> None:
    model = nn.Sequential(nn.Linear(48, 8))
    with pytest.raises(ValueError, match="0 has 48 inputs, which group_size=32 does not divide"):
        quantize_dense_(model, "int4", 32)
    with pytest.raises(ValueError, match="dense='int3' is unknown: use one of none, int8, int4"):
        quantize_dense_(model, "int3")
    with pytest.raises(ValueError, match="embedding='int4' is unknown: use one of none, int8"):
        quantize_dense_(model, "int8", embedding="int4")


def test_one_token_linears_are_traced_as_sums() -> None:
    """decode has no matrix products for GEMM templates; prefill keeps them."""
    model = CausalLM(synthetic.build(synthetic.parse("synthetic:tiny"), group_size=32, dtype=torch.float32), 32)
    programs = export_methods(model, one_token_linears=True)
    counts = {
        name: sum(node.target is torch.ops.aten.linear.default for node in program.graph.nodes)
        for name, program in programs.items()
    }
    # For each layer q, k, v, o and the router; lm_head gets one row in both methods.
    assert counts == {"prefill": 2 * 5, "decode": 0}
    ids, position = torch.tensor([[5]]), torch.tensor([0])
    with torch.no_grad():
        torch.testing.assert_close(programs["decode"].module()(ids, position), model(ids, position))


def test_one_row_linear_with_a_bias_keeps_its_dtype() -> None:
    linear, x = nn.Linear(K, N).bfloat16(), torch.randn(1, 1, K).bfloat16()
    with OneTokenLinears():
        got = linear(x)
    assert got.dtype == torch.bfloat16 and got.shape == (1, 1, N)
    torch.testing.assert_close(got, linear(x), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("target", "choices", "formats", "shown"),
    [
        ("cpu", {"linears": "int8"}, ["int8-per-32-inputs"] * 3, "linear layers and embeddings in int8-per-32-inputs"),
        ("sm_90", {"linears": "int8"}, ["int8-per-output"] * 2 + ["none"], "kB, linear layers in int8-per-output"),
        (
            "sm_90",
            {"linears": "int8", "lm_head": "int4", "embedding": "int8", "group_size": 64},
            ["int8-per-output", "int4-per-64-inputs", "int8-per-token"],
            "linear layers in int8-per-output, lm_head in int4-per-64-inputs, embedding in int8-per-token",
        ),
        ("cpu", {"linears": "int4", "group_size": 64}, ["int4-per-32-inputs"] * 3, "embeddings in int4-per-32-inputs"),
        ("cpu", {}, ["none"] * 3, "kB"),
    ],
)
def test_formats_have_names_of_their_own(
    target: str, choices: dict[str, Any], formats: list[str], shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ "int8" is one format on the CPU and another on a GPU: summary and record say which it was."""
    # No compiler is needed here.
    monkeypatch.setattr("executorch_moe.backends.cuda.cross.target.check_target", lambda target: None)
    group_size = choices.pop("group_size", 32)
    options = ExportOptions(
        "tiny", experts=Experts(group_size=group_size), dense=Dense(**choices), target=Target(target)
    )
    layer = SimpleNamespace(
        num_experts=8, top_k=2, hidden_size=128, intermediate_size=64, group_size=32, algorithm="minmax"
    )
    report: Any = SimpleNamespace(layers=[layer], bytes_after=1000)
    summary = ExportSummary(options, report, 128, 2000)
    assert list(json.loads(summary.record())["dense_formats"].values()) == formats
    console = Console(width=200, file=io.StringIO())
    console.print(summary.table())
    (line,) = (line for line in console.file.getvalue().splitlines() if "other weights" in line)
    assert line.rstrip(" \u2502").endswith(shown)


def test_the_formats_are_what_their_names_say() -> None:
    weight = torch.randn(96, 64)
    assert Int8Linear(weight).scale.shape == (96,)
    on_cpu: Any = dense_torchao.quantize_dense_(nn.Sequential(nn.Linear(64, 96)), "int8")[0].weight
    assert on_cpu.scale.shape == (96, 64 // CPU_GROUP_SIZE)
