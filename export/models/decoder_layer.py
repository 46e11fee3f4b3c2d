"""A Qwen3-MoE decoder layer of few kernels.

For one token, two operators compute everything before the experts, and no other kernel runs between them:
`one_token_attention` and `one_token_router`. For several tokens the layer computes what transformers' layer does, with
`residual_norm` for the norms; `MergedAttention` and `TopKFirstRouter` have operators of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from executorch_moe.kernels.decode.op import fits_one_token
from executorch_moe.kernels.prefill.op import fits_residual_norm

from .attention import MergedAttention
from .causal_lm import CacheView
from .keywords import take_cache
from .linears import Int8Linear, is_one_token
from .router import TopKFirstRouter


class OneTokenDecoderLayer(nn.Module):
    """Replaces a Qwen3-MoE decoder layer that has a `MergedAttention` and a `TopKFirstRouter`; keeps the names.

    A layer returns the residual stream and the experts' output as two tensors: the first kernel of the next layer adds
    them. The last of consecutive such layers adds them itself.

    Attributes:
        last: the layer returns the sum.
    """

    def __init__(self, layer: Any) -> None:
        """Takes over the submodules of a `Qwen3MoeDecoderLayer`."""
        super().__init__()
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        self.input_layernorm, self.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm
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
        if self._takes_one_token_path(hidden, cache):
            hidden, update = self._one_token(hidden, update, position_embeddings, cache)
        else:
            hidden, normed = _residual_norm(hidden, update, self.input_layernorm)
            update = self.self_attn(normed, position_embeddings, attention_mask, cache=cache)[0]
            hidden, normed = _residual_norm(hidden, update, self.post_attention_layernorm)
            update = self.mlp(normed)
        return hidden + update if self.last else (hidden, update)

    def _takes_one_token_path(self, hidden: Tensor, cache: Any) -> bool:
        return (
            is_one_token(hidden)
            and hidden.dtype == torch.bfloat16
            and isinstance(cache, CacheView)
            and not self.self_attn.sliding_window
            and fits_one_token(self.self_attn.head_dim, hidden.shape[-1], len(self.mlp.gate.weight))
            and all(_weights(linear) for linear in (self.self_attn.qkv_proj, self.self_attn.o_proj))
        )

    def _one_token(
        self, hidden: Tensor, update: Tensor | None, position_embeddings: tuple[Tensor, Tensor], cache: CacheView
    ) -> tuple[Tensor, Tensor]:
        """hidden and update, bf16 [1, 1, H], whose sum is the layer's input -> the same pair for the next layer."""
        attention, norm, router = self.self_attn, self.post_attention_layernorm, self.mlp.gate
        key, value = cache.layer(attention.layer_idx)
        cos, sin = (part[..., : attention.head_dim // 2] for part in position_embeddings)  # the two halves are equal
        hidden, out, new = torch.ops.executorch_moe.one_token_attention(
            hidden, update, self.input_layernorm.weight, *(_weights(attention.qkv_proj) or ()), attention.q_norm,
            attention.k_norm, cos, sin, cache.cache_position, key, value, attention.scaling, attention.eps,
        )  # fmt: skip
        cache.update(new[0], new[1], attention.layer_idx)
        hidden, normed, weights, experts = torch.ops.executorch_moe.one_token_router(
            out, *(_weights(attention.o_proj) or ()), hidden, norm.weight, router.weight, router.top_k,
            norm.variance_epsilon,
        )  # fmt: skip
        return hidden, self.mlp.experts(normed, experts, weights)[None]


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
    return (
        type(layer).__name__ == "Qwen3MoeDecoderLayer"
        and isinstance(getattr(layer, "self_attn", None), MergedAttention)
        and isinstance(getattr(getattr(layer, "mlp", None), "gate", None), TopKFirstRouter)
    )
