"""Artifacts without their large weights: those of synthetic models are made again when the artifact is loaded.

Each large storage has a placeholder in the .ptd. Such an artifact is a few megabytes, and exporting it takes neither
the memory nor the disk of its weights. Only the delegate host runs it.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from executorch_moe.backends.artifact.ptd import PLACEHOLDER
from executorch_moe.backends.cuda.patches.registry import PLACEHOLDERS, replacing

LEAST_BYTES = 1 << 20
"""Storages below this size are written as they are: among them tables and constants that no seed makes."""


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """Within it, `to_edge_transform_and_lower` writes placeholders for large weights of CUDA delegates.

    Raises:
        RuntimeError: an executorch whose weights are not written by the function that is replaced here.
    """

    def write(tensor: Tensor, path: str) -> bytes:
        if tensor.untyped_storage().nbytes() < LEAST_BYTES:
            return bytes(stock(tensor, path))
        Path(path).write_bytes(PLACEHOLDER)
        return hashlib.sha256(PLACEHOLDER).digest()

    with replacing(PLACEHOLDERS) as replace:
        stock = replace("executorch.backends.cuda.cuda_weight_collector:_write_tensor_storage", write)
        yield
