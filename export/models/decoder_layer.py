"""A decoder layer of Qwen3 models of few kernels.

For one token of full attention, two operators compute everything before the experts, and no other kernel runs between
them unless attention has an output gate: `one_token_attention` and `one_token_router`. A gated delta rule layer has its
norm, its projection and `gated_delta_net` in place of the first. One token of each of several texts takes
`rows_attention`, `rows_linear` and `rows_router`. For several tokens the layer computes what
transformers' layer does, with `residual_norm` for the norms; `MergedAttention` and `TopKFirstRouter` have operators of
their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from executorch_moe.kernels.decode.op import fits_one_token, one_token_linear
from executorch_moe.kernels.prefill.op import fits_residual_norm

from .attention import MergedAttention, is_offset, norm_eps, norm_weight
from .causal_lm import CacheView
from .delta_rule import GatedDeltaNet
from .keywords import take_cache
from .linears import Int8Linear, is_one_token
from .router import SharedExpertBlock, TopKFirstRouter

FAMILIES = ("Qwen3MoeDecoderLayer", "Qwen3NextDecoderLayer", "Qwen3_5MoeDecoderLayer")
"""Layers of a norm, attention, a norm and an MLP, with a residual stream around each pair."""
ANY_HEAD_DIM = 128
"""A supported size of a head, for layers without full attention."""


class Norm(nn.Module):
    """An RMS norm whose weight, in fp32, is the factor itself; replaces one whose weight is an offset from 1."""

    def __init__(self, norm: Any) -> None:
        """Takes over the weight of a norm."""
        super().__init__()
        self.register_buffer("weight", norm_weight(norm))
        self.variance_epsilon = norm_eps(norm)

    def forward(self, x: Tensor) -> Tensor:
        """float [..., H] -> [..., H], computed in fp32."""
        y = x.to(torch.float32)
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.variance_epsilon) * self.weight).to(x.dtype)


class OneTokenDecoderLayer(nn.Module):
    """Replaces a decoder layer that has a `MergedAttention` or `GatedDeltaNet`, and a `TopKFirstRouter`; keeps names.

    A layer returns the residual stream and the experts' output as two tensors: the first kernel of the next layer adds
    them. The last of consecutive such layers adds them itself.

    Attributes:
        last: the layer returns the sum.
    """

    def __init__(self, layer: Any) -> None:
        """Takes over the submodules of a layer of `FAMILIES`."""
        super().__init__()
        if hasattr(layer, "linear_attn"):
            self.linear_attn = layer.linear_attn
        else:
            self.self_attn = layer.self_attn
        self.mlp = layer.mlp
        self.input_layernorm = _factors(layer.input_layernorm)
        self.post_attention_layernorm = _factors(layer.post_attention_layernorm)
        self.last = False

    def forward(
        self,
        hidden_states: Tensor | tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **keywords: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Computes the layer behind transformers' interface of a decoder layer.

        Args:
            hidden_states: float [1, T, H], or the two tensors that the layer before returned.
            attention_mask: as for `grouped_attention`.
            position_embeddings: cosines and sines, [1, T, D] each.

        Returns:
            [1, T, H], or, unless the layer is the `last`, two tensors whose sum that is.

        Raises:
            ValueError: an unknown argument, or a value that would change the result; see `keywords.take_cache`.
        """
        cache = take_cache(type(self).__name__, keywords)
        hidden, update = hidden_states if isinstance(hidden_states, tuple) else (hidden_states, None)
        assert position_embeddings is not None
        if isinstance(cache, CacheView) and cache.slots is not None and self.takes_rows:
            hidden, update = self._rows(hidden, update, position_embeddings, cache)
        elif self._takes_one_token_path(hidden, cache):
            hidden, update = self._one_token(hidden, update, position_embeddings, cache)
        else:
            hidden, normed = _residual_norm(hidden, update, self.input_layernorm)
            if self._is_linear:
                update = self.linear_attn(normed, attention_mask, cache=cache)
            else:
                update = self.self_attn(normed, position_embeddings, attention_mask, cache=cache)[0]
            hidden, normed = _residual_norm(hidden, update, self.post_attention_layernorm)
            update = self.mlp(normed)
        return hidden + update if self.last else (hidden, update)

    @property
    def takes_rows(self) -> bool:
        """True if the layer can compute one token of each of several texts."""
        if self._is_linear or isinstance(self.mlp, SharedExpertBlock):
            return False
        attention, router = self.self_attn, self.mlp.gate.weight
        return (
            not attention.sliding_window
            and not attention.gated
            and router.dtype == torch.bfloat16
            and fits_one_token(attention.head_dim, router.shape[1], len(router))
            and all(map(_weights, (attention.qkv_proj, attention.o_proj)))
        )

    @property
    def _is_linear(self) -> bool:
        return hasattr(self, "linear_attn")

    def _takes_one_token_path(self, hidden: Tensor, cache: Any) -> bool:
        if self._is_linear:
            head_dim, window, linears = ANY_HEAD_DIM, None, [self.linear_attn.out_proj]
        else:
            attention = self.self_attn
            head_dim, window = attention.head_dim, attention.sliding_window
            linears = [attention.qkv_proj, attention.o_proj]
        return (
            is_one_token(hidden)
            and hidden.dtype == torch.bfloat16
            and isinstance(cache, CacheView)
            and not window
            and fits_one_token(head_dim, hidden.shape[-1], len(self.mlp.gate.weight))
            and all(map(_weights, linears))
        )

    def _one_token(
        self, hidden: Tensor, update: Tensor | None, position_embeddings: tuple[Tensor, Tensor], cache: CacheView
    ) -> tuple[Tensor, Tensor]:
        """hidden and update, bf16 [1, 1, H], whose sum is the layer's input -> the same pair for the next layer."""
        norm, router = self.post_attention_layernorm, self.mlp.gate
        if self._is_linear:
            hidden, normed = _residual_norm(hidden, update, self.input_layernorm)
            out, projection = self.linear_attn.mix(normed, cache), self.linear_attn.out_proj
        else:
            hidden, out = self._attend(hidden, update, position_embeddings, cache)
            projection = self.self_attn.o_proj
        hidden, normed, weights, experts = torch.ops.executorch_moe.one_token_router(
            out, *(_weights(projection) or ()), hidden, norm.weight, router.weight, router.top_k,
            norm.variance_epsilon,
        )  # fmt: skip
        update = self.mlp.experts(normed, experts, weights)
        if isinstance(self.mlp, SharedExpertBlock):
            update = update + self.mlp.shared_expert(normed)
        return hidden, update[None]

    def _rows(
        self, hidden: Tensor, update: Tensor | None, position_embeddings: tuple[Tensor, Tensor], cache: CacheView
    ) -> tuple[Tensor, Tensor]:
        """hidden and update, bf16 [T, 1, H], whose sum is the input of T texts -> the same pair for the next layer."""
        attention, router = self.self_attn, self.mlp.gate
        update = None if update is None else update.transpose(0, 1)
        hidden, normed = _residual_norm(hidden.transpose(0, 1), update, self.input_layernorm)
        cos, sin = (part.transpose(0, 1) for part in attention.angles(position_embeddings))
        out, new = torch.ops.executorch_moe.rows_attention(
            normed, *(_weights(attention.qkv_proj) or ()), attention.q_norm, attention.k_norm, cos, sin,
            cache.cache_position, cache.slots, *cache.layer(attention.layer_idx), attention.scaling, attention.eps,
        )  # fmt: skip
        cache.update(new[0], new[1], attention.layer_idx)
        update = torch.ops.executorch_moe.rows_linear(out, *(_weights(attention.o_proj) or ()))
        hidden, normed = _residual_norm(hidden, update, self.post_attention_layernorm)
        weights, experts = torch.ops.executorch_moe.rows_router(
            normed, router.weight, cache.cache_position, router.top_k
        )
        update = self.mlp.experts(normed[0], experts, weights)
        return hidden.transpose(0, 1), update[:, None]

    def _attend(
        self, hidden: Tensor, update: Tensor | None, position_embeddings: tuple[Tensor, Tensor], cache: CacheView
    ) -> tuple[Tensor, Tensor]:
        """hidden and update -> their sum, and the input of the output projection, bf16 [1, 1, heads * D]."""
        attention = self.self_attn
        key, value = cache.layer(attention.layer_idx)
        weight, scale = _weights(attention.qkv_proj) or (None, None)
        rows = attention.qkv_rows
        qkv = (weight, scale) if not attention.gated else _rows(weight, scale, slice(0, rows))
        hidden, out, new = torch.ops.executorch_moe.one_token_attention(
            hidden, update, self.input_layernorm.weight, *qkv, attention.q_norm, attention.k_norm,
            *attention.angles(position_embeddings), cache.cache_position, key, value, attention.scaling, attention.eps,
        )  # fmt: skip
        cache.update(new[0], new[1], attention.layer_idx)
        if attention.gated:
            gate = one_token_linear(self.input_layernorm(hidden), *_rows(weight, scale, slice(rows, None)))
            out = out * torch.sigmoid(gate)
        return hidden, out


def _factors(norm: nn.Module) -> nn.Module:
    """The norm, with factors as its weight."""
    return Norm(norm) if is_offset(norm) else norm


def _residual_norm(hidden: Tensor, update: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
    """hidden + update, and its norm, [1, T, H] each."""
    if update is not None and fits_residual_norm(hidden) and not is_one_token(hidden):
        summed, normed = torch.ops.executorch_moe.residual_norm(hidden, update, norm.weight, norm.variance_epsilon)
        return summed, normed
    hidden = hidden if update is None else hidden + update
    return hidden, norm(hidden)


def _weights(linear: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight and scale (None for bf16) of a linear layer that the one-token operators take, None for other layers."""
    if isinstance(linear, Int8Linear) and linear.bias is None:
        return linear.qdata, linear.scale
    if type(linear) is nn.Linear and linear.bias is None:
        return linear.weight, None
    return None


def _rows(weight: Any, scale: Tensor | None, rows: slice) -> tuple[Tensor, Tensor | None]:
    return weight[rows], None if scale is None else scale[rows]


def replace_decoder_layers_(module: nn.Module) -> nn.Module:
    """Replaces each decoder layer whose attention and router were replaced before, in place; sets `last`.

    Returns `module`; other layers are left alone.
    """
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            for index, layer in enumerate(child):
                if _fits(layer):
                    child[index] = OneTokenDecoderLayer(layer)
            for layer, following in zip(child, [*child[1:], None], strict=True):
                if isinstance(layer, OneTokenDecoderLayer):
                    layer.last = not isinstance(following, OneTokenDecoderLayer)
        else:
            replace_decoder_layers_(child)
    return module


def _fits(layer: nn.Module) -> bool:
    attention = getattr(layer, "self_attn", None) or getattr(layer, "linear_attn", None)
    return (
        type(layer).__name__ in FAMILIES
        and isinstance(attention, (MergedAttention, GatedDeltaNet))
        and isinstance(getattr(getattr(layer, "mlp", None), "gate", None), TopKFirstRouter)
    )
