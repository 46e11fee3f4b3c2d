"""Tied weights: a weight that a model uses under several names. As in transformers, the stored names decide.

config.json may tie the output layer to the embedding. A checkpoint may store the matrix under either name. If it stores
both, they are tied only if they are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import nn


def groups(model: nn.Module) -> list[list[str]]:
    """Groups of names that config.json ties; the name to which the others refer comes first."""
    pairs: dict[str, str] = dict(model.all_tied_weights_keys)  # type: ignore[arg-type]
    found: dict[str, list[str]] = {}
    for name, source in pairs.items():
        found.setdefault(source, [source]).append(name)
    return list(found.values())


def supplied(model: nn.Module, stored: Collection[str]) -> set[str]:
    """Tied names of which at least one is stored, so that the checkpoint may lack the others."""
    return {name for group in groups(model) for name in group if not set(group).isdisjoint(stored)}


def shared(model: nn.Module, stored: Collection[str], equal: Callable[[str, str], bool]) -> dict[str, str]:
    """Name -> stored name whose weight it shares.

    Args:
        model: a transformers model.
        stored: names of weights in the checkpoint.
        equal: true if two stored weights have the same values.
    """
    found: dict[str, str] = {}
    for group in groups(model):
        first = next((name for name in group if name in stored), None)
        if first is not None:
            found |= {name: first for name in group if name != first and (name not in stored or equal(first, name))}
    return found


def share(model: nn.Module, names: dict[str, str]) -> None:
    """Ties the weights of each pair of names, in place; unties those that differ in the checkpoint."""
    whole: Any = model
    for name, source in names.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, whole.get_parameter(source))
    apart = any(len({names.get(name, name) for name in group}) > 1 for group in groups(model))
    if apart:
        # Otherwise a later call of `tie_weights` would tie them.
        whole.config.tie_word_embeddings = False


def untied_remedy(model: nn.Module, missing: Collection[str], stored: Collection[str]) -> str | None:
    """Remedy for missing weights that the model's class can tie to stored ones; None for other weights."""
    pairs = getattr(model, "_tied_weights_keys", None)
    pairs = dict(pairs) if isinstance(pairs, dict) else {}
    partners = pairs | {source: name for name, source in pairs.items()}
    if not missing or not all(partners.get(name) in stored for name in missing):
        return None
    pair = " and ".join(f"{name} is {partners[name]}" for name in missing)
    return (
        f"set tie_word_embeddings to true in config.json if {pair} in this model (config.json does not tie them), "
        "else download the model again"
    )
