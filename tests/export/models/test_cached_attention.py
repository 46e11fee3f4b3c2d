"""Models take `cached_attention` for several tokens: each family, with and without a window; no mask of T x C."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from executorch_moe.backends.cpu.decompositions import decompose
from executorch_moe.export.models import attention
from executorch_moe.export.models.causal_lm import CausalLM, export_methods, export_prefill
from executorch_moe.export.quantize.experts import quantize_experts_

from ...combinations import combinations
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


def sizes_of(graph_module: torch.fx.GraphModule, context: int) -> dict[str, int]:
    """Node -> elements of its largest result for as many tokens as the cache has positions, in all graphs."""
    found = {}
    for module in graph_module.modules():
        for node in getattr(module, "graph", torch.fx.Graph()).nodes:
            for value in torch.utils._pytree.tree_leaves(node.meta.get("val")):
                if isinstance(value, torch.Tensor):
                    most = 1
                    for size in value.shape:
                        expression = size.node.expr if isinstance(size, torch.SymInt) else None
                        values = dict.fromkeys(expression.free_symbols, context) if expression is not None else {}
                        most *= int(size if expression is None else expression.subs(values))
                    found[f"{node.target} {node.name}"] = max(found.get(str(node), 0), most)
    return found


@pytest.mark.parametrize(("target", "window"), combinations(["cpu", "cuda"], [None, 64], one_of=2))
def test_no_tensor_of_a_prompt_grows_with_the_square_of_the_context(target: str, window: int | None) -> None:
    """Runtimes plan memory for the longest prompt, which is as long as the context."""
    context = 8192
    family = by_name("mixtral")
    options = family.options | HEADS | {"sliding_window": window, "max_position_embeddings": context}
    name = attention.register(attention.CPU_NAME) if target == "cpu" else attention.register()
    model = replace(family, options=options | {"num_hidden_layers": 1}).model(dtype=torch.bfloat16, attention=name)
    program = export_prefill(CausalLM(quantize_experts_(model, group_size=32), context))
    if target == "cpu":
        program = decompose(program)
    sizes = sizes_of(program.graph_module, context)
    # The cache, and matrices of tokens times the widest layer, but nothing of tokens times positions.
    assert len(sizes) > 20 and any("attention" in name or "scan" in name for name in sizes)
    assert {name: size for name, size in sizes.items() if size >= context * context} == {}
