"""A Hugging Face causal language model as two exportable methods, `prefill` and `decode`, on one static KV cache.

Letters: T tokens of one call, C positions in the cache (max_context), V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.export import Dim, ExportedProgram

from executorch_moe.export.host_memory import size, total_memory

from .keywords import cache_name, check
from .linears import OneTokenLinears
from .pretrained import plain_outputs_
from .sampling import Sampler, greedy, sample

MIN_CONTEXT = 8
KINDS = ("full_attention", "sliding_attention")
"""Of attention, in transformers' names. A layer with a window has a cache of all positions too, and another mask."""
CHANGING_ROPE = ("dynamic", "longrope")
"""RoPE types whose frequencies are chosen anew by the length of the text, which a traced method cannot do."""
EXAMPLE_TOKENS = 1024
"""Prefill is traced with a prompt of one less, which nothing divides: compilers size their tiles by it."""


class StaticKVCache(nn.Module):
    """Keys and values of all layers as named buffers `key_L` and `value_L`, each [1, heads, C, width].

    For latent attention the latents and the rotated part of the keys, which all heads share, are what is kept.
    Named buffers are what lets two exported methods share one cache: runtimes match mutated buffers by name.
    """

    def __init__(
        self, num_layers: int, num_heads: int, max_context: int, widths: tuple[int, int], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.num_layers = num_layers
        for layer in range(num_layers):
            for kind, width in zip(("key", "value"), widths, strict=True):
                zeros = torch.zeros(1, num_heads, max_context, width, dtype=dtype)
                self.register_buffer(f"{kind}_{layer}", zeros, persistent=True)

    def at(self, cache_position: Tensor) -> CacheView:
        """The cache as transformers' attention layers want it, for writing at `cache_position` [T]."""
        return CacheView(self, cache_position)

    def reset(self) -> None:
        """Back to zeros."""
        for buffer in self.buffers():
            buffer.zero_()


class CacheView:
    """What attention layers of transformers ask of a cache: `update` writes the new rows and returns the whole cache.

    The positions are the caller's, so nothing here counts tokens: transformers' own StaticCache keeps a counter, which
    would be one more mutated buffer and one more thing to reset.
    """

    is_compileable = True

    def __init__(self, cache: StaticKVCache, cache_position: Tensor) -> None:
        self.cache = cache
        self.cache_position = cache_position

    def layer(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, [1, heads, C, width] each."""
        return getattr(self.cache, f"key_{layer_idx}"), getattr(self.cache, f"value_{layer_idx}")

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, kwargs: Mapping[str, Any] | None = None, **keywords: Any
    ) -> tuple[Tensor, Tensor]:
        """key, value [1, heads, T, width] -> the layer's whole cache, [1, heads, C, width] each.

        Args:
            kwargs: keyword arguments of the attention layer, which transformers passes on from 5.24 on.

        Raises:
            ValueError: an argument that is unknown or asks for something else, see `keywords.check`.
        """
        check(f"{type(self).__name__}.update", {**(kwargs or {}), **keywords})
        keys, values = self.layer(layer_idx)
        keys[:, :, self.cache_position] = key.to(keys.dtype)
        values[:, :, self.cache_position] = value.to(values.dtype)
        return keys, values


class CausalLM(nn.Module):
    """Model plus cache; `forward` is what both methods compute."""

    def __init__(self, model: nn.Module, max_context: int) -> None:
        """Wraps `model` (a transformers `*ForCausalLM`), keeping its device and dtype; see `plain_outputs_`.

        Raises:
            ValueError, NotImplementedError: see `check_context`.
        """
        super().__init__()
        config: Any = model.config
        check_context(config, max_context)
        plain_outputs_(config)
        self.kinds = attention_kinds(config)
        self.model = model
        self.cache_name = cache_name(model)
        self.max_context = max_context
        # Of a norm: matrices may be quantized.
        dtype = next(parameter.dtype for parameter in model.parameters() if parameter.dim() == 1)
        heads, key_width, value_width = cache_sizes(model)
        self.kv_cache = StaticKVCache(config.num_hidden_layers, heads, max_context, (key_width, value_width), dtype)
        self.kv_cache.to(next(model.parameters()).device)

    def forward(self, input_ids: Tensor, cache_position: Tensor) -> Tensor:
        """Logits after the last token.

        Args:
            input_ids: int64 [1, T].
            cache_position: int64 [T], the position of each token; every position below the first was written before.

        Returns:
            fp32 [1, V].

        Raises:
            ValueError: a position outside [0, C); what is exported does not check.
        """
        return self.logits(input_ids, cache_position, 1)[:, -1].float()

    def logits(self, input_ids: Tensor, cache_position: Tensor, last: int) -> Tensor:
        """[1, last, V] after the last so many tokens, [1, T, V] for 0; arguments as for `forward`."""
        check_positions(cache_position, self.max_context)
        masks = {kind: self._mask(kind, cache_position) for kind in self.kinds}
        output = self.model(
            input_ids=input_ids,
            # 4-D masks are used as they are; models whose layers differ take one for each kind.
            attention_mask=masks if len(masks) > 1 else masks[self.kinds[0]],
            position_ids=cache_position[None],
            use_cache=True,
            logits_to_keep=last,
            **{self.cache_name: self.kv_cache.at(cache_position)},
        )
        return output.logits  # type: ignore[no-any-return]

    def _mask(self, kind: str, cache_position: Tensor) -> Tensor:
        """[1, 1, T, C] for layers of a kind: bool, true = may be seen, or what eager attention adds to the scores."""
        # A query sees the positions up to its own, all of which are written; the rest of the cache holds zeros or what
        # a longer, earlier text left there.
        positions, own = torch.arange(self.max_context, device=cache_position.device)[None, :], cache_position[:, None]
        mask = positions <= own
        if kind == "sliding_attention":
            mask = mask & (positions > own - self.model.config.sliding_window)
        if self.model.config._attn_implementation == "eager":
            mask = torch.zeros_like(mask, dtype=self.kv_cache.key_0.dtype).masked_fill(~mask, -1e9)
        return mask[None, None]

    def reset(self) -> None:
        """Forgets the text: the cache back to its initial values."""
        self.kv_cache.reset()


def check_context(config: Any, max_context: int) -> None:
    """Check that `CausalLM` can hold a model with a cache of this size.

    Raises:
        ValueError: `max_context` below 8 or beyond the positions that the model was made for.
        NotImplementedError: attention that is neither full nor of a sliding window, or positions that are encoded in
            another way in longer texts.
    """
    limit = config.max_position_embeddings
    if limit < MIN_CONTEXT:
        raise ValueError(
            f"the model's max_position_embeddings={limit} is less than the smallest cache, {MIN_CONTEXT}: "
            "use another model"
        )
    if not MIN_CONTEXT <= max_context <= limit:
        raise ValueError(
            f"max_context={max_context} must be between {MIN_CONTEXT} and the model's "
            f"max_position_embeddings={limit}: choose a value in that range"
        )
    if others := sorted(set(attention_kinds(config)) - set(KINDS)):
        raise NotImplementedError(
            f"layers of type {', '.join(others)} are not supported: use a model whose layers are {' or '.join(KINDS)}"
        )
    if changing := sorted(rope_types(config) & set(CHANGING_ROPE)):
        raise NotImplementedError(
            f"RoPE of type {', '.join(changing)} is not supported, its frequencies change with the length of the text: "
            "use a model with another rope_type (default, linear, llama3, yarn)"
        )


def check_cache(config: Any, max_context: int, item_bytes: int) -> None:
    """Check that a KV cache fits into this machine's memory, where the export makes it.

    Args:
        config: transformers' configuration. item_bytes: of one of its numbers.

    Raises:
        ValueError: it does not; says what it needs and what is there.
    """
    layers = config.num_hidden_layers  # one with a sliding window has a cache of all positions too
    if rank := getattr(config, "kv_lora_rank", None):
        width = rank + config.qk_rope_head_dim
    else:
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        width = 2 * config.num_key_value_heads * head
    needed, there = layers * width * max_context * item_bytes, total_memory()
    if there and needed > there:
        raise ValueError(
            f"max_context={max_context} needs a KV cache of {size(needed)}, but this machine has {size(there)} of "
            f"memory: use at most {there * max_context // needed}, or export where there is more"
        )


def cache_sizes(model: nn.Module) -> tuple[int, int, int]:
    """Heads that a layer's cache has, and the widths of a key and of a value.

    Raises:
        NotImplementedError: latent attention that caches what it expands the latents to, as older transformers' does.
    """
    config: Any = model.config
    if rank := getattr(config, "kv_lora_rank", None):
        if not all(hasattr(m, "expand_kv") for m in model.modules() if type(m).__name__.endswith("Attention")):
            raise NotImplementedError(
                "latent attention needs a transformers that caches the latents: install a version that "
                "`executorch-moe doctor` accepts"
            )
        return 1, rank, config.qk_rope_head_dim
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_key_value_heads, width, width


class SamplingLM(CausalLM):
    """`CausalLM` whose methods pick the next token themselves: eight bytes come back and not a whole vocabulary."""

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, cache_position: Tensor, temperature: Tensor, top_p: Tensor, seed: Tensor
    ) -> Tensor:
        """The next token.

        Args:
            input_ids, cache_position: as for `CausalLM`.
            temperature, top_p: fp32 [1]. seed: int64 [1]. See `sampling.sample`.

        Returns:
            int64 [1, 1]: the input_ids of the next call.
        """
        logits = super().forward(input_ids, cache_position)
        return sample(logits, cache_position[-1:] + 1, temperature, top_p, seed)


class GreedyLM(CausalLM):
    """`CausalLM` whose methods return the likeliest token, int64 [1, 1]: a choice of one kernel, without settings."""

    def forward(self, input_ids: Tensor, cache_position: Tensor) -> Tensor:
        """The likeliest next token; arguments as for `CausalLM`."""
        return greedy(super().forward(input_ids, cache_position))


BY_OUTPUT: dict[str, type[CausalLM]] = {"token": SamplingLM, "greedy": GreedyLM, "logits": CausalLM}
"""What the methods return -> the module that is exported."""


def check_positions(cache_position: Tensor, max_context: int) -> None:
    """Check positions in a cache, except while they are traced.

    Raises:
        ValueError: one is negative, or not below `max_context`. Negative ones would be written at the cache's end.
    """
    if torch.compiler.is_compiling() or is_fake(cache_position) or not cache_position.numel():
        return
    lowest, highest = (int(end) for end in cache_position.aminmax())
    if lowest < 0 or highest >= max_context:
        raise ValueError(
            f"cache_position has {lowest if lowest < 0 else highest}, expected positions from 0 to {max_context - 1}: "
            "count the tokens of the text from 0, or use a larger max_context"
        )


def attention_kinds(config: Any) -> list[str]:
    """The kinds of attention that a model's layers have. Some configurations give a window that no layer uses."""
    if kinds := getattr(config, "layer_types", None):
        return sorted(set(kinds))
    return ["sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"]


def rope_types(config: Any) -> set[str]:
    """How a model's layers encode positions, in transformers' names; some configurations say it for kinds of layers."""
    parameters = getattr(config, "rope_parameters", None) or {}
    parts = [part for part in (parameters, *parameters.values()) if isinstance(part, dict)]
    return {part["rope_type"] for part in parts if "rope_type" in part}


def export_methods(module: CausalLM, *, one_token_linears: bool = False) -> dict[str, ExportedProgram]:
    """Exports `module` as `prefill` (T from 2 to C, dynamic) and `decode` (T = 1).

    Both programs refer to weights and cache by the same qualified names, so that a runtime can share them.

    Args:
        one_token_linears: trace linear layers of one row as matrix-vector products; see `dense.matvec`. For CUDA.
    """
    device = module.kv_cache.key_0.device
    module.eval()

    def example(tokens: int) -> tuple[Tensor, ...]:
        text = torch.zeros(1, tokens, dtype=torch.int64, device=device), torch.arange(tokens, device=device)
        return text + Sampler().inputs(device) if isinstance(module, SamplingLM) else text

    length = Dim("T", min=2, max=module.max_context)
    dynamic: dict[str, Any] = {"input_ids": {1: length}, "cache_position": {0: length}}
    if isinstance(module, SamplingLM):
        dynamic |= {"temperature": None, "top_p": None, "seed": None}
    with torch.no_grad(), OneTokenLinears() if one_token_linears else contextlib.nullcontext():
        # strict=False: transformers' decorators and kernel hooks are plain Python that the tracer need not understand.
        return {
            "prefill": torch.export.export(
                module, example(min(EXAMPLE_TOKENS, module.max_context) - 1), dynamic_shapes=dynamic, strict=False
            ),
            "decode": torch.export.export(module, example(1), strict=False),
        }
