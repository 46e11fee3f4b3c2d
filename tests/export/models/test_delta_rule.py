"""Models with gated delta rule layers and a cache, against the unmodified models of transformers in fp32."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from executorch_moe.export.build import attention_of
from executorch_moe.export.models.causal_lm import CausalLM
from executorch_moe.export.models.delta_rule import GatedDeltaNet, replace_delta_rule_
from executorch_moe.export.models.linears import SideBySide, StoredInt4
from executorch_moe.export.models.router import SharedExpert
from executorch_moe.export.options import Target

from ...combinations import combinations
from ..families import RECURRENT, Family, by_name, tokens

pytestmark = pytest.mark.transformers

CONTEXT, NEW = 1088, 64
PROMPTS, CHUNKS = (1, 2, 63, 64, 65, 130, 1000), (0, 1, 7, 64)
BOUND = 5e-3
NAMES = [family.name for family in RECURRENT]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def long(family: Family) -> Family:
    return dataclasses.replace(family, options=family.options | {"max_position_embeddings": CONTEXT})


def extreme_gates_(model: nn.Module) -> nn.Module:
    """Makes beta 0 or 1 for most tokens, and the decay of a token anything from exp(-400) to almost 1."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("in_proj_b.weight", "in_proj_a.weight", "in_proj_ba.weight")):
                parameter.mul_(100.0)
            elif name.endswith("dt_bias"):
                parameter.copy_(torch.linspace(-20.0, 20.0, len(parameter)))
            elif name.endswith("A_log"):
                parameter.copy_(torch.linspace(-5.0, 3.0, len(parameter)))
    return model


@functools.cache
def unmodified(name: str, extreme: bool = False) -> nn.Module:
    model = long(by_name(name)).model("eager", attention="eager")
    return extreme_gates_(model) if extreme else model


@functools.cache
@torch.no_grad()
def expected_logits(name: str, count: int, extreme: bool = False) -> Tensor:
    """Logits of the unmodified model after each token, [T, V]."""
    logits: Tensor = unmodified(name, extreme)(input_ids=tokens(count), use_cache=False).logits[0]
    return logits


def ours(name: str, extreme: bool = False, context: int = CONTEXT) -> CausalLM:
    model: Any = copy.deepcopy(unmodified(name, extreme))
    model.set_attn_implementation(attention_of(Target("cpu", "fp32")))
    return CausalLM(model, context)


@torch.no_grad()
def run(model: CausalLM, ids: Tensor, chunk: int, start: int = 0) -> Tensor:
    """Logits after each token [T, V], of tokens that come in chunks."""
    count = ids.shape[1]
    chunks = [torch.arange(at, min(at + chunk, count)) for at in range(0, count, chunk)]
    return torch.cat([model.logits(ids[:, chunk], start + chunk, 0)[0] for chunk in chunks])


def often(name: str, prompt: int, chunk: int) -> bool:
    """Every pair of a prompt and a chunk for one of the models, and the whole prompts for both.

    Of the long prompt, `make test` leaves out one token at a time.
    """
    turn = (PROMPTS.index(prompt) + CHUNKS.index(chunk)) % len(NAMES)
    return chunk == 0 or (name == NAMES[turn] and (prompt < 1000 or chunk != 1))


@pytest.mark.parametrize(("name", "prompt", "chunk"), combinations(NAMES, PROMPTS, CHUNKS, chosen=often))
def test_logits_of_prompt_and_decode_are_those_of_transformers(name: str, prompt: int, chunk: int) -> None:
    ids, model = tokens(prompt + NEW), ours(name)
    expected = expected_logits(name, prompt + NEW)
    logits = torch.cat([run(model, ids[:, :prompt], chunk or prompt), run(model, ids[:, prompt:], 1, start=prompt)])
    assert relative_error(logits, expected) < BOUND
    assert relative_error(logits[-NEW:], expected[-NEW:]) < BOUND
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk", [130, 7])
def test_state_after_a_prompt_is_that_of_its_tokens_one_by_one(name: str, chunk: int) -> None:
    ids, at_once, one_by_one = tokens(130), ours(name), ours(name)
    run(at_once, ids, chunk)
    run(one_by_one, ids, 1)
    found = dict(at_once.kv_cache.named_buffers())
    assert {"conv_0", "recurrent_0", "conv_2", "recurrent_2", "key_3", "value_3"} <= found.keys() and len(found) == 8
    for name_of, buffer in one_by_one.kv_cache.named_buffers():
        assert relative_error(found[name_of], buffer) < 1e-4, name_of


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk", [130, 64, 1])
def test_extreme_gates(name: str, chunk: int) -> None:
    logits = run(ours(name, extreme=True), tokens(130), chunk)
    assert logits.isfinite().all()
    assert relative_error(logits, expected_logits(name, 130, extreme=True)) < BOUND


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reset", [True, False])
def test_a_second_text_equals_the_first(name: str, reset: bool) -> None:
    """Position 0 starts a text, with or without a reset before it; NaN of the text before does not stay."""
    model, ids = ours(name), tokens(70)
    first = run(model, ids, 64)
    for buffer_name, buffer in model.kv_cache.named_buffers():
        if buffer_name.startswith(("conv", "recurrent")):
            buffer.fill_(float("nan"))
    if reset:
        model.reset()
        assert not any(buffer.any() for buffer in model.kv_cache.buffers())
    assert torch.equal(run(model, ids, 64), first)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_without_a_cache(name: str) -> None:
    model = replace_delta_rule_(copy.deepcopy(unmodified(name)))
    assert sum(isinstance(module, GatedDeltaNet) for module in model.modules()) == 3
    logits = model(input_ids=tokens(66), use_cache=False).logits[0]
    assert relative_error(logits, expected_logits(name, 66)) < 1e-4


def test_the_bound_would_notice_the_state() -> None:
    model, ids = ours(NAMES[0]), tokens(66)
    run(model, ids[:, :65], 65)
    model.kv_cache.get_buffer("recurrent_1").mul_(0.9)
    assert relative_error(run(model, ids[:, 65:], 1, 65), expected_logits(NAMES[0], 66)[65:]) > 2 * BOUND


def test_scales_of_stored_codes_move_with_their_rows() -> None:
    """Rows of interleaved projections are put in another order, and so are the scales of their 4-bit codes."""
    layer: Any = copy.deepcopy(unmodified("qwen3_next")).model.layers[0].linear_attn  # type: ignore[union-attr]
    for linear in (layer.in_proj_qkvz, layer.in_proj_ba):
        linear.stored_int4 = StoredInt4(linear.weight[:, :2].clone(), None)
    merged = GatedDeltaNet(layer).in_proj
    assert torch.equal(merged.stored_int4.scale, merged.weight[:, :2])
    assert not torch.equal(merged.weight, torch.cat([layer.in_proj_qkvz.weight, layer.in_proj_ba.weight]))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_codes_of_large_projections_are_kept_beside_gates_without_codes(name: str) -> None:
    layer: Any = copy.deepcopy(unmodified(name)).model.layers[0].linear_attn  # type: ignore[union-attr]
    x, merged = torch.randn(1, 5, 64), GatedDeltaNet(layer).in_proj
    assert type(merged) is nn.Linear
    for linear in (layer.in_proj_qkvz,) if hasattr(layer, "in_proj_qkvz") else (layer.in_proj_qkv, layer.in_proj_z):
        linear.stored_int4 = StoredInt4(linear.weight[:, :2].clone(), None)
    beside: Any = GatedDeltaNet(layer).in_proj
    assert type(beside) is SideBySide
    large, gates = beside.linears
    assert torch.equal(large.stored_int4.scale, large.weight[:, :2]) and gates.stored_int4 is None
    torch.testing.assert_close(beside(x), merged(x))


@torch.no_grad()
def test_a_shared_expert_keeps_its_codes() -> None:
    """Its own gate is merged with it, unless that would lose 4-bit codes."""
    block: Any = copy.deepcopy(unmodified(NAMES[0])).model.layers[0].mlp  # type: ignore[union-attr]
    x, expert = torch.randn(5, 64), block.shared_expert
    expected = torch.sigmoid(block.shared_expert_gate(x)) * expert(x)
    whole = SharedExpert(expert, block.shared_expert_gate)
    assert whole.own_gate is None and whole.gate_up.out_features % 16 == 0
    torch.testing.assert_close(whole(x), expected)
    for linear in (expert.gate_proj, expert.up_proj):
        linear.stored_int4 = StoredInt4(linear.weight[:, :2].clone(), None)
    apart: Any = SharedExpert(expert, block.shared_expert_gate)
    assert torch.equal(apart.gate_up.stored_int4.scale, apart.gate_up.weight[:, :2])
    torch.testing.assert_close(apart(x), expected)


def test_inputs_that_it_does_not_support() -> None:
    model: Any = replace_delta_rule_(copy.deepcopy(unmodified(NAMES[0])))
    with pytest.raises(ValueError, match="called with an attention mask: pass texts without padding"):
        model.model.layers[0].linear_attn(torch.zeros(1, 3, 64), attention_mask=torch.ones(1, 3))
    with pytest.raises(ValueError, match="called with a DynamicCache: wrap the model in a CausalLM"):
        model(input_ids=tokens(5))
    layer: Any = copy.deepcopy(unmodified(NAMES[0])).model.layers[0].linear_attn  # type: ignore[union-attr]
    layer.activation = "gelu"
    with pytest.raises(NotImplementedError, match="activation 'gelu' and no bias in its convolution is not supported"):
        GatedDeltaNet(layer)
    layer.activation, layer.head_k_dim = "silu", 48
    with pytest.raises(NotImplementedError, match=r"key_dim=48, .* is not supported: use a model with"):
        GatedDeltaNet(layer)


def test_other_linear_attention_is_refused() -> None:
    model: Any = copy.deepcopy(unmodified(NAMES[0]))
    del model.model.layers[1].linear_attn.dt_bias
    with pytest.raises(NotImplementedError, match="3 layers of type linear_attention, of which 2 are gated"):
        CausalLM(model, 64)
