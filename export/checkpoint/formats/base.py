"""What formats of quantized weights have in common.

A format joins the stored tensors of a weight (codes, scales, zero points) to one `StoredTensor` with the name and the
shape that the weight has in the model. Its `Encoding` computes values, or 4-bit codes, from them. The plan of a
checkpoint therefore maps weights to the model in the same way for every format.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from executorch_moe.kernels import Int4Codes
from executorch_moe.kernels.packing.mxfp4 import Mxfp4Codes


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, as the file's header describes it; or a quantized weight, which consists of several.

    Attributes:
        file: name of the file; of a quantized weight, that of its codes.
        shape: shape of the tensor, or of the weight.
        dtype: name of the dtype in safetensors, such as "BF16", or name of the format.
        name: name in the file; of a quantized weight, that of its codes.
        encoding: computes the values of a quantized weight from `parts`; None for other tensors.
        parts: role in the encoding ("codes", "scale") -> tensor.
    """

    file: str
    shape: tuple[int, ...]
    dtype: str
    name: str = ""
    encoding: Encoding | None = None
    parts: Mapping[str, StoredTensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes in the file. The first number in a dtype's name is its bits, as in "BF16" and "F8_E4M3"."""
        if self.parts:
            return sum(part.nbytes for part in self.parts.values())
        bits = re.search(r"\d+", self.dtype)
        return math.prod(self.shape) * (int(bits[0]) // 8 if bits else 1)


class Encoding(ABC):
    """Computes the values of a quantized weight from its parts."""

    group_size = 0
    """Weights along K that share a scale, if the weight is 4-bit codes that `codes` returns; else 0."""
    symmetric = True
    """True if codes have no zero points."""
    microscaled = False
    """True for MXFP4, whose codes `mxfp4` returns."""

    @abstractmethod
    def dequantize(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The weight's values: bf16 if that is exact or what the format itself computes, else fp32.

        Raises:
            ValueError: values that contradict the format.
        """

    def codes(self, parts: Mapping[str, Tensor]) -> Int4Codes:
        """The weight's codes, with scales and zero points in fp32, exact.

        Raises:
            ValueError: values that contradict the format, or groups of weights that are not consecutive.
        """
        raise NotImplementedError(f"{type(self).__name__} has no 4-bit codes")

    def mxfp4(self, parts: Mapping[str, Tensor]) -> Mxfp4Codes:
        """The weight's MXFP4 codes, [N, K], or [E, N, K] of stacked experts, which a model may have as [E, K, N]."""
        raise NotImplementedError(f"{type(self).__name__} has no MXFP4 codes")


class WeightFormat(ABC):
    """A format that a checkpoint declares, with its parameters.

    Attributes:
        title: the format and its parameters as messages show them, such as "GPTQ, 4 bits, groups of 128".
        file: name of the file that declares it.
        mixed: True if tensors of several types may be mixed, even in one layer.
    """

    title = ""
    file = ""
    mixed = False

    @abstractmethod
    def join(self, tensors: Mapping[str, StoredTensor], folder: Path) -> dict[str, StoredTensor]:
        """The same tensors, with those of each quantized weight joined.

        Args:
            tensors: name -> tensor, from the headers of all files.
            folder: of the model, for messages.

        Raises:
            ValueError: parts of a weight that are missing or do not belong together.
        """

    def __str__(self) -> str:
        return f"{self.title} (declared in {self.file})"


ACTIVATIONS = re.compile(
    r"\.(input_scale|input_global_scale|input_zero_point|output_scale|[kvq]_scale|[kv]_proj\.[kv]_scale)$"
)
"""Scales of activations and of the KV cache, which weights do not need."""

PARTS = re.compile(
    r"[._](qweight|qzeros|scales|g_idx|weight_packed|weight_scale|weight_scale_2|weight_scale_inv|weight_zero_point"
    r"|weight_shape|weight_g_idx|weight_global_scale|blocks|absmax|quant_map|SCB)$"
)
"""Names that only parts of quantized weights have."""


def weights_of(tensors: Mapping[str, StoredTensor], codes: str) -> Iterator[tuple[str, StoredTensor]]:
    """Prefix ("model.layers.0.q_proj.") and codes of each weight; the codes have the name PREFIX + `codes`."""
    for name, stored in tensors.items():
        if name.endswith(f".{codes}"):
            yield name.removesuffix(codes), stored


def take(
    tensors: dict[str, StoredTensor], prefix: str, roles: Mapping[str, str], optional: Mapping[str, str], where: str
) -> dict[str, StoredTensor]:
    """Removes the parts of one weight from `tensors`.

    Args:
        tensors: all tensors, changed in place.
        prefix: of their names.
        roles, optional: role -> name after the prefix, of parts that are required and that are not.
        where: folder and format, for messages.

    Returns:
        role -> part.

    Raises:
        ValueError: a missing part.
    """
    if lacking := [prefix + name for name in roles.values() if prefix + name not in tensors]:
        present = prefix + next(iter(roles.values()))
        raise ValueError(
            f"{where} has {present} but lacks {', '.join(lacking)}: download the missing files, or correct the "
            "declaration of the format"
        )
    found = {role: tensors.pop(prefix + name) for role, name in roles.items()}
    found |= {role: tensors.pop(prefix + name) for role, name in optional.items() if prefix + name in tensors}
    return found


def check_part(part: StoredTensor, shape: tuple[int, ...], dtypes: tuple[str, ...], where: str, title: str) -> None:
    """Checks shape and dtype of a part.

    Raises:
        ValueError: a shape or dtype that the format does not have.
    """
    if part.shape != shape or part.dtype not in dtypes:
        raise ValueError(
            f"{part.name} of {where} is {part.dtype} {list(part.shape)}, but {title} asks for {' or '.join(dtypes)} "
            f"{list(shape)}: a mix of formats is not supported; check that the declared format belongs to these "
            "weights, or use the model in bf16"
        )


def without_activations(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """A copy without scales of activations."""
    return {name: stored for name, stored in tensors.items() if not ACTIVATIONS.search(name)}
