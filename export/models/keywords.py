"""Checks the keyword arguments that transformers passes to our replacements of its layers, attention and caches.

A replacement must not ignore an argument that it does not know: a renamed or new one may change the result. `check`
accepts an argument by name and value. The table covers transformers 5.17 to 5.24.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

CACHE_NAMES = ("cache", "past_key_values")
"""Names of the cache argument: `cache` since transformers 5.24, `past_key_values` before."""
STATE_CACHE_NAMES = ("cache", "cache_params")
"""The same for layers with a recurrent state."""

Accepts = Callable[[Any], bool]


def _anything(value: Any) -> bool:
    return True


def _no(value: Any) -> bool:
    return value is None or value is False


def _none(value: Any) -> bool:
    return value is None


def _causal(value: Any) -> bool:
    return value is None or value is True


HARMLESS: Mapping[str, Accepts] = {
    # transformers computes position_embeddings from these, and passes both.
    "position_ids": _anything,
    # A cache that is passed is used regardless, as in transformers' layers.
    "use_cache": _anything,
    # The mask includes the window; transformers omits the mask only if the text is shorter than the window.
    "sliding_window": _anything,
    # Our modules compute causal attention.
    "is_causal": _causal,
    # Extra outputs, which our modules do not compute.
    "output_attentions": _no,
    "output_hidden_states": _no,
    "output_router_logits": _no,
    # Packed sequences, training, and attention with extra terms.
    "cu_seq_lens_q": _none,
    "cu_seq_lens_k": _none,
    "max_length_q": _none,
    "max_length_k": _none,
    "seq_idx": _none,
    "num_items_in_batch": _none,
    "position_bias": _none,
    "softcap": _none,
}
"""Keyword -> predicate: true for values that do not change what our modules compute."""


def check(owner: str, keywords: Mapping[str, Any]) -> None:
    """Checks keyword arguments that the called function's signature does not name.

    Args:
        owner: the called function or class, for the message.
        keywords: the arguments.

    Raises:
        ValueError: an unknown argument, or a value that would change the result.
    """
    for name, value in keywords.items():
        if name not in HARMLESS:
            raise ValueError(
                f"{owner} was called with the unknown argument {name!r}, it accepts {', '.join(HARMLESS)}: "
                "install a transformers version that `executorch-moe doctor` accepts"
            )
        if not HARMLESS[name](value):
            raise ValueError(
                f"{owner} was called with {name}={_shown(value)}, which it does not support: omit the argument"
            )


def take_cache(owner: str, keywords: Mapping[str, Any], names: tuple[str, ...] = CACHE_NAMES) -> Any:
    """Returns the cache among keyword arguments, under either of its names, or None; checks the others.

    Raises:
        ValueError: two caches, or see `check`.
    """
    check(owner, {name: value for name, value in keywords.items() if name not in names})
    caches = [keywords[name] for name in names if keywords.get(name) is not None]
    if len(caches) > 1:
        raise ValueError(f"{owner} was called with both {' and '.join(names)}: give one of them")
    return caches[0] if caches else None


def cache_name(model: nn.Module) -> str:
    """Name of the cache argument of a transformers model's `forward`.

    Raises:
        ValueError: `forward` has neither argument.
    """
    parameters = inspect.signature(model.forward).parameters
    for name in CACHE_NAMES:
        if name in parameters:
            return name
    raise ValueError(f"{type(model).__name__}.forward takes no {' or '.join(CACHE_NAMES)}: use a model of transformers")


def _shown(value: Any) -> str:
    """Formats a value for a message; a tensor as its shape."""
    return f"tensor {list(value.shape)}" if hasattr(value, "shape") else repr(value)
