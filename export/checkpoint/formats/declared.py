"""Which format a checkpoint declares, in `quantization_config` of config.json or in a separate file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import fp4
from .awq import Awq
from .base import WeightFormat
from .compressed_tensors import METHOD as COMPRESSED_TENSORS
from .compressed_tensors import compressed_tensors
from .fp8 import Fp8, fp8
from .gptq import Gptq
from .parameters import Declared, choice

CONFIG = "config.json"
SUPPORTED = "GPTQ, AWQ and compressed-tensors with 4 bits, fp8, NVFP4, MXFP4"


def _modelopt(declared: Declared) -> WeightFormat:
    """The format of NVIDIA's modelopt."""
    algorithm = choice(declared, "quant_algo", ("fp8", "nvfp4"))
    if algorithm == "fp8":
        return Fp8(declared, None, "modelopt FP8")
    choice(declared, "group_size", (fp4.NV_GROUP,), default=fp4.NV_GROUP)
    return fp4.Fp4(declared, "modelopt NVFP4", fp4.NVFP4_MODELOPT)


METHODS: dict[str, Callable[[Declared], WeightFormat]] = {
    "gptq": Gptq,
    "awq": Awq,
    COMPRESSED_TENSORS: compressed_tensors,
    "fp8": fp8,
    "fbgemm_fp8": fp8,
    "mxfp4": fp4.GptOssMxfp4,
    "modelopt": _modelopt,
}
"""`quant_method` -> format."""


def read_format(folder: Path) -> WeightFormat | None:
    """The format that a model folder declares; None for plain floats.

    Raises:
        NotImplementedError: an unsupported format, or unsupported parameters of it.
        ValueError: invalid parameters, a file that is not readable, or files that contradict each other.
    """
    found: list[WeightFormat] = []
    for declared, method in _declarations(folder):
        make = METHODS.get(method)
        if make is None:
            raise NotImplementedError(
                f"the weights in {folder} are quantized ({method or 'no quant_method'}), which is not supported yet: "
                f"{declared.file} declares it; use the model in bf16, or in a supported format ({SUPPORTED})"
            )
        found.append(make(declared))
    for other in found[1:]:
        if (type(other), other.title) != (type(found[0]), found[0].title):
            raise ValueError(
                f"{found[0].file} of {folder} declares {found[0].title}, but {other.file} declares {other.title}: use "
                "the files of one download, or remove the file that does not belong to the weights"
            )
    return found[0] if found else None


def check_format(folder: Path) -> None:
    """Checks the format that a model folder declares.

    Raises:
        NotImplementedError, ValueError: see `read_format`.
    """
    read_format(folder)


def _declarations(folder: Path) -> Iterator[tuple[Declared, str]]:
    """Declarations with the name of their method, in order of precedence."""
    config = _read(folder / CONFIG, damaged_is_empty=True)
    for key in ("quantization_config", "compression_config"):
        if values := config.get(key):
            declared = Declared(values if isinstance(values, dict) else {}, folder, CONFIG)
            yield declared, str(declared.get("quant_method") or "").lower()
    # modelopt writes its own file, and `quantization_config` only in later versions.
    if values := _read(folder / "hf_quant_config.json"):
        inner = Declared(values, folder, "hf_quant_config.json").within(values.get("quantization"))
        if "quant_algo" not in inner or inner["quant_algo"] is not None:  # null: only the KV cache is quantized
            yield inner, "modelopt"
    # AutoGPTQ wrote its own file before transformers read `quantization_config`.
    if values := _read(folder / "quantize_config.json"):
        yield Declared(values, folder, "quantize_config.json"), str(values.get("quant_method") or "gptq").lower()


def _read(path: Path, *, damaged_is_empty: bool = False) -> dict[str, Any]:
    """A JSON object; empty if there is no such file.

    Raises:
        ValueError: the file is not readable or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise TypeError(f"a {type(values).__name__}")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        if damaged_is_empty:  # `check_supported` reports it
            return {}
        raise ValueError(
            f"{path} does not declare a format ({type(error).__name__}: {error}): download it again"
        ) from None
    return values
