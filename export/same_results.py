"""Finds modules that ours can replace by what they compute, not by their class: both run on random weights.

A copy of a module gets random fp32 weights of the same shapes, so that weights on the meta device are enough. Our
module replaces it if it takes over these weights and gives the same results.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = 1e-4
"""Relative difference of fp32 results. A missing norm, bias, factor or another rotation differs by 0.01 or more."""
TOKENS = 6
_KNOWN: dict[tuple[object, ...], bool] = {}
_WITHOUT_EFFECT = ("layer_idx", "training", "layer_type")
"""Attributes that may differ between layers that compute the same."""

Run = Callable[[Any], Iterable[Tensor]]


def gives_same_results(
    module: nn.Module, replace: Callable[[Any], Any], run: Run, stubs: Mapping[str, nn.Module] | None = None
) -> bool:
    """True if `run` gives the same results for a copy of a module and for its replacement.

    Modules of one kind are compared once.

    Args:
        module: it is not changed; its weights are not read.
        replace: makes the replacement of a module.
        run: calls a module or its replacement on inputs that are always the same.
        stubs: name of a submodule -> module in its place in the copy.
    """
    stubs = dict(stubs or {})
    key = (*_kind(module, stubs), getattr(replace, "__qualname__", replace))
    if key not in _KNOWN:
        _KNOWN[key] = _compare(module, replace, run, stubs)
    return _KNOWN[key]


@torch.no_grad()
def _compare(module: nn.Module, replace: Callable[[Any], Any], run: Run, stubs: dict[str, nn.Module]) -> bool:
    original = _random_copy(module, stubs)
    try:
        expected = list(run(original))
        actual = list(run(replace(original)))
    except Exception:  # a module that is called otherwise, or that the replacement does not know
        return False
    return len(expected) == len(actual) and all(map(_close, actual, expected))


def _close(actual: Tensor, expected: Tensor) -> bool:
    if actual.shape != expected.shape:
        return False
    return bool((actual.double() - expected.double()).norm() <= TOLERANCE * expected.double().norm())


def example(*shape: int) -> Tensor:
    """Inputs for `run`: normally distributed, fp32, always the same."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _random_copy(module: nn.Module, stubs: dict[str, nn.Module]) -> nn.Module:
    """A copy with random weights in fp32 on the CPU, whose configuration is shared."""
    generator = torch.Generator().manual_seed(0)
    memo: dict[int, Any] = {id(module.get_submodule(name)): stub for name, stub in stubs.items()}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if any(name.startswith(f"{stub}.") for stub in stubs):
            continue
        value = torch.randn(tensor.shape, generator=generator)
        value = value * tensor.shape[-1] ** -0.5 if tensor.dim() > 1 else 1.0 + 0.2 * value
        memo[id(tensor)] = nn.Parameter(value, False) if isinstance(tensor, nn.Parameter) else value
    for part in module.modules():
        memo |= {id(value): value for value in vars(part).values() if hasattr(value, "to_json_string")}
        memo |= {id(value): None for name, value in vars(part).items() if name == "stored_int4"}
    return copy.deepcopy(module, memo).eval()


def _kind(module: nn.Module, stubs: dict[str, nn.Module]) -> tuple[object, ...]:
    """A key that is equal for modules that compute the same on equal weights."""
    parts: list[object] = []
    for name, part in module.named_modules():
        if any(name == stub or name.startswith(f"{stub}.") for stub in stubs):
            parts.append((name, "stub"))
            continue
        attributes = {k: v for k, v in vars(part).items() if not k.startswith("_") and k not in _WITHOUT_EFFECT}
        parts += _of_layer(part)
        parts += [name, type(part), *((key, _text(value)) for key, value in sorted(attributes.items()))]
        tensors = (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))
        parts += [(key, tuple(tensor.shape)) for key, tensor in tensors]
    return tuple(parts)


def _of_layer(part: Any) -> Iterator[tuple[str, str]]:
    """What the configuration of a module says of its layer: entries of lists that have one for each layer."""
    config, layer = getattr(part, "config", None), getattr(part, "layer_idx", None)
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layer, int) and isinstance(layers, int):
        for name, value in sorted(vars(config).items()):
            if isinstance(value, (list, tuple)) and len(value) == layers:
                yield name, repr(value[layer])


def _text(value: Any) -> str:
    """Text that is equal for equal values."""
    if hasattr(value, "to_json_string"):  # a configuration
        return f"{value.to_json_string(use_diff=False)} {value._attn_implementation}"
    if value is None or isinstance(value, (bool, int, float, str, list, tuple, dict, torch.dtype)):
        return repr(value)
    return type(value).__name__
