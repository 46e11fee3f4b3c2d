"""Weights that a model shares under several names: which of them a checkpoint stores decides, as in transformers.

config.json may say that output layer and embedding are one matrix. A checkpoint may store it under either name, or
under both: then they are one only if they are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import nn


def groups(model: nn.Module) -> list[list[str]]:
    """Names that config.json makes one weight, by weight; the name that the others refer to comes first."""
    pairs: dict[str, str] = dict(model.all_tied_weights_keys)  # type: ignore[arg-type]
    found: dict[str, list[str]] = {}
    for name, source in pairs.items():
        found.setdefault(source, [source]).append(name)
    return list(found.values())


def supplied(model: nn.Module, stored: Collection[str]) -> set[str]:
    """Names that a checkpoint need not store: another name of the same weight is stored."""
    return {name for group in groups(model) for name in group if not set(group).isdisjoint(stored)}


def shared(model: nn.Module, stored: Collection[str], equal: Callable[[str, str], bool]) -> dict[str, str]:
    """Name -> the stored name whose weight it shares, for all names that share one.

    Args:
        stored: names of weights that the checkpoint stores.
        equal: says whether two stored weights are the same.
    """
    found: dict[str, str] = {}
    for group in groups(model):
        first = next((name for name in group if name in stored), None)
        if first is not None:
            found |= {name: first for name in group if name != first and (name not in stored or equal(first, name))}
    return found


def share(model: nn.Module, names: dict[str, str]) -> None:
    """Makes one weight of each pair of names, in place. Weights that config.json alone makes one stay apart."""
    whole: Any = model
    for name, source in names.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, whole.get_parameter(source))
    apart = any(len({names.get(name, name) for name in group}) > 1 for group in groups(model))
    if apart:
        # Else the next `tie_weights`, of whoever calls it, makes one of them.
        whole.config.tie_word_embeddings = False


def untied_remedy(model: nn.Module, missing: Collection[str], stored: Collection[str]) -> str | None:
    """What to do about missing weights that the model's class could share with stored ones, None for others."""
    pairs = getattr(model, "_tied_weights_keys", None)
    pairs = dict(pairs) if isinstance(pairs, dict) else {}
    partners = pairs | {source: name for name, source in pairs.items()}
    if not missing or not all(partners.get(name) in stored for name in missing):
        return None
    pair = " and ".join(f"{name} is {partners[name]}" for name in missing)
    return (
        f"set tie_word_embeddings to true in config.json if {pair} in this model (its config.json says that they are "
        "two), else download the model again"
    )
