"""A Hugging Face causal language model as two exportable methods, `prefill` and `decode`, on one static KV cache.

Letters: T tokens of one call, C positions in the cache (max_context), V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.export import Dim, ExportedProgram

from .attention import CPU_NAME, NAME
from .delta_rule import LINEAR, replace_delta_rule_, state_shapes
from .keywords import cache_name, check
from .linears import OneTokenLinears
from .pretrained import attention_kinds, check_rope, plain_outputs_
from .sampling import FindNucleus, Sampler, all_tokens, fresh_noise, greedy, nucleus, sample

MIN_CONTEXT = 8
KINDS = ("full_attention", "sliding_attention", LINEAR)
"""Supported kinds of layers, in transformers' names. A layer with a sliding window caches all positions too; only its
mask differs. Linear attention is supported as gated delta rule (`GatedDeltaNet`)."""
COLDEST = 2e-6
"""`EngineLM` takes the likeliest token up to this temperature."""
EXAMPLE_TOKENS = 1024
"""Prefill is traced with one token less: compilers size their tiles by this length, and an odd one keeps them from
assuming divisibility."""


class StaticKVCache(nn.Module):
    """Keys and values of all layers as named buffers `key_L` and `value_L`, each [1, heads, C, width].

    Latent attention caches the latents and the rotated part of the keys, which all heads share. Gated delta rule
    layers have buffers `conv_L` [K, channels] and `recurrent_L`, fp32 [heads, key_dim, value_dim], instead.
    Two exported methods share one cache because runtimes match mutated buffers by name.

    Attributes:
        dtype: of keys, values and `conv_L`.
    """

    def __init__(
        self,
        num_layers: int,
        num_heads: int,
        max_context: int,
        widths: tuple[int, int],
        dtype: torch.dtype,
        states: Mapping[int, tuple[tuple[int, ...], tuple[int, ...]]] | None = None,
    ) -> None:
        """
        Args:
            num_layers, num_heads: of the model. max_context: C. widths: of a key and of a value. dtype: see above.
            states: layer -> shapes of its two states, for gated delta rule layers.
        """
        super().__init__()
        self.num_layers, self.dtype = num_layers, dtype
        for layer in range(num_layers):
            if states and layer in states:
                conv, recurrent = states[layer]
                self.register_buffer(f"conv_{layer}", torch.zeros(conv, dtype=dtype))
                self.register_buffer(f"recurrent_{layer}", torch.zeros(recurrent, dtype=torch.float32))
                continue
            for kind, width in zip(("key", "value"), widths, strict=True):
                zeros = torch.zeros(1, num_heads, max_context, width, dtype=dtype)
                self.register_buffer(f"{kind}_{layer}", zeros, persistent=True)

    def at(self, cache_position: Tensor) -> CacheView:
        """The cache as transformers' attention layers expect it, for writing at `cache_position` int64 [T]."""
        return CacheView(self, cache_position)

    @property
    def device(self) -> torch.device:
        """Where the cache is."""
        return next(self.buffers()).device

    def reset(self) -> None:
        """Fills the cache with zeros."""
        for buffer in self.buffers():
            buffer.zero_()


class CacheView:
    """The cache interface of transformers' attention layers: `update` writes new rows and returns the whole cache.

    The caller passes the positions: the counter of transformers' StaticCache would be one more mutated buffer to share.
    """

    is_compileable = True
    slots: Tensor | None = None
    """int64 [T], the slot of each token, if all are of different texts (`batch.cache.RowsView`)."""

    def __init__(self, cache: StaticKVCache, cache_position: Tensor) -> None:
        self.cache = cache
        self.cache_position = cache_position

    def layer(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, [1, heads, C, width] each."""
        return getattr(self.cache, f"key_{layer_idx}"), getattr(self.cache, f"value_{layer_idx}")

    def states(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """States of a gated delta rule layer; see `delta_rule.HoldsStates`."""
        return getattr(self.cache, f"conv_{layer_idx}"), getattr(self.cache, f"recurrent_{layer_idx}")

    def keep_states(self, layer_idx: int, conv: Tensor, recurrent: Tensor) -> None:
        """Writes the new states of a gated delta rule layer, of the shapes that `states` returned."""
        for buffer, new in zip(self.states(layer_idx), (conv, recurrent), strict=True):
            buffer.copy_(new)

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, kwargs: Mapping[str, Any] | None = None, **keywords: Any
    ) -> tuple[Tensor, Tensor]:
        """key, value [1, heads, T, width] -> the layer's whole cache, [1, heads, C, width] each.

        Args:
            kwargs: keyword arguments of the attention layer; transformers passes them since 5.24.

        Raises:
            ValueError: an unknown argument, or a value that would change the result; see `keywords.check`.
        """
        check(f"{type(self).__name__}.update", {**(kwargs or {}), **keywords})
        keys, values = self.layer(layer_idx)
        keys[:, :, self.cache_position] = key.to(keys.dtype)
        values[:, :, self.cache_position] = value.to(values.dtype)
        return keys, values


class CausalLM(nn.Module):
    """A causal language model with its cache; both exported methods compute `forward`.

    Attributes:
        settings: number of sampling settings that `forward` takes after the positions, in the order of
            `Sampler.inputs`.
    """

    settings = 0

    def __init__(self, model: nn.Module, max_context: int) -> None:
        """Wraps `model` (a transformers `*ForCausalLM`), keeping its device and dtype.

        It is changed in place: see `plain_outputs_` and `replace_delta_rule_`.

        Raises:
            ValueError, NotImplementedError: see `check_context`, `replace_delta_rule_` and `state_shapes`.
        """
        super().__init__()
        config: Any = model.config
        check_context(config, max_context)
        plain_outputs_(config)
        self.kinds = attention_kinds(config)
        self.model = replace_delta_rule_(model)
        self.cache_name = cache_name(model)
        self.max_context = max_context
        # The dtype of a norm: matrices may be quantized.
        dtype = next(parameter.dtype for parameter in model.parameters() if parameter.dim() == 1)
        heads, key_width, value_width = cache_sizes(model)
        widths = key_width, value_width
        self.kv_cache = StaticKVCache(
            config.num_hidden_layers, heads, max_context, widths, dtype, state_shapes(model)
        ).to(next(model.parameters()).device)

    def forward(self, input_ids: Tensor, cache_position: Tensor) -> Tensor:
        """Logits after the last token.

        Args:
            input_ids: int64 [1, T].
            cache_position: int64 [T], the position of each token; all positions before the first must be in the cache.
                Layers with states continue after the last token that was computed, whatever its position; at
                position 0 they start anew.

        Returns:
            fp32 [1, V].

        Raises:
            ValueError: a position outside [0, C). Exported methods do not check this.
        """
        return self.logits(input_ids, cache_position, 1)[:, -1].float()

    def logits(self, input_ids: Tensor, cache_position: Tensor, last: int) -> Tensor:
        """Logits after the last `last` tokens, [1, last, V], or after all, [1, T, V], if it is 0; see `forward`."""
        check_positions(cache_position, self.max_context)
        masks = {kind: self._mask(kind, cache_position) for kind in self.kinds}
        several = len(masks) > 1 or LINEAR in masks
        output = self.model(
            input_ids=input_ids,
            # transformers uses 4-D masks unchanged; a model with several kinds of layers takes one mask for each kind.
            attention_mask=masks if several else masks[self.kinds[0]],
            position_ids=cache_position[None],
            use_cache=True,
            logits_to_keep=last,
            **{self.cache_name: self.kv_cache.at(cache_position)},
        )
        return output.logits  # type: ignore[no-any-return]

    def _mask(self, kind: str, cache_position: Tensor) -> Tensor | None:
        """Mask for one kind of layer, as the model's attention takes it.

        The visible positions, see `grouped_attention`; for other attention [1, 1, T, C]: bool, true where attention is
        allowed, or for eager attention the values that are added to the scores. None for linear attention.
        """
        if kind == LINEAR:
            return None
        # A query attends to positions up to its own, all of which are written. The rest of the cache holds zeros or
        # rows of an earlier, longer text.
        if self.model.config._attn_implementation in (NAME, CPU_NAME):
            last = cache_position[None, None, :, None]
            if kind == "sliding_attention":
                return torch.cat([(last - self.model.config.sliding_window + 1).clamp(min=0), last], -1)
            return last
        positions, own = torch.arange(self.max_context, device=cache_position.device)[None, :], cache_position[:, None]
        mask = positions <= own
        if kind == "sliding_attention":
            mask = mask & (positions > own - self.model.config.sliding_window)
        if self.model.config._attn_implementation == "eager":
            mask = torch.zeros_like(mask, dtype=self.kv_cache.dtype).masked_fill(~mask, -1e9)
        return mask[None, None]

    def reset(self) -> None:
        """Clears the cache."""
        self.kv_cache.reset()


def check_context(config: Any, max_context: int) -> None:
    """Checks that `CausalLM` supports a model with a cache of this size.

    Raises:
        ValueError: `max_context` below 8 or above the model's max_position_embeddings.
        NotImplementedError: attention other than full or sliding-window, or RoPE frequencies that depend on the length
            of the text.
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
    check_kinds(attention_kinds(config))
    check_rope(config)


def check_kinds(kinds: Iterable[str]) -> None:
    """Checks the kinds of a model's layers.

    Raises:
        NotImplementedError: kinds that are not in `KINDS`.
    """
    if others := sorted(set(kinds) - set(KINDS)):
        raise NotImplementedError(
            f"layers of type {', '.join(others)} are not supported: use a model whose layers are {' or '.join(KINDS)}"
        )


def cache_sizes(model: nn.Module) -> tuple[int, int, int]:
    """Number of heads in a layer's cache, width of a key, width of a value.

    Raises:
        NotImplementedError: latent attention of an older transformers, which caches expanded keys and values.
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
    """`CausalLM` that samples the next token on the device: a method returns 8 bytes instead of V logits.

    Attributes:
        find_nucleus: `sampling.nucleus`, or `sampling.sorted_nucleus` for the CPU.
    """

    settings = 3
    find_nucleus: FindNucleus = staticmethod(nucleus)

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
        return sample(logits, cache_position[-1:] + 1, temperature, top_p, seed, self.find_nucleus)


class GreedyLM(CausalLM):
    """`CausalLM` that returns the likeliest token, int64 [1, 1]; it takes no sampling settings."""

    def forward(self, input_ids: Tensor, cache_position: Tensor) -> Tensor:
        """The likeliest next token; arguments as for `CausalLM`."""
        return greedy(super().forward(input_ids, cache_position))


class EngineLM(CausalLM):
    """`CausalLM` with the methods of `Qwen35MoEEngine`, the engine of several sessions among ExecuTorch's examples.

    Source: executorch/examples/models/qwen3_5_moe, qwen35_moe_engine.cpp and sampler.py.
    """

    settings = 1

    def forward(self, input_ids: Tensor, cache_position: Tensor, temperature: Tensor) -> Tensor:  # type: ignore[override]
        """The next token, drawn from all tokens with new noise in each call.

        Args:
            input_ids, cache_position: as for `CausalLM`.
            temperature: fp32 [1]. That engine gives 1e-6 for 0, which takes the likeliest token.

        Returns:
            fp32 [1, 1]: whole numbers, exact for the at most 2**24 tokens that exports accept.
        """
        logits = super().forward(input_ids, cache_position)
        warm = torch.where(temperature <= COLDEST, 0.0, temperature)
        seed, position = fresh_noise(temperature.device), cache_position[-1:] + 1
        return sample(logits, position, warm, torch.ones_like(warm), seed, all_tokens).float()


BY_OUTPUT: dict[str, type[CausalLM]] = {
    "token": SamplingLM,
    "greedy": GreedyLM,
    "logits": CausalLM,
    "engine": EngineLM,
}
"""Output of the methods -> module to export."""


def check_positions(cache_position: Tensor, max_context: int) -> None:
    """Checks positions in a cache; does nothing while a method is traced.

    Raises:
        ValueError: a position below 0, which would index from the cache's end, or not below `max_context`.
    """
    if torch.compiler.is_compiling() or is_fake(cache_position) or not cache_position.numel():
        return
    lowest, highest = (int(end) for end in cache_position.aminmax())
    if lowest < 0 or highest >= max_context:
        raise ValueError(
            f"cache_position has {lowest if lowest < 0 else highest}, expected positions from 0 to {max_context - 1}: "
            "count the tokens of the text from 0, or use a larger max_context"
        )


def export_methods(module: CausalLM, *, one_token_linears: bool = False) -> dict[str, ExportedProgram]:
    """Exports `module` as `prefill` (dynamic T from 1 to C) and `decode` (T = 1, faster).

    Both programs name weights and cache alike, so that a runtime can share them.

    Args:
        one_token_linears: trace linear layers of one row as matrix-vector products (`linears.matvec`). For CUDA.
    """
    return {
        "prefill": export_prefill(module, one_token_linears=one_token_linears),
        "decode": _export(module, 1, None, one_token_linears),
    }


def export_prefill(module: CausalLM, *, one_token_linears: bool = False) -> ExportedProgram:
    """Exports `module` for 1 to C tokens; see `export_methods`."""
    length = Dim("T", min=1, max=module.max_context)
    dynamic: dict[str, Any] = {"input_ids": {1: length}, "cache_position": {0: length}}
    dynamic |= dict.fromkeys(("temperature", "top_p", "seed")[: module.settings])
    return _export(module, min(EXAMPLE_TOKENS, module.max_context) - 1, dynamic, one_token_linears)


def _export(module: CausalLM, tokens: int, dynamic: dict[str, Any] | None, one_token_linears: bool) -> ExportedProgram:
    device = module.kv_cache.device
    module.eval()
    text = torch.zeros(1, tokens, dtype=torch.int64, device=device), torch.arange(tokens, device=device)
    example = text + Sampler().inputs(device)[: module.settings]
    with torch.no_grad(), OneTokenLinears() if one_token_linears else contextlib.nullcontext():
        # strict=False: the strict tracer does not handle transformers' decorators and kernel hooks.
        return torch.export.export(module, example, dynamic_shapes=dynamic, strict=False)
