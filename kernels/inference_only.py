"""What all operators of the package have in common: how they are registered, no gradients, no autocast."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch.library import CustomOpDef, triton_op

_LIBRARY = torch.library.Library("executorch_moe", "FRAGMENT")
_AUTOCAST = {
    device: getattr(torch._C.DispatchKey, f"Autocast{device}") for device in ("CPU", "CUDA")
}  # fmt: skip


def inference_operator(name: str, arguments: Any = None) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Decorator that registers a function as the operator `executorch_moe::name`, for inference only.

    Backward through the operator raises NotImplementedError. `torch.autocast` does not change its results: the operator
    computes in the number formats of its arguments, and autocast would round the fp32 products of a CPU kernel and the
    fp32 scales and biases.

    Args:
        name: of the operator.
        arguments: NamedTuple whose fields are the parameters, for a function of `*args, **kwargs`. torch infers the
            operator's schema from them. None: the function declares its parameters itself.
    """

    def decorate(function: Callable[..., Any]) -> CustomOpDef:
        if arguments is not None:
            function.__signature__ = _signature(function, arguments)  # type: ignore[attr-defined]
        operator: CustomOpDef = triton_op(f"executorch_moe::{name}", function, mutates_args={})
        # For help() and editors, which would show the class otherwise.
        operator.__doc__ = function.__doc__
        operator.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
        operator.register_autograd(_no_gradient(name))
        _ignore_autocast(name)
        return operator

    return decorate


def _signature(function: Callable[..., Any], arguments: Any) -> inspect.Signature:
    kinds, defaults = typing.get_type_hints(arguments), arguments._field_defaults
    parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=defaults.get(name, inspect.Parameter.empty),
            annotation=kinds[name],
        )
        for name in arguments._fields
    ]
    return inspect.Signature(parameters, return_annotation=typing.get_type_hints(function)["return"])


def _no_gradient(name: str) -> Callable[..., NoReturn]:
    def backward(context: Any, *gradients: Any) -> NoReturn:
        raise NotImplementedError(
            f"executorch_moe::{name} is for inference only and has no gradient: run it under torch.no_grad(), or train "
            "the model before its experts are fused"
        )

    return backward


def _ignore_autocast(name: str) -> None:
    excluded = torch._C.DispatchKeySet(_AUTOCAST["CPU"]) | torch._C.DispatchKeySet(_AUTOCAST["CUDA"])
    overload = getattr(torch.ops.executorch_moe, name).default

    def without_autocast(*arguments: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return overload(*arguments)

    for device in _AUTOCAST:
        _LIBRARY.impl(name, without_autocast, f"Autocast{device}")
