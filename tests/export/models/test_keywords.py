"""Keyword arguments that transformers passes to our replacements: both names of the cache; none is ignored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from executorch_moe.export.build import streamline_
from executorch_moe.export.models import attention
from executorch_moe.export.models.attention import grouped_attention
from executorch_moe.export.models.causal_lm import CausalLM, StaticKVCache
from executorch_moe.export.models.decoder_layer import OneTokenDecoderLayer
from executorch_moe.export.models.keywords import CACHE_NAMES, cache_name
from executorch_moe.export.quantize.experts import ExecutorchExperts

from ..families import FAMILIES, Family, by_name, tokens

pytestmark = pytest.mark.transformers

TOKENS, CONTEXT = 6, 32


def streamable(family: Family) -> Any:
    """The model of a family; a Qwen3-MoE model has a router that we replace."""
    return replace(family, options=family.options | {"norm_topk_prob": True}).model()


def tiny() -> Any:
    return streamable(by_name("qwen3_moe"))


def view(model: Any) -> Any:
    heads, width = model.config.num_key_value_heads, model.config.head_dim
    cache = StaticKVCache(model.config.num_hidden_layers, heads, CONTEXT, (width, width), torch.float32)
    return cache.at(torch.arange(TOKENS))


def inputs(model: Any, positions: int = CONTEXT) -> dict[str, Any]:
    """Arguments of a decoder layer and its attention, for a cache of that many positions."""
    hidden = torch.randn(1, TOKENS, model.config.hidden_size, generator=torch.Generator().manual_seed(3))
    mask = (torch.arange(positions) <= torch.arange(TOKENS)[:, None])[None, None]
    rotation = model.model.rotary_emb(hidden, torch.arange(TOKENS)[None])
    return {"hidden_states": hidden, "attention_mask": mask, "position_embeddings": rotation}


def parts(model: Any) -> tuple[nn.Module, nn.Module]:
    """A decoder layer of ours and its attention."""
    layer = streamline_(model).model.layers[0]  # type: ignore[union-attr, index]
    assert isinstance(layer, OneTokenDecoderLayer)
    return layer, layer.self_attn


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
@pytest.mark.parametrize("which", [0, 1], ids=["layer", "attention"])
def test_the_cache_by_either_name(which: int) -> None:
    model = tiny()
    part, arguments = parts(model)[which], inputs(model)
    results, caches = [], []
    for name in CACHE_NAMES:
        caches.append(view(model))
        results.append(first(part(**arguments, **{name: caches[-1]})))
    assert torch.equal(*results)
    keys = [cache.layer(0)[0] for cache in caches]
    assert keys[0].any() and torch.equal(*keys)
    with pytest.raises(ValueError, match="with both cache and past_key_values: give one"):
        part(**arguments, cache=caches[0], past_key_values=caches[1])


CALLS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "OneTokenDecoderLayer": lambda keywords: parts(model := tiny())[0](**inputs(model, TOKENS), **keywords),
    "MergedAttention": lambda keywords: parts(model := tiny())[1](**inputs(model, TOKENS), **keywords),
    "grouped_attention": lambda keywords: grouped_attention(
        nn.Module(), *(torch.zeros(1, 2, 3, 8) for _ in range(3)), None, **keywords
    ),
    "CacheView.update": lambda keywords: view(model := tiny()).update(
        *(torch.zeros(1, model.config.num_key_value_heads, TOKENS, model.config.head_dim) for _ in range(2)),
        0, **keywords,
    ),
    "CacheView.update, passed on": lambda keywords: CALLS["CacheView.update"]({"kwargs": keywords}),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", list(CALLS)[:2])
def test_arguments_that_change_nothing(name: str) -> None:
    given = {
        "position_ids": torch.arange(TOKENS)[None],
        "use_cache": False,
        "is_causal": True,
        "output_router_logits": False,
        "output_attentions": None,
        "cu_seq_lens_q": None,
        "past_key_values": None,
    }
    plain, same = (first(CALLS[name](keywords)) for keywords in ({}, given))
    assert torch.equal(plain, same)


@torch.no_grad()
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"layer_cache": 1}, "was called with the unknown argument 'layer_cache', it accepts position_ids, "),
        ({"output_attentions": True}, "was called with output_attentions=True, which it does not support"),
        ({"cu_seq_lens_q": torch.zeros(2)}, r"was called with cu_seq_lens_q=tensor \[2\], which it does not support"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_nothing_is_ignored(name: str, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{name.partition(',')[0]} {message}"):
        CALLS[name](keywords)


def test_attention_without_a_mask_is_causal() -> None:
    """transformers omits a causal mask where `is_causal` implies it."""
    q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    causal = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    got, expected = (grouped_attention(nn.Module(), q, k, k, mask)[0] for mask in (None, causal))
    torch.testing.assert_close(got, expected)
    # One token attends to all positions; so does every token if the module or the caller disables `is_causal`.
    everything = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    one, expected = (grouped_attention(nn.Module(), q[:, :, :1], k, k, m)[0] for m in (None, everything[:, :, :1]))
    torch.testing.assert_close(one, expected)
    module: Any = SimpleNamespace(is_causal=False)
    expected, _ = grouped_attention(nn.Module(), q, k, k, everything)
    torch.testing.assert_close(grouped_attention(module, q, k, k, None)[0], expected)
    torch.testing.assert_close(grouped_attention(nn.Module(), q, k, k, None, is_causal=False)[0], expected)


@torch.no_grad()
@pytest.mark.parametrize("streamlined", [False, True])
def test_a_model_with_our_attention_and_no_mask(streamlined: bool) -> None:
    model = tiny()
    ids = tokens(TOKENS)
    expected = model(input_ids=ids, use_cache=False).logits
    model.set_attn_implementation(attention.register())
    if streamlined:
        streamline_(model)
    got = model(input_ids=ids, use_cache=False).logits
    assert (got - expected).norm() / expected.norm() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_calls_us_with_arguments_that_we_know(family: Family) -> None:
    """With our cache, and our layers where a CUDA target has them, logits equal those of the unmodified model."""
    model = streamable(family)
    ids = tokens(TOKENS)
    expected = model(input_ids=ids, use_cache=False).logits[0].float()
    if family.name not in ("gpt_oss", "deepseek_v3"):  # attention sinks, and keys and values of different widths
        model.set_attn_implementation(attention.register())
        streamline_(model)
    elif family.name == "gpt_oss":
        model.set_attn_implementation("eager")
    wrapped = CausalLM(model, CONTEXT)
    prefill = wrapped.logits(ids[:, :-1], torch.arange(TOKENS - 1), 0)[0]
    decode = wrapped.logits(ids[:, -1:], torch.tensor([TOKENS - 1]), 0)[0]
    got = torch.cat([prefill, decode]).float()
    assert (got - expected).norm() / expected.norm() < 1e-3


def test_the_name_that_a_model_has_for_its_cache() -> None:
    import inspect

    import transformers

    name = cache_name(tiny())
    assert name in inspect.signature(transformers.Qwen3MoeForCausalLM.forward).parameters
    with pytest.raises(ValueError, match=r"Linear\.forward takes no cache or past_key_values"):
        cache_name(nn.Linear(2, 2))


def test_executorch_experts_refuse_another_top_k() -> None:
    experts = ExecutorchExperts.__new__(ExecutorchExperts)
    with pytest.raises(ValueError, match="topk_ids has 2 columns, but top_k=4"):
        ExecutorchExperts.forward(experts, torch.zeros(3, 8), torch.zeros(3, 2), torch.zeros(3, 2), 4)
