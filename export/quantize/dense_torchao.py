"""Weight-only INT8 and INT4 for linear layers and embeddings, in torchao's tensors, for the CPU target."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from executorch_moe.export.models.linears import StoredInt4, stored_int4

from .dense import CPU_GROUP_SIZE as DENSE_GROUP_SIZE
from .dense import KINDS


def quantize_dense_(model: nn.Module, dense: str) -> nn.Module:
    """Quantizes, in place, the weight of each `nn.Linear` and `nn.Embedding` to 8 or 4 bits.

    Quantization is symmetric, to the nearest code, with one scale per 32 inputs. Layers that share a
    weight share the quantized one. Experts and routers of transformers' MoE models are other modules and are left
    alone.

    Args:
        model: a model on any device, with weights of any float dtype.
        dense: "int8": torchao's `IntxUnpackedToInt8Tensor`, one code per byte (CUDA targets have another int8 format:
            see `dense.stored_formats`). "int4": ExecuTorch's `ExportableInt4Tensor`, two codes per byte; a layer that
            was stored as 4-bit codes with groups of a multiple of 32 keeps them, see `StoredInt4`. "none": no change.

    Returns:
        The same model.

    Raises:
        ValueError: an unknown kind, or a layer whose width is not a multiple of 32. The model is unchanged.
    """
    if dense not in KINDS:
        raise ValueError(f"dense={dense!r} is unknown: use one of {', '.join(KINDS)}")
    if dense == "none":
        return model
    check_widths(model, dense)
    quantized: dict[Tensor, nn.Parameter] = {}
    for _, layer in _layers(model):
        if layer.weight not in quantized:
            tensor = _quantize(layer.weight.detach(), dense, stored_int4(layer))
            quantized[layer.weight] = nn.Parameter(tensor, requires_grad=False)
        layer.weight = quantized[layer.weight]
    return model


def check_widths(model: nn.Module, dense: str) -> None:
    """Checks the layers that `quantize_dense_` would quantize. Weights may be on the meta device.

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
    """The layers to quantize, with their names."""
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Embedding))]


def stored_bytes(weight: Tensor) -> int:
    """Bytes of a parameter's storage; `nbytes` of a torchao tensor is that of its float values."""
    tensor: Any = weight
    parts = getattr(tensor, "tensor_data_names", None)
    return sum(getattr(tensor, part).nbytes for part in parts) if parts else weight.nbytes


def _quantize(weight: Tensor, dense: str, stored: StoredInt4 | None) -> Tensor:
    from executorch.extension.llm.export import ExportableInt4Tensor
    from torchao.quantization import IntxUnpackedToInt8Tensor

    # In fp32, because torchao computes scales and codes in the dtype of its input.
    bits = {"int8": torch.int8, "int4": torch.int4}[dense]
    if dense == "int4" and stored is not None and weight.shape[1] // stored.scale.shape[1] % DENSE_GROUP_SIZE == 0:
        tensor: Any = _with_codes(weight, stored)
    else:
        tensor = IntxUnpackedToInt8Tensor.from_hp(weight.float(), (1, DENSE_GROUP_SIZE), bits)
    if dense == "int4":
        tensor = ExportableInt4Tensor.from_intx_unpacked_to_int8_tensor(tensor)
    result: Any = tensor.to(dtype=weight.dtype)
    for part in ("scale", "zero_point"):
        # Transposed tensors of one row count as contiguous, but ExecuTorch takes their strides for another order.
        setattr(result, part, getattr(result, part).clone(memory_format=torch.contiguous_format))
    return result  # type: ignore[no-any-return]


def _with_codes(weight: Tensor, stored: StoredInt4) -> Tensor:
    """torchao's tensor with the codes that a weight was made of, in groups of 32."""
    from torchao.quantization import IntxUnpackedToInt8Tensor

    codes = stored.codes(weight).regrouped(DENSE_GROUP_SIZE)
    scale = codes.scale.float()
    # q * scale + zero = (q - zero_point) * scale. Stored zero points are integers; those of zero scales do not matter.
    zero_point = torch.zeros_like(scale)
    if codes.zero is not None:
        zero_point = (-codes.zero.float() / torch.where(scale == 0, 1.0, scale)).round()
    tensor: Any = IntxUnpackedToInt8Tensor(
        codes.q, scale, zero_point.to(torch.int8), torch.int4, (1, DENSE_GROUP_SIZE), torch.float32, None
    )
    return tensor  # type: ignore[no-any-return]
