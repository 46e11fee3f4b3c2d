"""What all operators of the package have in common: no gradients, and no part in autocast."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch.library import CustomOpDef

_LIBRARY = torch.library.Library("executorch_moe", "FRAGMENT")
_AUTOCAST = {
    device: getattr(torch._C.DispatchKey, f"Autocast{device}") for device in ("CPU", "CUDA")
}  # fmt: skip


def inference_only(operator: CustomOpDef) -> None:
    """Backward through the operator says that it cannot; `torch.autocast` changes nothing of what it computes.

    An operator computes in the number formats of its arguments. Autocast would round the fp32 products of a CPU kernel,
    and the fp32 scales and biases that are passed in.
    """
    name = operator._name.rpartition("::")[2]

    def backward(context: Any, *gradients: Any) -> NoReturn:
        raise NotImplementedError(
            f"executorch_moe::{name} is for inference only and has no gradient: run it under torch.no_grad(), or train "
            "the model before its experts are fused"
        )

    operator.register_autograd(backward)
    excluded = torch._C.DispatchKeySet(_AUTOCAST["CPU"]) | torch._C.DispatchKeySet(_AUTOCAST["CUDA"])
    overload = getattr(torch.ops.executorch_moe, name).default

    def without_autocast(*arguments: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return overload(*arguments)

    for device in _AUTOCAST:
        _LIBRARY.impl(name, without_autocast, f"Autocast{device}")
