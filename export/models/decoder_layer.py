"""A decoder layer of Qwen3 models of few kernels.

For one token of full attention, two operators compute everything, and no other kernel runs between them:
`one_token_attention` and `one_token_experts`. A gated delta rule layer has `one_token_norm_linear` and
`gated_delta_net` in place of the first. A shared expert takes no kernels: those of the router and of the experts
compute its halves. Experts that are not fused take `one_token_router`. One token of each of several texts takes
`rows_attention`, `rows_linear` and `rows_router`. For several tokens of one text the layer computes what transformers'
layer does, with `residual_norm` for the norms; `MergedAttention` and `TopKFirstRouter` have operators of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from executorch_moe.export.same_results import TOKENS, example, gives_same_results
from executorch_moe.kernels import FusedExperts
from executorch_moe.kernels.decode.arguments import HEAD_DIMS
from executorch_moe.kernels.decode.op import fits_one_token, one_token_norm_linear
from executorch_moe.kernels.prefill.op import fits_residual_norm
from executorch_moe.kernels.routed.op import one_token_experts as _one_token_experts  # noqa: F401  registers it
from executorch_moe.kernels.validate import MAX_SHARED

from .attention import MergedAttention, is_offset, norm_eps, norm_weight
from .causal_lm import CacheView
from .delta_rule import GatedDeltaNet
from .keywords import take_cache
from .linears import Int8Linear, is_one_token
from .router import SharedExpertBlock, routes_alone

ANY_HEAD_DIM = 128
"""A supported size of a head, for layers without attention that an operator computes."""
Matrix = tuple[Tensor, Tensor | None]
"""Weight, int8 or bf16 [N, K], and scale, fp32 [N] or None."""


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
    """Replaces a decoder layer that has a `MergedAttention` or `GatedDeltaNet`, see `fits`; keeps names.

    A layer returns the residual stream and the experts' output as two tensors: the first kernel of the next layer adds
    them. The last of consecutive such layers adds them itself.

    Attributes:
        last: the layer returns the sum.
        routed: its MLP is a `TopKFirstRouter` and experts, with or without a `SharedExpert`.
    """

    def __init__(self, layer: Any) -> None:
        """Takes over the submodules of a layer."""
        super().__init__()
        if hasattr(layer, "linear_attn"):
            self.linear_attn = layer.linear_attn
        else:
            self.self_attn = layer.self_attn
        self.mlp = layer.mlp
        self.input_layernorm = _factors(layer.input_layernorm)
        self.post_attention_layernorm = _factors(layer.post_attention_layernorm)
        self.last = False
        self.routed = isinstance(self.mlp, SharedExpertBlock) or routes_alone(self.mlp)

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
            position_embeddings: cosines and sines, [1, T, D] each; not needed by gated delta rule layers.

        Returns:
            [1, T, H], or, unless the layer is the `last`, two tensors whose sum that is.

        Raises:
            ValueError: an unknown argument, or a value that would change the result; see `keywords.take_cache`.
        """
        cache = take_cache(type(self).__name__, keywords)
        hidden, update = hidden_states if isinstance(hidden_states, tuple) else (hidden_states, None)
        assert self._is_linear or position_embeddings is not None
        embeddings: Any = position_embeddings
        one_token = self._takes_one_token_path(hidden, cache)
        if isinstance(cache, CacheView) and cache.slots is not None and self.takes_rows:
            hidden, update = self._rows(hidden, update, embeddings, cache)
        elif one_token and self.routed:
            hidden, update = self._one_token(hidden, update, embeddings, cache)
        else:
            if one_token and self._fuses_attention:
                hidden, out = self._attend(hidden, update, embeddings, cache)
                update = self.self_attn.o_proj(out)
            else:
                hidden, normed = _residual_norm(hidden, update, self.input_layernorm)
                if self._is_linear:
                    update = self.linear_attn(normed, attention_mask, cache=cache)
                else:
                    update = self.self_attn(normed, embeddings, attention_mask, cache=cache)[0]
            hidden, normed = _residual_norm(hidden, update, self.post_attention_layernorm)
            update = self.mlp(normed)
        return hidden + update if self.last else (hidden, update)

    @property
    def takes_rows(self) -> bool:
        """True if the layer can compute one token of each of several texts."""
        if not self.routed or not self._fuses_attention or isinstance(self.mlp, SharedExpertBlock):
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

    @property
    def _fuses_attention(self) -> bool:
        """True for attention that `one_token_attention` computes: with norms and without biases."""
        if self._is_linear or self.self_attn.q_norm is None:
            return False
        return self.self_attn.head_dim in HEAD_DIMS and _weights(self.self_attn.qkv_proj) is not None

    def _takes_one_token_path(self, hidden: Tensor, cache: Any) -> bool:
        if not (is_one_token(hidden) and hidden.dtype == torch.bfloat16 and isinstance(cache, CacheView)):
            return False
        if self._is_linear:
            head_dim, window, linears = ANY_HEAD_DIM, None, [self.linear_attn.out_proj]
        else:
            attention = self.self_attn
            head_dim = attention.head_dim if self._fuses_attention else ANY_HEAD_DIM
            window, linears = attention.sliding_window, [attention.o_proj]
        router = self.mlp.gate.weight if self.routed else None
        return (
            not window
            and (router is None or router.dtype == torch.bfloat16)
            and fits_one_token(head_dim, hidden.shape[-1], 1 if router is None else len(router))
            and all(map(_weights, linears))
        )

    def _one_token(
        self, hidden: Tensor, update: Tensor | None, position_embeddings: tuple[Tensor, Tensor], cache: CacheView
    ) -> tuple[Tensor, Tensor]:
        """hidden and update, bf16 [1, 1, H], whose sum is the layer's input -> the same pair for the next layer."""
        norm, router, shared = self.post_attention_layernorm, self.mlp.gate, self._shared_matrices()
        if self._is_linear:
            hidden, out = self._mix(hidden, update, cache)
            projection = self.linear_attn.out_proj
        else:
            hidden, out = self._attend(hidden, update, position_embeddings, cache)
            projection = self.self_attn.o_proj
        route = (
            out, *(_weights(projection) or ()), hidden, norm.weight, router.weight, router.top_k,
            norm.variance_epsilon,
        )  # fmt: skip
        experts = self.mlp.experts
        if isinstance(experts, FusedExperts) and (shared is not None or not isinstance(self.mlp, SharedExpertBlock)):
            tensors, kind = experts.packed().tensors().values(), (experts.activation, experts.group_size)
            halves: tuple[Any, ...] = ()
            if shared is not None:
                gate_up, down = shared
                halves = *gate_up, down[0].shape[1], *down
            hidden, update = torch.ops.executorch_moe.one_token_experts(
                *route, *tensors, experts.scheme, *kind, *halves
            )
        else:
            hidden, normed, weights, ids = torch.ops.executorch_moe.one_token_router(*route)
            update = experts(normed, ids, weights)
            if isinstance(self.mlp, SharedExpertBlock):
                update = update + self.mlp.shared_expert(normed)
        return hidden, update[None]

    def _shared_matrices(self) -> tuple[Matrix, Matrix] | None:
        """Both matrices of a shared expert that the operators compute; None for others and without one."""
        if not isinstance(self.mlp, SharedExpertBlock) or not isinstance(self.mlp.experts, FusedExperts):
            return None
        expert = self.mlp.shared_expert
        gate_up, down = _weights(expert.gate_up), _weights(expert.down_proj)
        if expert.own_gate is not None or gate_up is None or down is None or expert.width > MAX_SHARED:
            return None
        return gate_up, down

    def _mix(self, hidden: Tensor, update: Tensor | None, cache: CacheView) -> tuple[Tensor, Tensor]:
        """hidden and update -> their sum, and the input of the output projection, bf16 [1, 1, Hv * Dv]."""
        norm, layer = self.input_layernorm, self.linear_attn
        matrix = _weights(layer.in_proj)
        if matrix is None:
            hidden, normed = _residual_norm(hidden, update, norm)
            projected = layer.in_proj(normed)
        else:
            hidden, projected = one_token_norm_linear(hidden, update, norm.weight, *matrix, norm.variance_epsilon)
        return hidden, layer.mix(projected, cache)

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
        if not self._fuses_attention:
            hidden, normed = _residual_norm(hidden, update, self.input_layernorm)
            visible = cache.cache_position[None, None, :, None]
            return hidden, attention.attend(normed, position_embeddings, visible, cache)
        key, value = cache.layer(attention.layer_idx)
        hidden, out, new = torch.ops.executorch_moe.one_token_attention(
            hidden, update, self.input_layernorm.weight, *(_weights(attention.qkv_proj) or ()), attention.q_norm,
            attention.k_norm, *attention.angles(position_embeddings), cache.cache_position, key, value,
            attention.scaling, attention.eps, attention.gated,
        )  # fmt: skip
        cache.update(new[0], new[1], attention.layer_idx)
        return hidden, out


def _factors(norm: Any) -> nn.Module:
    """The norm, with factors as its weight."""
    return norm if not is_offset(norm) and hasattr(norm, "variance_epsilon") else Norm(norm)  # type: ignore[no-any-return]


def _residual_norm(hidden: Tensor, update: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
    """hidden + update, and its norm, [1, T, H] each."""
    if update is not None and fits_residual_norm(hidden) and not is_one_token(hidden):
        summed, normed = torch.ops.executorch_moe.residual_norm(hidden, update, norm.weight, norm.variance_epsilon)
        return summed, normed
    hidden = hidden if update is None else hidden + update
    return hidden, norm(hidden)


def _weights(linear: nn.Module) -> Matrix | None:
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
                if fits(layer):
                    child[index] = OneTokenDecoderLayer(layer)
            for layer, following in zip(child, [*child[1:], None], strict=True):
                if isinstance(layer, OneTokenDecoderLayer):
                    layer.last = not isinstance(following, OneTokenDecoderLayer)
        else:
            replace_decoder_layers_(child)
    return module


def fits(layer: Any) -> bool:
    """True for a layer that `OneTokenDecoderLayer` can replace, by its parts and results.

    It adds to the residual stream what attention, which was replaced before, makes of its RMS norm, and then what the
    MLP makes of its RMS norm.
    """
    norms = [getattr(layer, name, None) for name in ("input_layernorm", "post_attention_layernorm")]
    parts = {name: getattr(layer, name) for name in ("self_attn", "linear_attn", "mlp") if hasattr(layer, name)}
    mixers = [part for name, part in parts.items() if name != "mlp"]
    if len(parts) != 2 or len(mixers) != 1 or not isinstance(mixers[0], (MergedAttention, GatedDeltaNet)):
        return False
    if any(getattr(getattr(norm, "weight", None), "dim", int)() != 1 for norm in norms):
        return False
    width = len(norms[0].weight)  # type: ignore[union-attr]

    def run(module: Any) -> tuple[Tensor]:
        x = example(1, TOKENS, width)
        out = (
            module(x)
            if len(list(module.children())) == 0
            else module(x, attention_mask=None, position_embeddings=(x, x))
        )
        return (out[0] if isinstance(out, tuple) else out,)

    stubs = {name: _Stub(as_tuple=name == "self_attn") for name in parts}
    return all(
        gives_same_results(norm, Norm, run) for norm in norms if isinstance(norm, nn.Module)
    ) and gives_same_results(layer, _alone, run, stubs)


class _Stub(nn.Module):
    """Attention or MLP without weights."""

    def __init__(self, as_tuple: bool) -> None:
        super().__init__()
        self.as_tuple = as_tuple

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = torch.tanh(1.5 * hidden_states + 0.1)
        return (out, None) if self.as_tuple else out


def _alone(layer: Any) -> OneTokenDecoderLayer:
    """The replacement of a layer that no other follows."""
    replacement = OneTokenDecoderLayer(layer)
    replacement.last = True
    return replacement
