"""Several sequences in one step: each row gets what its text alone gets, whatever the other rows do."""

from __future__ import annotations

import pytest
import torch

from executorch_moe.export.build import streamline_
from executorch_moe.export.models import attention, synthetic
from executorch_moe.export.models.batch.methods import BatchedLM, export_batched
from executorch_moe.export.models.causal_lm import CausalLM
from executorch_moe.export.quantize.dense import quantize_dense_

from ...families import FAMILIES, RECURRENT, by_name, tokens

CONTEXT = 24
LENGTHS = (9, 0, 3, 1)
"""Tokens of the prompt in each slot; a slot without a prompt stays empty."""


def model_for_cuda(dense: str) -> torch.nn.Module:
    def prepare(part: torch.nn.Module) -> None:
        quantize_dense_(streamline_(part), dense, 32, embedding="int8" if dense == "int8" else "none")

    return synthetic.build(
        synthetic.parse("synthetic:tiny,layers=3,experts=4,top_k=4"), group_size=32, dtype=torch.bfloat16,
        attention=attention.register(), prepare=prepare,
    )  # fmt: skip


@torch.no_grad()
def check_rows(lm: BatchedLM, alone: CausalLM, vocabulary: int, tolerance: float) -> None:
    """Prefills the slots in another order than that of the rows, and compares three steps with each text alone."""
    texts = [torch.randint(0, vocabulary, (1, length + 3), generator=torch.Generator().manual_seed(length))
             for length in LENGTHS]  # fmt: skip
    device = lm.kv_cache.device
    slots = torch.tensor([2, 0, 3, 1])
    for row in (2, 0, 3):
        size = LENGTHS[row]
        lm.prefill(texts[row][:, :size].to(device), torch.arange(size).to(device), slots[row : row + 1].to(device))
    for step in range(3):
        positions = torch.tensor([size + step if size else -1 for size in LENGTHS])
        ids = torch.cat([text[:, size + step : size + step + 1] for text, size in zip(texts, LENGTHS, strict=True)])
        found = lm.decode_batch(ids.to(device), positions.to(device), slots.to(device)).cpu()
        for row, size in enumerate(LENGTHS):
            if size:
                end = size + step + 1
                expected = alone(texts[row][:, :end].to(device), torch.arange(end).to(device)).cpu()
                assert (found[row] - expected).norm() / expected.norm() < tolerance, f"row {row}, step {step}"


@pytest.mark.transformers
@pytest.mark.parametrize("family", [*FAMILIES, *RECURRENT], ids=str)
def test_rows_of_each_family(family) -> None:  # type: ignore[no-untyped-def]
    implementation = "eager" if family.name == "gpt_oss" else attention.register(attention.CPU_NAME)
    model = family.model("batched_mm", attention=implementation)
    check_rows(BatchedLM(model, CONTEXT, 4, "logits"), CausalLM(model, CONTEXT), 96, 1e-5)


@pytest.mark.parametrize("dense", ["none", "int8"])
def test_rows_of_a_model_for_cuda(dense: str) -> None:
    model = model_for_cuda(dense)
    check_rows(BatchedLM(model, CONTEXT, 4, "logits"), CausalLM(model, CONTEXT), 250, 0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("dense", ["none", "int8"])
def test_rows_on_a_gpu(dense: str) -> None:
    model = model_for_cuda(dense).cuda()
    check_rows(BatchedLM(model, CONTEXT, 4, "logits"), CausalLM(model, CONTEXT), 250, 0.02)


def test_the_programs_for_cuda() -> None:
    lm = BatchedLM(model_for_cuda("int8"), CONTEXT, 4, "token")
    programs = export_batched(lm, one_token_linears=True)
    found = {
        name: [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        for name, program in programs.items()
    }
    ours = {"rows_attention": 3, "rows_router": 3, "fused_experts": 3, "residual_norm": 5, "rows_linear": 4}
    for name, count in ours.items():
        assert found["decode_batch"].count(f"executorch_moe.{name}.default") == count, name
    assert found["decode"].count("executorch_moe.one_token_attention.default") == 3
    assert found["prefill"].count("executorch_moe.cached_attention.default") == 3
    caches = {f"kv_cache.{kind}_{layer}" for kind in ("key", "value") for layer in range(3)}
    for program in programs.values():
        assert caches == {name for name in program.graph_signature.buffers if name.startswith("kv_cache")}


def test_what_cannot_be_batched_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_batch=65 must be from 1 \(one sequence\) to 64"):
        BatchedLM(by_name("mixtral").model(), CONTEXT, 65, "logits")
    recurrent = RECURRENT[0].model(attention=attention.register())
    with pytest.raises(NotImplementedError, match="several sequences at once need layers of attention only on CUDA"):
        BatchedLM(recurrent, CONTEXT, 2, "logits")
    with pytest.raises(NotImplementedError, match="several sequences at once on CUDA need Qwen3-MoE's layers, in bf16"):
        BatchedLM(model_for_cuda("int4"), CONTEXT, 2, "logits")
    with pytest.raises(ValueError, match="cache_position has 24, expected positions from 0 to 23"):
        model = BatchedLM(by_name("mixtral").model(), CONTEXT, 2, "greedy")
        model.decode_batch(tokens(2).T, torch.tensor([24, -1]), torch.arange(2))
