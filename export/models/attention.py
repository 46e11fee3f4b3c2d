"""Attention with grouped key/value heads without copies; on CUDA one projection for query, key and value.

With an attention mask, transformers repeats key/value heads in memory: with 32 query and 4 key/value heads, it writes
and reads eight copies of the whole cache for each token. Several tokens take our `cached_attention`, on CUDA in bf16:
it reads the visible positions only there, and on neither target is there a mask or a matrix of scores for all tokens
and all positions at once. Everything else is torch's operator, for which ExecuTorch has Triton kernels on
CUDA and a decomposition on the CPU, both with grouped heads.

Letters: T tokens, D head_dim, C positions in the cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from executorch_moe.export.same_results import TOKENS, example, gives_same_results
from executorch_moe.kernels.prefill.arguments import HEAD_DIMS
from executorch_moe.kernels.prefill.op import fits_cached_attention, fits_cached_attention_on_cpu

from .keywords import check, take_cache
from .linears import is_one_token, joined_int4
from .pretrained import require_transformers

NAME = "executorch_moe_grouped"
"""The attention of models for CUDA targets, whose modules are replaced too."""
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
CPU_NAME = "executorch_moe_grouped_cpu"
"""The same attention in models for the CPU, which keep transformers' modules."""


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    fits: Callable[[Tensor, Tensor, Tensor], bool] = fits_cached_attention,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention behind transformers' attention interface.

    Args:
        query: [B, heads, T, head_dim]. key, value: [B, key_value_heads, C, head_dim].
        attention_mask: bool [B, 1, T, C], true where attention is allowed; or int64 [1, 1, T, 1 or 2], the last, or
            the first and the last visible position of each token. None: causal attention, unless `is_causal`, or else
            the module's attribute of that name, is false; `sdpa_mask` omits a purely causal mask.
        fits: whether `cached_attention` supports query, key and value on the target.
        keywords: see `keywords.HARMLESS`.

    Returns:
        [B, T, heads, head_dim], and None for the attention weights.

    Raises:
        NotImplementedError: attention sinks (`s_aux`).
        ValueError: an unknown argument, or a value that would change the result.
    """
    check("grouped_attention", keywords)
    if s_aux is not None:
        raise NotImplementedError("attention with sinks: use attn_implementation='eager'")
    if attention_mask is not None and attention_mask.dtype == torch.int64:
        tokens, factor = query.transpose(1, 2), query.shape[-1] ** -0.5 if scaling is None else scaling
        if not is_one_token(tokens[:, :, 0]) and not dropout and fits(tokens, key, value):
            visible = attention_mask[0, 0]
            return torch.ops.executorch_moe.cached_attention(tokens, key, value, visible, factor), None
        attention_mask = mask_of(attention_mask, key.shape[2])
    causal = attention_mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    out = nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        scale=scaling,
        # A single token attends to the whole cache.
        is_causal=causal and query.shape[2] > 1,
        enable_gqa=True,
    )
    out = out.transpose(1, 2)
    # A copy even if it has this layout now: models view it, and lowering puts operators of other layouts in its place.
    return out if is_one_token(query[:, 0]) else out.clone(memory_format=torch.contiguous_format), None


def mask_of(visible: Tensor, context: int) -> Tensor:
    """Mask bool [1, 1, T, C], true where attention is allowed, of visible positions int64 [1, 1, T, 1 or 2]."""
    positions = torch.arange(context, device=visible.device)
    mask = positions <= visible[..., -1:]
    return mask & (positions >= visible[..., :1]) if visible.shape[-1] == 2 else mask


class MergedAttention(nn.Module):
    """Replaces attention that `fits`: one projection for query, key, value, and the output gate if there is one.

    For several tokens, `rotated_heads` computes norm and rotation, if there are norms. Elsewhere both halves of a head
    are read from the projection, not from a normalized copy, so that Inductor fuses norm, rotation and the cache write
    into one kernel. The result is rounded once, after the rotation; transformers rounds after the norm too.

    If only a part of a head is rotated, its elements are put in another order, in queries and keys alike, in which the
    two elements of each rotated pair are D/2 apart, as if all were rotated; those that are not have the angle 0. Scores
    are the same, and the cache holds keys in this order.

    Attributes:
        q_norm, k_norm: factors of the norm of each head [2, D/2]; None for attention without norms.
        rotated: number of rotated elements of a head.
        gated: the projection has a gate for each element of the result, after query, key and value.
    """

    def __init__(self, attention: Any) -> None:
        """Takes over the weights of transformers' attention."""
        super().__init__()
        self.layer_idx, self.scaling, self.head_dim = attention.layer_idx, attention.scaling, attention.head_dim
        self.sliding_window, self.is_causal = window(attention), attention.is_causal
        linears = [attention.q_proj, attention.k_proj, attention.v_proj]
        self.heads = attention.o_proj.in_features // self.head_dim
        self.kv_heads = attention.k_proj.out_features // self.head_dim
        self.gated = attention.q_proj.out_features == 2 * attention.o_proj.in_features
        self.rotated = rotated_elements(attention)
        order = self._order()
        plain = not self.gated and self.rotated == self.head_dim
        self.qkv_proj = merged(linears, None if plain else self._rows(order))
        self.o_proj = attention.o_proj
        self.q_norm: Tensor | None = None
        self.k_norm: Tensor | None = None
        if getattr(attention, "q_norm", None) is not None:
            self.eps = norm_eps(attention.q_norm)
            for name in ("q_norm", "k_norm"):
                weight = norm_weight(getattr(attention, name))
                delattr(self, name)
                self.register_buffer(name, weight[order.to(weight.device)].unflatten(-1, (2, -1)))

    def _order(self) -> Tensor:
        """Elements of a head, in the order in which the two of each pair are D/2 apart."""
        ends = torch.arange(self.head_dim).split([self.rotated // 2, self.rotated // 2, self.head_dim - self.rotated])
        rest = ends[2].chunk(2)
        return torch.cat([ends[0], *rest[:1], ends[1], *rest[1:]])

    def _rows(self, order: Tensor) -> Tensor:
        """Rows of the projections of query, key and value: query and key in `order`, value, gate."""
        heads = torch.arange(self.heads * (1 + self.gated) * self.head_dim).view(self.heads, -1, self.head_dim)
        keys = torch.arange(self.kv_heads * self.head_dim).view(self.kv_heads, -1) + heads.numel()
        parts = [heads[:, 0, order], keys[:, order], keys + keys.numel(), *([heads[:, 1]] if self.gated else [])]
        return torch.cat([part.flatten() for part in parts])

    @property
    def qkv_rows(self) -> int:
        """Rows of the projection without the gate."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    def angles(self, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Cosines and sines for half a head, [1, T, D/2] each; those of transformers are [1, T, rotated]."""
        missing = (self.head_dim - self.rotated) // 2
        cos, sin = (part[..., : self.rotated // 2] for part in position_embeddings)
        if not missing:
            return cos, sin
        return nn.functional.pad(cos, (0, missing), value=1.0), nn.functional.pad(sin, (0, missing))

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        **keywords: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states [1, T, H] -> [1, T, H], and None, as transformers' attention modules return them.

        Raises:
            ValueError: an unknown argument, or a value that would change the result; see `keywords.take_cache`.
        """
        cache = take_cache(type(self).__name__, keywords)
        return self.o_proj(self.attend(hidden_states, position_embeddings, attention_mask, cache)), None

    def attend(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        cache: Any,
    ) -> Tensor:
        """The input of the output projection, [1, T, heads * D]; arguments as for `forward`."""
        shape = hidden_states.shape[:-1]
        projected = self.qkv_proj(hidden_states)
        qkv = projected[..., : self.qkv_rows] if self.gated else projected
        if self._takes_operators(hidden_states, attention_mask, cache):
            tokens, new = torch.ops.executorch_moe.rotated_heads(
                qkv, self.q_norm, self.k_norm, *self.angles(position_embeddings), self.kv_heads, self.eps
            )
            keys, values = cache.update(new[0], new[1], self.layer_idx)
            out, _weights = grouped_attention(
                self, tokens.transpose(1, 2), keys, values, attention_mask, scaling=self.scaling
            )
            return self._gated(out, projected)
        qkv = qkv.view(*shape, self.heads + 2 * self.kv_heads, 2, self.head_dim // 2)
        rotated = self.heads + self.kv_heads
        if self.rotated < self.head_dim:
            position_embeddings = tuple(torch.cat([part, part], -1) for part in self.angles(position_embeddings))
        # [1, T, D] -> [1, T, 1, 2, D/2]. The rotation of (a, b) is (a cos - b sin, b cos + a sin).
        cos, sin = (part.to(torch.float32).unflatten(-1, (1, 2, -1)) for part in position_embeddings)
        sin = sin * torch.tensor([[-1.0], [1.0]], device=sin.device)
        query = self._norm_and_rotate(qkv[:, :, : self.heads], self.q_norm, cos, sin)
        key = self._norm_and_rotate(qkv[:, :, self.heads : rotated], self.k_norm, cos, sin)
        value = qkv[:, :, rotated:].flatten(-2).transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        out, _weights = grouped_attention(self, query, key, value, attention_mask, scaling=self.scaling)
        return self._gated(out, projected)

    def _gated(self, out: Tensor, projected: Tensor) -> Tensor:
        """The heads' results [1, T, heads, D] as [1, T, heads * D], times their gate."""
        out = out.flatten(-2)
        return out * torch.sigmoid(projected[..., self.qkv_rows :]) if self.gated else out

    def _takes_operators(self, hidden_states: Tensor, mask: Tensor | None, cache: Any) -> bool:
        """True for several tokens of a model for CUDA, whose cache and mask come from `CausalLM`."""
        return (
            self.q_norm is not None
            and cache is not None
            and mask is not None
            and mask.dtype == torch.int64
            and hidden_states.dtype == torch.bfloat16
            and self.head_dim in HEAD_DIMS
            and not is_one_token(hidden_states)
        )

    def _norm_and_rotate(self, x: Tensor, norm: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        """x [1, T, heads, 2, D/2] -> [1, heads, T, D]; norm [2, D/2] or None, cos and sin fp32 [1, T, 1, 2, D/2]."""
        dtype, x = x.dtype, x.to(torch.float32)
        if norm is None:
            return (x * cos + x.flip(-2) * sin).to(dtype).flatten(-2).transpose(1, 2)
        norm = norm.to(torch.float32)
        scale = torch.rsqrt(x.pow(2).mean((-2, -1), keepdim=True) + self.eps)
        x = x * scale * norm * cos + x.flip(-2) * scale * norm.flip(-2) * sin
        return x.to(dtype).flatten(-2).transpose(1, 2)


def rotated_elements(attention: Any) -> int:
    """Number of rotated elements of a head, by the configuration of the attention's layer."""
    parameters = getattr(attention.config, "rope_parameters", None) or {}
    if kinds := getattr(attention.config, "layer_types", None):  # some have parameters for each kind of layer
        parameters = parameters.get(kinds[attention.layer_idx]) or parameters
    return int(attention.head_dim * parameters.get("partial_rotary_factor", 1.0))


def window(attention: Any) -> int | None:
    """The sliding window of an attention's layer, as `CausalLM` masks it; None for full attention."""
    kinds = getattr(attention.config, "layer_types", None)
    full = kinds and kinds[attention.layer_idx] != "sliding_attention"
    own = getattr(attention, "sliding_window", None)
    return own if full else getattr(attention.config, "sliding_window", None) or own


def fits(attention: Any) -> bool:
    """True for attention that `MergedAttention` can replace, by its parts and results.

    Its projections are plain linear layers, with biases or without. Query and key may have a norm for each head, before
    a rotation of the halves of a head or of its first part, and the query projection may have an output gate.
    """
    if not all(type(getattr(attention, name, None)) is nn.Linear for name in LINEARS):
        return False
    if not hasattr(attention, "head_dim") or not hasattr(attention, "config"):
        return False
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    if isinstance(norms[0], nn.Module) != isinstance(norms[1], nn.Module):
        return False

    def run(module: Any) -> tuple[Tensor]:
        angles = example(1, TOKENS, rotated_elements(attention) // 2).repeat(1, 1, 2)
        hidden = example(1, TOKENS, attention.q_proj.in_features)
        embeddings = angles.cos(), angles.sin()
        return (module(hidden_states=hidden, position_embeddings=embeddings, attention_mask=None)[0],)

    return gives_same_results(attention, MergedAttention, run)


def merged(linears: list[nn.Linear], rows: Tensor | None = None) -> nn.Linear:
    """Concatenates linear layers into one.

    Args:
        linears: layers of the same input; all or none have a bias.
        rows: int64, the outputs in order, numbered through all layers; None: the layers' outputs in order.
    """

    def ordered(parts: list[Tensor]) -> Tensor:
        whole = torch.cat([part.detach() for part in parts])
        return whole if rows is None else whole[rows.to(whole.device)]

    weight = ordered([linear.weight for linear in linears])
    whole = nn.Linear(weight.shape[1], weight.shape[0], bias=linears[0].bias is not None, device="meta")
    whole.weight = nn.Parameter(weight, requires_grad=False)
    if linears[0].bias is not None:
        whole.bias = nn.Parameter(ordered([linear.bias for linear in linears]), requires_grad=False)
    stored = joined_int4(linears)
    whole.stored_int4 = stored if stored is None else stored.map(lambda part: ordered([part]))
    return whole


def is_offset(norm: Any) -> bool:
    """True if the weight of an RMS norm is an offset from 1: those of a new norm are 0."""
    return bool((type(norm)(1).weight == 0).all())


def norm_weight(norm: Any) -> Tensor:
    """The factors of an RMS norm: its weight, or in fp32 1 plus its weight if that is an offset."""
    weight: Tensor = norm.weight.detach()
    return 1.0 + weight.float() if is_offset(norm) else weight


def norm_eps(norm: Any) -> float:
    """The epsilon of an RMS norm."""
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


def merge_attention_(module: nn.Module) -> nn.Module:
    """Replaces each attention that `fits` in a model or layer by `MergedAttention`, in place; returns `module`."""
    for name, child in list(module.named_modules()):
        if fits(child):
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, MergedAttention(child))
    return module


def register(name: str = NAME) -> str:
    """Registers `grouped_attention` in transformers; returns its name for `attn_implementation`.

    Args:
        name: `NAME` or `CPU_NAME`.

    Raises:
        RuntimeError: see `require_transformers`.
    """
    require_transformers()
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    on_cpu = functools.partial(grouped_attention, fits=fits_cached_attention_on_cpu)
    AttentionInterface.register(name, on_cpu if name == CPU_NAME else grouped_attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name
