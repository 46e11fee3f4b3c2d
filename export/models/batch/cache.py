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

    No text uses the last position of a slot: rows that are empty write there. Gated delta rule layers have `conv_L`
    [B, K, channels] and `recurrent_L` [B, heads, key_dim, value_dim], to which empty rows do not write.

    Attributes:
        positions: C + 1.
    """

    def __init__(self, cache: StaticKVCache, slots: int, max_context: int) -> None:
        """B times a cache of one text.

        Args:
            slots: B. max_context: C, of both caches.
        """
        nn.Module.__init__(self)
        self.num_layers, self.dtype, self.positions = cache.num_layers, cache.dtype, max_context + 1
        for name, buffer in cache.named_buffers():
            if name.startswith(("key_", "value_")):
                _, heads, _, width = buffer.shape
                self.register_buffer(name, buffer.new_zeros(slots, heads, self.positions, width))
            else:
                self.register_buffer(name, buffer.new_zeros(slots, *buffer.shape))


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

    def states(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """States of the slot, copies; see `CacheView.states`."""
        conv, recurrent = (whole.index_select(0, self._slot())[0] for whole in super().states(layer_idx))
        return conv, recurrent

    def keep_states(self, layer_idx: int, conv: Tensor, recurrent: Tensor) -> None:
        """Writes the states of the slot."""
        for whole, new in zip(super().states(layer_idx), (conv, recurrent), strict=True):
            whole[self._slot()] = new[None].to(whole.dtype)

    def _slot(self) -> Tensor:
        return torch.zeros_like(self.cache_position[:1]) if self.slot is None else self.slot

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
    """One token of each of several texts, behind the interface of `CacheView`. Its states are those of all slots.

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
