"""How values of some tensors differ between a GGUF file and transformers: the order of rows and columns, and norms.

Source: `LlamaModel.permute`, `_reorder_v_heads` and the other changes of llama.cpp's conversion scripts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Order = tuple[int, ...]


@dataclass(frozen=True)
class Change:
    """What makes the model's tensor of a stored one.

    Attributes:
        rows, columns: stored row or column of each of the model's; None if the order is the same.
        plus: added to each value.
        log: True if the model has log(-value).
    """

    rows: Order | None = None
    columns: Order | None = None
    plus: float = 0.0
    log: bool = False

    def keeps_groups(self, size: int) -> bool:
        """True if only rows and whole groups of `size` columns are moved, so that codes are moved like values."""
        if self.plus or self.log:
            return False
        if self.columns is None:
            return True
        whole = torch.tensor(self.columns).reshape(-1, size) if len(self.columns) % size == 0 else None
        return whole is not None and bool((whole % size == torch.arange(size)).all() and (whole.diff() == 1).all())

    def of(self, values: Tensor) -> Tensor:
        """The model's tensor; fp32 if values change."""
        values = self.moved(values)
        if self.plus:
            values = values.float() + self.plus
        return (-values.float()).log() if self.log else values

    def moved(self, tensor: Tensor, size: int = 1) -> Tensor:
        """A tensor with the model's order; each of its columns stands for `size`."""
        if self.rows is not None:
            tensor = tensor[torch.tensor(self.rows)]
        if self.columns is not None:
            tensor = tensor[..., torch.tensor(self.columns)[::size] // size]
        return tensor


SAME = Change()


def pairs_to_halves(heads: int, rows: int) -> Order:
    """Rows of queries or keys that a file stores for rotation of neighboring pairs, and the model of two halves."""
    size = rows // heads
    return tuple(head * size + i for head in range(heads) for start in (0, 1) for i in range(start, size, 2))


def grouped_heads(config: Mapping[str, Any], size: int, before: int = 0) -> Order | None:
    """Value heads of linear attention, each of `size` rows: those of a key head are neighbors in the model.

    In files they are the length of all key heads apart.

    Args:
        config: the model's config.json.
        before: rows before those of the value heads.
    """
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    if keys == values:
        return None
    order = torch.arange(values * size).reshape(values // keys, keys, size).transpose(0, 1).flatten() + before
    return (*range(before), *order.tolist())


def interleaved_projections(config: Mapping[str, Any]) -> Order:
    """Rows of Qwen3-Next's queries, keys, values and gates: in this order in files, by key head in the model."""
    heads, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    size = values // heads * config["linear_value_head_dim"]
    parts, start = [], 0
    for length in (config["linear_key_head_dim"], config["linear_key_head_dim"], size, size):
        parts.append(torch.arange(start, start + heads * length).reshape(heads, length))
        start += heads * length
    return tuple(torch.cat(parts, 1).flatten().tolist())
