"""Attention that leaves grouped key/value heads as they are: transformers' own repeats them in memory under a mask.

With 32 query and 4 key/value heads, that would write and read the whole cache eight times over for each token.
ExecuTorch's Triton kernels, which replace this operator on CUDA, take grouped heads directly.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

NAME = "executorch_moe_grouped"


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface.

    Args:
        query: [B, heads, T, head_dim]. key, value: [B, key_value_heads, C, head_dim].
        attention_mask: bool [B, 1, T, C], true = may be seen.

    Returns:
        [B, T, heads, head_dim], and None for the attention weights.
    """
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2).contiguous(), None


def register() -> str:
    """Makes it known to transformers; returns the name for `attn_implementation`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, grouped_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
