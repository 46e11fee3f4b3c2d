"""A KV cache of several slots, each for one text.

Letters: B slots, C positions (max_context), T tokens or rows of a call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from executorch_moe.export.models.causal_lm import CacheView, StaticKVCache
from executorch_moe.export.models.keywords import check


class SlotKVCache(StaticKVCache):
    """Buffers `key_L` and `value_L`, [B, heads, C + 1, width] each: the names are those of `StaticKVCache`.

    No text uses the last position of a slot: rows that are empty write there.

    Attributes:
        positions: C + 1.
    """

    def __init__(self, cache: StaticKVCache, slots: int) -> None:
        """B times a cache of one text that has keys and values only."""
        nn.Module.__init__(self)
        self.num_layers, self.dtype = cache.num_layers, cache.dtype
        for name, buffer in cache.named_buffers():
            _, heads, context, width = buffer.shape
            self.register_buffer(name, buffer.new_zeros(slots, heads, context + 1, width))
            self.positions = context + 1


class SlotView(CacheView):
    """One text in a slot, behind the interface of `CacheView`."""

    def __init__(self, cache: StaticKVCache, cache_position: Tensor, slot: Tensor | None) -> None:
        """
        Args:
            cache_position: int64 [T], of the tokens. slot: int64 [1]; None: slot 0, which needs no copy.
        """
        super().__init__(cache, cache_position)
        self.slot = slot

    def layer(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the slot, [1, heads, C + 1, width] each; a copy unless it is slot 0."""
        keys, values = super().layer(layer_idx)
        if self.slot is None:
            return keys[:1], values[:1]
        return keys.index_select(0, self.slot), values.index_select(0, self.slot)

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, kwargs: Mapping[str, Any] | None = None, **keywords: Any
    ) -> tuple[Tensor, Tensor]:
        """key, value [1, heads, T, width] -> the slot, [1, heads, C + 1, width] each; see `CacheView.update`."""
        check(f"{type(self).__name__}.update", {**(kwargs or {}), **keywords})
        at = self.cache_position
        slots = torch.zeros_like(at) if self.slot is None else self.slot.expand(at.shape[0])
        for whole, new in zip(super().layer(layer_idx), (key, value), strict=True):
            whole[slots, :, at] = new[0].transpose(0, 1).to(whole.dtype)
        return self.layer(layer_idx)


class RowsView(CacheView):
    """One token of each of several texts, behind the interface of `CacheView`.

    Attributes:
        slots: int64 [T], the slot of each row.
    """

    def __init__(self, cache: SlotKVCache, positions: Tensor, slots: Tensor) -> None:
        """
        Args:
            positions: int64 [T]; below 0: an empty row.
        """
        super().__init__(cache, positions)
        self.slots = slots
        self.places = torch.where(positions < 0, cache.positions - 1, positions)

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, kwargs: Mapping[str, Any] | None = None, **keywords: Any
    ) -> tuple[Tensor, Tensor]:
        """key, value [T, heads, 1, width] -> the slots of the rows, [T, heads, C + 1, width] each, a copy."""
        check(f"{type(self).__name__}.update", {**(kwargs or {}), **keywords})
        keys, values = self.layer(layer_idx)
        for whole, new in ((keys, key), (values, value)):
            whole[self.slots, :, self.places] = new[:, :, 0].to(whole.dtype)
        return keys.index_select(0, self.slots), values.index_select(0, self.slots)
