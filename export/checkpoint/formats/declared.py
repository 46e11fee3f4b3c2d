"""Which format a checkpoint declares: `quantization_config` in config.json, or a file of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .awq import Awq
from .base import WeightFormat
from .compressed_tensors import METHOD as COMPRESSED_TENSORS
from .compressed_tensors import compressed_tensors
from .fp8 import Fp8Blocks, block_of
from .gptq import Gptq
from .parameters import Declared

CONFIG = "config.json"
SUPPORTED = "GPTQ, AWQ and compressed-tensors with 4 bits, fp8 in blocks"


def _fp8(declared: Declared) -> WeightFormat | None:
    block = block_of(declared)
    return None if block is None else Fp8Blocks(declared, block)


METHODS: dict[str, Callable[[Declared], WeightFormat | None]] = {
    "gptq": Gptq,
    "awq": Awq,
    COMPRESSED_TENSORS: compressed_tensors,
    "fp8": _fp8,
}
"""`quant_method` -> format, or None for parameters that are not supported."""


def read_format(folder: Path) -> WeightFormat | None:
    """The format that a model folder declares; None for plain floats.

    Raises:
        NotImplementedError: an unsupported format, or unsupported parameters of it.
        ValueError: parameters that are none, or a file that is not readable.
    """
    for declared, method in _declarations(folder):
        make = METHODS.get(method)
        found = None if make is None else make(declared)
        if found is None:
            raise NotImplementedError(
                f"the weights in {folder} are quantized ({method or 'no quant_method'}), which is not supported yet: "
                f"{declared.file} declares it; use the model in bf16, or in a supported format ({SUPPORTED})"
            )
        return found
    return None


def check_format(folder: Path) -> None:
    """Checks the format that a model folder declares.

    Raises:
        NotImplementedError, ValueError: see `read_format`.
    """
    read_format(folder)


def _declarations(folder: Path) -> Iterator[tuple[Declared, str]]:
    """Declarations with the name of their method, the one that counts first."""
    config = _read(folder / CONFIG, damaged_is_empty=True)
    for key in ("quantization_config", "compression_config"):
        if values := config.get(key):
            declared = Declared(values if isinstance(values, dict) else {}, folder, CONFIG)
            yield declared, str(declared.get("quant_method") or "").lower()
    # AutoGPTQ wrote its own file before transformers read `quantization_config`.
    if values := _read(folder / "quantize_config.json"):
        yield Declared(values, folder, "quantize_config.json"), str(values.get("quant_method") or "gptq").lower()


def _read(path: Path, *, damaged_is_empty: bool = False) -> dict[str, Any]:
    """A JSON object; empty if there is no such file.

    Raises:
        ValueError: something else in the file.
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
