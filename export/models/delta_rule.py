"""Gated delta rule layers (Qwen3-Next, Qwen3.5-MoE): one projection, one operator, and the output projection.

transformers' layer pads the text to chunks of 64 tokens, and updates its states in ways that depend on the cache's
history: it cannot be traced for a changing length. `gated_delta_net` computes everything between the projections for
any length, and continues from the states that the layer's cache holds.

Letters: T tokens, H hidden size, Hk and Hv key and value heads, Dk and Dv their widths, K width of the convolution,
C = 2 * Hk * Dk + Hv * Dv its channels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from executorch_moe.kernels.delta_rule.arguments import CONV_SIZES, HEAD_DIMS, DeltaRuleSizes, fits_delta_rule
from executorch_moe.kernels.delta_rule.op import gated_delta_net, rows_delta_rule

from .attention import merged
from .keywords import STATE_CACHE_NAMES, take_cache
from .linears import SideBySide, stored_int4
from .pretrained import LINEAR as LINEAR

_PARTS = ("conv1d", "A_log", "dt_bias", "norm", "out_proj")
_SEPARATE = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
_INTERLEAVED = ("in_proj_qkvz", "in_proj_ba")


@runtime_checkable
class HoldsStates(Protocol):
    """A cache of states: what `GatedDeltaNet` needs of `causal_lm.CacheView`."""

    cache_position: Tensor
    slots: Tensor | None

    def states(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """The last inputs of a layer's convolution, a ring [K, C], and its recurrent state, fp32 [Hv, Dk, Dv].

        With `slots`, int64 [T], each token is of another text, and both have a first axis of all slots.
        """
        ...

    def keep_states(self, layer_idx: int, conv: Tensor, recurrent: Tensor) -> None:
        """Writes the new states."""
        ...


class GatedDeltaNet(nn.Module):
    """Replaces transformers' gated delta rule layer; see `fits`.

    The first token of a text, at position 0, starts from empty states, whatever the cache holds. Any other token must
    follow the last one: states cannot go back to an earlier position.
    """

    def __init__(self, layer: Any) -> None:
        """Takes over the weights of a layer.

        Raises:
            NotImplementedError: a convolution with a bias, an activation other than SiLU, or sizes that
                `gated_delta_net` does not support.
        """
        super().__init__()
        sizes = _supported_sizes(layer)
        self.layer_idx = layer.layer_idx
        self.key_heads, self.value_heads = sizes.key_heads, sizes.value_heads
        self.key_dim, self.value_dim = sizes.key_dim, sizes.value_dim
        self.eps = layer.norm.variance_epsilon
        separate = hasattr(layer, _SEPARATE[0])
        linears = [getattr(layer, name) for name in (_SEPARATE if separate else _INTERLEAVED)]
        rows = None if separate else self._interleaved_rows()
        *large, _, _ = linears if separate else [linears[0], None, None]
        gates = 2 * self.value_heads
        if all(map(stored_int4, large)) and not all(map(stored_int4, linears)):
            # Merged with weights that have none, 4-bit codes of a checkpoint would be lost.
            first = None if rows is None else rows[:-gates]
            second = None if rows is None else rows[-gates:] - len(linears[0].weight)
            self.in_proj: nn.Module = SideBySide(merged(large, first), merged(linears[len(large) :], second))
        else:
            self.in_proj = merged(linears, rows)
        self.out_proj = layer.out_proj
        self.register_buffer("conv_weight", layer.conv1d.weight.detach()[:, 0].clone())
        self.register_buffer("dt_bias", layer.dt_bias.detach().float())
        self.register_buffer("a_log", layer.A_log.detach().float())
        self.register_buffer("norm_weight", layer.norm.weight.detach())

    def _interleaved_rows(self) -> Tensor:
        """Rows of the interleaved projections in the order of the separate ones.

        For each key head, they have its query, its key, the values and z of its value heads; then, for each key head, b
        and a of its value heads.
        """
        values = self.value_heads // self.key_heads
        sizes = [self.key_dim, self.key_dim, values * self.value_dim, values * self.value_dim]
        qkvz = torch.arange(self.key_heads * sum(sizes)).view(self.key_heads, -1)
        ba = torch.arange(2 * self.value_heads).view(self.key_heads, -1) + qkvz.numel()
        return torch.cat([part.flatten() for part in (*qkvz.split(sizes, 1), *ba.split(values, 1))])

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the convolution's state [K, C] and of the recurrent state [Hv, Dk, Dv]."""
        channels, width = self.conv_weight.shape
        return (width, channels), (self.value_heads, self.key_dim, self.value_dim)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **keywords: Any) -> Tensor:
        """Computes the layer behind transformers' interface.

        Args:
            hidden_states: float [1, T, H].
            attention_mask: None; texts are not padded.
            keywords: the cache, a `HoldsStates`; without one, the text starts with the first token.

        Returns:
            [1, T, H].

        Raises:
            ValueError: a mask, a cache of another kind, or see `keywords.take_cache`.
        """
        cache = take_cache(type(self).__name__, keywords, STATE_CACHE_NAMES)
        if attention_mask is not None:
            raise ValueError(f"{type(self).__name__} was called with an attention mask: pass texts without padding")
        return self.out_proj(self.mix(self.in_proj(hidden_states), cache))  # type: ignore[no-any-return]

    def mix(self, projected: Tensor, cache: Any) -> Tensor:
        """The input of the output projection, [1, T, Hv * Dv], of the input projection's result; see `forward`.

        With tokens of several texts (`HoldsStates.slots`), `projected` may also be [T, 1, columns], and so the result.
        """
        if cache is None:
            position, (conv, state) = torch.zeros(1, dtype=torch.int64, device=projected.device), self._empty()
        elif isinstance(cache, HoldsStates):
            position, (conv, state) = cache.cache_position[:1], cache.states(self.layer_idx)
        else:
            raise ValueError(
                f"{type(self).__name__} was called with a {type(cache).__name__}: wrap the model in a CausalLM, or "
                "call it with use_cache=False"
            )
        weights = self.conv_weight, self.dt_bias, self.a_log, self.norm_weight
        sizes = self.key_heads, self.key_dim, self.eps
        if cache is not None and cache.slots is not None:
            rows = projected.flatten(0, 1)
            places = cache.cache_position, cache.slots
            out, *states = rows_delta_rule(rows, *weights, conv, state, *places, *sizes)
            cache.keep_states(self.layer_idx, *states)
            return out.reshape(*projected.shape[:2], -1)
        out, *states = gated_delta_net(projected[0], *weights, conv, state, position, *sizes)
        if cache is not None:
            cache.keep_states(self.layer_idx, *states)
        return out[None]

    def _empty(self) -> tuple[Tensor, Tensor]:
        conv, state = self.state_shapes
        return self.conv_weight.new_zeros(conv), self.a_log.new_zeros(state)


def _supported_sizes(layer: Any) -> DeltaRuleSizes:
    """Sizes of a layer that `gated_delta_net` can compute.

    Raises:
        NotImplementedError: see `GatedDeltaNet`.
    """
    if layer.conv1d.bias is not None or layer.activation not in ("silu", "swish"):
        raise NotImplementedError(
            f"{type(layer).__name__} with activation {layer.activation!r} and "
            f"{'a' if layer.conv1d.bias is not None else 'no'} bias in its convolution is not supported: use a "
            "model with SiLU and no bias"
        )
    sizes = DeltaRuleSizes(
        layer.num_k_heads, layer.num_v_heads, layer.head_k_dim, layer.head_v_dim, layer.conv1d.weight.shape[-1]
    )
    if not fits_delta_rule(sizes):
        raise NotImplementedError(
            f"{type(layer).__name__} with {', '.join(f'{name}={size}' for name, size in sizes._asdict().items())} "
            f"is not supported: use a model with key_dim and value_dim among {HEAD_DIMS}, conv_size among "
            f"{CONV_SIZES}, and value_heads a multiple of key_heads"
        )
    return sizes


class AnyLength(nn.Module):
    """A gated delta rule layer of transformers, with its own weights, that can be traced for any length.

    It has the layer's submodules and parameters by the layer's names, so that a program has them as in the model.
    """

    def __init__(self, layer: Any) -> None:
        """Takes the weights of a layer without copying them.

        Raises:
            NotImplementedError: see `GatedDeltaNet`.
        """
        super().__init__()
        self.sizes = _supported_sizes(layer)
        self.interleaved = not hasattr(layer, _SEPARATE[0])
        for name in (*(_INTERLEAVED if self.interleaved else _SEPARATE), *_PARTS):
            setattr(self, name, getattr(layer, name))

    def _projected(self, hidden_states: Tensor) -> Tensor:
        """Query, key, value, z, b and a of each token, [B, T, P]."""
        names = _INTERLEAVED if self.interleaved else _SEPARATE
        parts = [getattr(self, name)(hidden_states) for name in names]
        if self.interleaved:
            # For each key head: its query, its key, the values and z of its value heads; then b and a of these.
            heads, key_dim = self.sizes.key_heads, self.sizes.key_dim
            group = self.sizes.value_heads // heads
            values = group * self.sizes.value_dim
            qkvz, ba = (part.unflatten(-1, (heads, -1)) for part in parts)
            split = (*qkvz.split([key_dim, key_dim, values, values], -1), *ba.split(group, -1))
            parts = [part.flatten(-2) for part in split]
        return torch.cat(parts, -1)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **keywords: Any) -> Tensor:
        """Computes the layer behind transformers' interface, from the first token of each text.

        Args:
            hidden_states: float [B, T, H]; B is fixed.
            attention_mask: None; texts are not padded.
            keywords: no cache.

        Returns:
            [B, T, H].

        Raises:
            ValueError: a mask, a cache, or see `keywords.take_cache`.
        """
        if take_cache(type(self).__name__, keywords, STATE_CACHE_NAMES) is not None:
            raise ValueError(
                "any_length was used for a model with a cache: call the model with use_cache=False, or export it with "
                "`executorch-moe export`, which has its own cache"
            )
        if attention_mask is not None:
            raise ValueError("any_length was used with an attention mask: pass texts without padding")
        sizes, projected = self.sizes, self._projected(hidden_states)
        weight = self.conv1d.weight[:, 0]
        conv = projected.new_zeros(sizes.conv_size, sizes.channels)
        state = self.A_log.new_zeros(sizes.value_heads, sizes.key_dim, sizes.value_dim, dtype=torch.float32)
        position = torch.zeros(1, dtype=torch.int64, device=projected.device)
        # Not unbind(): a check of ExecuTorch 1.5 takes the number of parts from the first size of the first part.
        texts = [
            gated_delta_net(
                projected[text], weight, self.dt_bias, self.A_log, self.norm.weight, conv, state,
                position, sizes.key_heads, sizes.key_dim, self.norm.variance_epsilon,
            )[0]
            for text in range(projected.shape[0])
        ]  # fmt: skip
        return self.out_proj(torch.stack(texts))  # type: ignore[no-any-return]


@contextlib.contextmanager
def any_length(model: nn.Module) -> Iterator[nn.Module]:
    """Within it, `torch.export.export` can trace a transformers model with gated delta rule layers for any length.

    transformers computes these layers (Qwen3.5-MoE, Qwen3-Next) in a loop over chunks of 64 tokens, of which a program
    can have a fixed number only. Meanwhile each such layer is another module, with the layer's own weights and their
    names, which calls the operator `gated_delta_net`; at the end, the model has its layers again. Both partitioners
    lower that operator. Other models are traced as they are.

    Args:
        model: called with use_cache=False, texts [B, T] without padding, and B fixed.

    Yields:
        `model`.

    Raises:
        NotImplementedError: layers that the operator cannot compute (see `GatedDeltaNet`); the model is unchanged.
    """
    found = [
        (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], layer, AnyLength(layer))
        for name, layer in model.named_modules()
        if fits(layer) and not isinstance(layer, AnyLength)
    ]
    try:
        for owner, attribute, _, ours in found:
            setattr(owner, attribute, ours)
        yield model
    finally:
        for owner, attribute, layer, _ in found:
            setattr(owner, attribute, layer)


def fits(layer: nn.Module) -> bool:
    """True for a gated delta rule layer of transformers, by its parts."""
    parts = all(hasattr(layer, name) for name in _PARTS)
    return parts and any(all(hasattr(layer, name) for name in names) for names in (_SEPARATE, _INTERLEAVED))


def replace_delta_rule_(module: nn.Module) -> nn.Module:
    """Replaces each gated delta rule layer of a model or decoder layer by `GatedDeltaNet`, in place; returns `module`.

    It must be called before linear layers are quantized. Replaced layers are left alone.

    Raises:
        NotImplementedError: see `GatedDeltaNet`.
    """
    for name, child in list(module.named_modules()):
        if fits(child):
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, GatedDeltaNet(child))
    return module


def state_shapes(model: nn.Module) -> dict[int, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Layer -> shapes of its states, for the layers that `replace_delta_rule_` replaced.

    Raises:
        NotImplementedError: linear attention that is no gated delta rule.
    """
    config: Any = model.config
    found = {child.layer_idx: child.state_shapes for child in model.modules() if isinstance(child, GatedDeltaNet)}
    kinds = list(getattr(config, "layer_types", None) or ())[: config.num_hidden_layers]
    if kinds.count(LINEAR) != len(found):
        raise NotImplementedError(
            f"{type(model).__name__} has {kinds.count(LINEAR)} layers of type {LINEAR}, of which {len(found)} are "
            "gated delta rule, the only one that is supported: use a model like Qwen3-Next or Qwen3.5-MoE"
        )
    return found
