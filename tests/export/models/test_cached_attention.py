"""Models for CUDA take `cached_attention` for several tokens: each family, with and without a window."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from executorch_moe.export.models import attention
from executorch_moe.export.models.causal_lm import CausalLM, export_methods

from ..families import by_name, tokens

HEADS: dict[str, Any] = {"head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
MODELS = {
    "qwen3_moe": {},
    "qwen2_moe": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "mixtral": {},
    "mixtral with a window": {"sliding_window": 5},
    "olmoe": {"head_dim": None, "hidden_size": 128},
    "glm4_moe": {},
}


def build(name: str, implementation: str) -> CausalLM:
    family = by_name(name.split()[0])
    options = {name: value for name, value in {**HEADS, **MODELS[name]}.items() if value is not None}
    made = replace(family, options=family.options | options)
    return CausalLM(made.model("batched_mm", torch.bfloat16, implementation), 32)


def check_chunks(lm: CausalLM, other: CausalLM) -> None:
    """Compares the logits after a prompt in chunks and two single tokens."""
    device, ids = lm.kv_cache.key_0.device, tokens(20)
    for start, end in ((0, 9), (9, 11), (11, 18), (18, 19), (19, 20)):
        positions = torch.arange(start, end)
        with torch.no_grad():
            found = lm(ids[:, start:end].to(device), positions.to(device)).cpu()
            expected = other(ids[:, start:end], positions)
        assert (found - expected).norm() / expected.norm() < 0.02, f"tokens {start} to {end}"


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers_attention(name: str) -> None:
    lm = build(name, attention.register())
    check_chunks(lm, build(name, "sdpa"))
    prefill = [str(node.target) for node in export_methods(lm)["prefill"].graph.nodes if node.op == "call_function"]
    assert prefill.count("executorch_moe.cached_attention.default") == 2
    assert not any("dot_product" in target for target in prefill)


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_logits_on_a_gpu(name: str) -> None:
    check_chunks(build(name, attention.register()).cuda(), build(name, "sdpa"))
