"""Quantizes what is not experts: the weights of linear layers and embeddings, through torchao's tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .dense import CPU_GROUP_SIZE as DENSE_GROUP_SIZE
from .dense import KINDS


def quantize_dense_(model: nn.Module, dense: str) -> nn.Module:
    """Replaces, in place, the weight of every `nn.Linear` and `nn.Embedding` by one of 8 or 4 bits.

    Weights only, symmetric, nearest code, one scale for 32 neighbors along the input. Layers that share a weight share
    the quantized one. Experts and routers of transformers' MoE models are neither linears nor embeddings and stay.

    Args:
        model: on any device, weights of any float dtype.
        dense: "int8": torchao's `IntxUnpackedToInt8Tensor`, one byte a code (on CUDA targets, "int8" is another format:
            see `dense.stored_formats`); "int4": ExecuTorch's
            `ExportableInt4Tensor`, two codes a byte; "none": nothing is done.

    Returns:
        The same model.

    Raises:
        ValueError: an unknown name, or a layer whose width is not a multiple of 32; the model is left as it was then.
    """
    if dense not in KINDS:
        raise ValueError(f"dense={dense!r} is unknown: use one of {', '.join(KINDS)}")
    if dense == "none":
        return model
    check_widths(model, dense)
    quantized: dict[Tensor, nn.Parameter] = {}
    for _, layer in _layers(model):
        if layer.weight not in quantized:
            quantized[layer.weight] = nn.Parameter(_quantize(layer.weight.detach(), dense), requires_grad=False)
        layer.weight = quantized[layer.weight]
    return model


def check_widths(model: nn.Module, dense: str) -> None:
    """Check the layers that `quantize_dense_` replaces; shapes are enough, so the weights may be on the meta device.

    Raises:
        ValueError: a layer whose width is not a multiple of 32.
    """
    for name, layer in _layers(model) if dense != "none" else ():
        if layer.weight.shape[1] % DENSE_GROUP_SIZE:
            raise ValueError(
                f"{name} has a weight {list(layer.weight.shape)}, and dense={dense!r} needs a multiple of "
                f"{DENSE_GROUP_SIZE} columns: use dense='none'"
            )


def _layers(model: nn.Module) -> list[tuple[str, nn.Linear | nn.Embedding]]:
    """What is quantized, by name."""
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Embedding))]


def stored_bytes(weight: Tensor) -> int:
    """Bytes that a parameter takes; a quantized one says what its float values would take."""
    tensor: Any = weight
    parts = getattr(tensor, "tensor_data_names", None)
    return sum(getattr(tensor, part).nbytes for part in parts) if parts else weight.nbytes


def _quantize(weight: Tensor, dense: str) -> Tensor:
    from executorch.extension.llm.export import ExportableInt4Tensor
    from torchao.quantization import IntxUnpackedToInt8Tensor

    # In fp32: torchao chooses scales and codes in the dtype that it is given.
    bits = {"int8": torch.int8, "int4": torch.int4}[dense]
    tensor: Any = IntxUnpackedToInt8Tensor.from_hp(weight.float(), (1, DENSE_GROUP_SIZE), bits)
    if dense == "int4":
        tensor = ExportableInt4Tensor.from_intx_unpacked_to_int8_tensor(tensor)
    result: Any = tensor.to(dtype=weight.dtype)
    for part in ("scale", "zero_point"):
        # Transposed with one row, they count as contiguous but have strides that ExecuTorch takes for another order.
        setattr(result, part, getattr(result, part).clone(memory_format=torch.contiguous_format))
    return result  # type: ignore[no-any-return]
