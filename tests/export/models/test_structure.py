"""Which models are supported: those whose layers, cache, attention and experts are, whatever their type is called."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from executorch_moe.backends.fusion import FusionOptions
from executorch_moe.backends.fusion.modules import find_experts
from executorch_moe.export.build import attention_of
from executorch_moe.export.checkpoint.streaming import StreamedModel
from executorch_moe.export.checkpoint.structure import check_structure
from executorch_moe.export.models.causal_lm import CausalLM
from executorch_moe.export.options import Target

from ..families import FAMILIES, FURTHER, RECURRENT, Family, tokens

CONTEXT, PROMPT, NEW = 40, 23, 8
CHUNKS = (7, 1, 15)


def chunks(model: CausalLM, ids: torch.Tensor) -> Iterator[torch.Tensor]:
    """Logits after each chunk of a text, then of each further token, which is the likeliest one."""
    start = 0
    for size in CHUNKS:
        logits = model(ids[:, start : start + size], torch.arange(start, start + size))
        start += size
        yield logits[0]
    for position in range(start, start + NEW):
        logits = model(logits.argmax(-1, keepdim=True), torch.tensor([position]))
        yield logits[0]


def check_text(model: Any, module: CausalLM, bound: float = 1e-5) -> None:
    """Asserts that prompt and greedy tokens of `module` equal those of the unmodified `model`, without a cache."""
    ids, ends = tokens(PROMPT), list(torch.tensor(CHUNKS).cumsum(0) - 1)
    for step, actual in enumerate(chunks(module, ids)):
        end = int(ends[step]) if step < len(ends) else ids.shape[1] - 1
        expected = model(input_ids=ids, use_cache=False).logits[0, end]
        assert (actual - expected).norm() / expected.norm() < bound, f"after position {end}"
        assert actual.argmax() == expected.argmax()
        if step >= len(ends) - 1:
            ids = torch.cat([ids, expected.argmax().view(1, 1)], 1)


@pytest.mark.transformers
@pytest.mark.parametrize("family", FURTHER, ids=str)
@pytest.mark.parametrize("target", ["cpu", "sm_90"])
@torch.no_grad()
def test_logits_and_tokens_equal_the_unmodified_model(family: Family, target: str) -> None:
    """In chunks and token by token, with the attention of each target in PyTorch."""
    model: Any = family.model()
    ours: Any = family.model()
    ours.set_attn_implementation(attention_of(Target(target), check_structure(ours)))
    check_text(model, CausalLM(ours, CONTEXT))


@pytest.mark.transformers
@pytest.mark.parametrize("family", FURTHER, ids=str)
@torch.no_grad()
def test_checkpoints_are_packed_layer_by_layer(family: Family, tmp_path: Path) -> None:
    """The experts' weights are exact in 4 bits, and are rounded to bf16 activations only."""
    model = family.model()
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    streamed = StreamedModel(tmp_path, torch.float32, "eager", FusionOptions("w4a16", 32))
    assert len(streamed.layers) == family.moe_layers and {layer.top_k for layer in streamed.layers} == {2}
    streamed.load()
    ids = tokens(9)
    expected = model(input_ids=ids, use_cache=False).logits
    actual = streamed.model(input_ids=ids, use_cache=False).logits
    assert (actual - expected).norm() / expected.norm() < 1.5e-2


@pytest.mark.parametrize("family", [*FAMILIES, *FURTHER, *RECURRENT], ids=str)
def test_a_structure_is_what_the_model_caches(family: Family) -> None:
    model = family.model()
    structure = check_structure(model)
    assert model.config._attn_implementation == "sdpa" or family.name == "gpt_oss"  # as before
    module = CausalLM(model, CONTEXT)
    for layer, (heads, key_width, value_heads, value_width) in structure.caches.items():
        key, value = module.kv_cache.at(torch.arange(1)).layer(layer)
        assert key.shape == (1, heads, CONTEXT, key_width) and value.shape == (1, value_heads, CONTEXT, value_width)
    assert structure.sinks == (family.name == "gpt_oss") and structure.latents == ("kv_lora_rank" in family.options)
    assert (
        set(structure.top_k) == {name for name, _ in find_experts(model)} and len(structure.top_k) == family.moe_layers
    )


SMALL: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64,
    "num_hidden_layers": 2, "max_position_embeddings": 64, "pad_token_id": None,
}  # fmt: skip


@pytest.mark.transformers
@pytest.mark.parametrize(
    ("prefix", "options", "message"),
    [
        (
            "Jamba",
            {"num_experts": 4, "mamba_d_state": 8},
            r"layers of type mamba \(JambaMambaMixer\) are not supported",
        ),
        (
            "GraniteMoeHybrid",
            {"num_local_experts": 4, "layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_head": 32},
            r"layers of type mamba \(GraniteMoeHybridMambaLayer\) are not supported",
        ),
        ("MiniMax", {"head_dim": 16}, "layers of type MiniMaxLightningAttention are not supported"),
        ("NemotronH", {"layers_block_type": ["mamba", "moe"]}, "layers of type m.* are not supported"),
        ("Llama4Text", {}, "layers of type chunked_attention are not supported"),
        (
            "Gemma4Text",
            {"layer_types": ["sliding_attention", "full_attention"]},
            r"layers of Gemma4ForCausalLM cache keys",
        ),
        (
            "MiniMaxM3VLText",
            {"layer_types": ["full_attention", "minimax_m3_sparse"]},
            "layers of type minimax_m3_sparse are not supported",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isalnum() else "",
)
def test_what_is_missing_is_named(prefix: str, options: dict[str, Any], message: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{prefix}Config")(**{**SMALL, **options})
    model = getattr(transformers, f"{prefix.removesuffix('Text')}ForCausalLM")
    with torch.device("meta"), pytest.raises(NotImplementedError, match=message):
        check_structure(model._from_config(config))
