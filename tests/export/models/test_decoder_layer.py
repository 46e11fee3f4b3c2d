"""Compares decoder layers' path for one token with their path for several, and checks the exported programs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from executorch_moe.export.build import streamline_
from executorch_moe.export.models import attention, synthetic
from executorch_moe.export.models.causal_lm import CausalLM, export_methods
from executorch_moe.export.models.decoder_layer import OneTokenDecoderLayer
from executorch_moe.export.quantize.dense import quantize_dense_
from executorch_moe.export.quantize.experts import quantize_experts_

from ..families import by_name

TEXT = [5, 17, 200, 33, 33, 8, 91]
WITHOUT_TIES = [68, 32, 130, 60, 253, 230, 241]
"""A text for which no router of the random models has two logits so close that rounding chooses another expert."""
CONTEXT = 16

pytestmark = pytest.mark.transformers


def model(dense: str, dtype: torch.dtype = torch.bfloat16, shape: str = "synthetic:tiny,layers=3") -> CausalLM:
    def prepare(part: torch.nn.Module) -> None:
        quantize_dense_(streamline_(part), dense, 32, embedding="int8" if dense == "int8" else "none")

    net = synthetic.build(
        synthetic.parse(shape), group_size=32, dtype=dtype, attention=attention.register(),
        prepare=prepare,
    )  # fmt: skip
    return CausalLM(net, CONTEXT)


def run(lm: CausalLM, ids: list[int], position: int) -> torch.Tensor:
    with torch.no_grad():
        return lm(torch.tensor([ids]), torch.arange(position, position + len(ids)))


@pytest.mark.parametrize("dense", ["none", "int8", "int4"])
def test_one_by_one_is_as_at_once(dense: str) -> None:
    lm = model(dense)
    assert all(type(layer) is OneTokenDecoderLayer for layer in lm.model.model.layers)
    at_once = run(lm, WITHOUT_TIES, 0)
    caches = [buffer.clone() for buffer in lm.kv_cache.buffers()]
    lm.reset()
    for position, token in enumerate(WITHOUT_TIES):
        one_by_one = run(lm, [token], position)
    # bf16 is rounded at other places: close, but not equal.
    assert (one_by_one - at_once).norm() / at_once.norm() < 0.02
    for one, other in zip(lm.kv_cache.buffers(), caches, strict=True):
        assert (one - other).float().norm() / other.float().norm() < 0.02


RECURRENT = (
    "synthetic:qwen3.5-35b-a3b,layers=5,hidden=128,experts=4,top_k=4,intermediate=128,shared=128,heads=4,head_dim=64,"
    "key_heads=2,value_heads=4,linear_dim=32,vocabulary=300,context=512"
)
"""Three layers of gated delta rule, one of full attention with an output gate and partial RoPE, and one more. A token
takes all experts, so that no near tie decides."""


@pytest.mark.parametrize("dense", ["none", "int8", "int4"])
def test_recurrent_layers_one_by_one_are_as_at_once(dense: str) -> None:
    lm = model(dense, shape=RECURRENT)
    layers = lm.model.model.layers
    assert all(type(layer) is OneTokenDecoderLayer for layer in layers)
    assert [layer.last for layer in layers] == [False] * 4 + [True]
    at_once = run(lm, TEXT, 0)
    caches = [buffer.clone() for buffer in lm.kv_cache.buffers()]
    for position, token in enumerate(TEXT):
        one_by_one = run(lm, [token], position)
    assert (one_by_one - at_once).norm() / at_once.norm() < 0.05
    for one, other in zip(lm.kv_cache.buffers(), caches, strict=True):
        assert (one - other).float().norm() / other.float().norm() < 0.05


def test_decode_of_recurrent_layers_is_fused() -> None:
    decode, prefill = (operators(model("int8", shape=RECURRENT), method) for method in ("decode", "prefill"))
    ours = (
        "one_token_norm_linear", "gated_delta_net", "one_token_attention", "one_token_experts", "one_token_linear",
    )  # fmt: skip
    counts = {name: decode.count(f"executorch_moe.{name}.default") for name in ours}
    # The only projection without a norm is lm_head.
    assert counts == dict(zip(ours, (4, 4, 1, 5, 1), strict=True))
    # Between the operators of two layers, nothing is computed.
    assert not any(word in name for name in decode for word in ("sigmoid", "silu", "aten.linear"))
    assert prefill.count("executorch_moe.gated_delta_net.default") == 4
    assert prefill.count("executorch_moe.one_token_linear.default") == 1  # lm_head, for the last token
    assert not any("one_token_attention" in name or "one_token_router" in name for name in prefill)
    assert not any(word in name for name in decode for word in ("dot_product", "topk", "softmax"))


def operators(lm: CausalLM, method: str) -> list[str]:
    program = export_methods(lm, one_token_linears=True)[method]
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def test_the_operators_of_both_methods() -> None:
    decode, prefill = (operators(model("int8"), method) for method in ("decode", "prefill"))
    for name in ("one_token_attention", "one_token_experts"):
        assert decode.count(f"executorch_moe.{name}.default") == 3
    for name in ("rotated_heads", "cached_attention", "top_experts", "fused_experts"):
        assert prefill.count(f"executorch_moe.{name}.default") == 3
    assert prefill.count("executorch_moe.residual_norm.default") == 5  # nothing is added to the first layer's input
    assert not any("one_token_attention" in name or "one_token_router" in name for name in prefill)
    # No other operators of attention or router remain.
    assert not any(word in name for name in decode + prefill for word in ("dot_product", "topk", "softmax"))


@pytest.mark.parametrize(
    ("dense", "dtype", "head_dim"),
    [("int4", torch.bfloat16, 32), ("none", torch.float32, 32), ("none", torch.bfloat16, 48)],
)
def test_what_the_operators_do_not_take_is_done_as_before(dense: str, dtype: torch.dtype, head_dim: int) -> None:
    found = operators(model(dense, dtype, f"synthetic:tiny,layers=3,head_dim={head_dim}"), "decode")
    assert not any("one_token_attention" in name for name in found)
    assert sum("scaled_dot_product_attention" in name for name in found) == 3


def test_a_sliding_window_is_done_as_before() -> None:
    lm = model("int8")
    for layer in lm.model.model.layers:
        layer.self_attn.sliding_window = 4
    assert not any("one_token_attention" in name for name in operators(lm, "decode"))


def test_only_the_last_layer_adds_up() -> None:
    layers = model("none").model.model.layers
    assert [layer.last for layer in layers] == [False, False, True]


SPARSE = {
    "dense behind sparse": {"num_hidden_layers": 3, "mlp_only_layers": [1]},
    "last dense": {"num_hidden_layers": 2, "mlp_only_layers": [1]},
    "first dense": {"num_hidden_layers": 2, "mlp_only_layers": [0]},
    "every second": {"num_hidden_layers": 4, "decoder_sparse_step": 2},
    "all dense but one": {"num_hidden_layers": 4, "mlp_only_layers": [0, 2, 3]},
}


def qwen3(**options: Any) -> Any:
    """A Qwen3-MoE model whose router we replace, with the attention of CUDA targets."""
    family = by_name("qwen3_moe")
    made = replace(family, options={**family.options, "norm_topk_prob": True, **options})
    return made.model(dtype=torch.bfloat16, attention=attention.register())


def prepared(model: torch.nn.Module) -> CausalLM:
    """Prepares a model as an export for CUDA does."""
    return CausalLM(streamline_(quantize_experts_(model, "bf16")), CONTEXT)


def check_one_by_one(lm: CausalLM) -> None:
    text = [token % 96 for token in TEXT]
    at_once = run(lm, text, 0)
    lm.reset()
    for position, token in enumerate(text):
        one_by_one = run(lm, [token], position)
    assert (one_by_one - at_once).norm() / at_once.norm() < 0.05


@pytest.mark.parametrize("options", SPARSE.values(), ids=SPARSE.keys())
def test_layers_without_experts_among_those_with(options: dict[str, Any]) -> None:
    """Their attention is fused too; only the last layer returns the sum."""
    lm = prepared(qwen3(**options))
    layers = list(lm.model.model.layers)
    routed = [layer.routed for layer in layers]
    assert True in routed and False in routed
    assert [layer.last for layer in layers] == [False] * (len(layers) - 1) + [True]
    check_one_by_one(lm)
    decode = operators(lm, "decode")
    assert decode.count("executorch_moe.one_token_attention.default") == len(layers)
    assert decode.count("executorch_moe.one_token_experts.default") == sum(routed)


def test_a_layer_of_another_structure_among_others() -> None:
    """It takes one tensor, so that the layer before it returns the sum."""
    model = qwen3(num_hidden_layers=3)
    layer = model.model.layers[1]
    layer.input_layernorm = torch.nn.LayerNorm(len(layer.input_layernorm.weight), dtype=torch.bfloat16)
    lm = prepared(model)
    layers = list(lm.model.model.layers)
    assert [isinstance(layer, OneTokenDecoderLayer) for layer in layers] == [True, False, True]
    assert layers[0].last and layers[2].last
    check_one_by_one(lm)


def test_a_window_in_some_layers() -> None:
    """Layers with a sliding window have no path for one token."""
    model = qwen3(num_hidden_layers=4)
    for index in (1, 2):
        model.model.layers[index].self_attn.sliding_window = 64
    lm = prepared(model)
    assert [layer.last for layer in lm.model.model.layers] == [False, False, False, True]
    check_one_by_one(lm)
    assert operators(lm, "decode").count("executorch_moe.one_token_attention.default") == 2
