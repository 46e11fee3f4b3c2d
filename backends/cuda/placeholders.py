"""Artifacts with placeholders instead of large weights. The loader makes the weights of such synthetic models again.

A placeholder is a weight without values in the .ptd. An artifact with placeholders has a few megabytes, and exporting
it needs neither the memory nor the disk space of the weights. Only the delegate host runs it.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from executorch_moe.backends.artifact.ptd import PLACEHOLDER
from executorch_moe.backends.cuda.patches.registry import STORAGES, replacing

LEAST_BYTES = 1 << 20
"""Smaller storages (bytes) are written with their values: tables and constants, which no seed can make again."""


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """Context in which `to_edge_transform_and_lower` writes placeholders for large weights of CUDA delegates.

    Raises:
        RuntimeError: the installed executorch writes weights with another function than the known one.
    """

    def write(tensor: Tensor, path: str) -> bytes:
        if tensor.untyped_storage().nbytes() < LEAST_BYTES:
            return bytes(stock(tensor, path))
        Path(path).write_bytes(PLACEHOLDER)
        return hashlib.sha256(PLACEHOLDER).digest()

    with replacing(STORAGES) as replace:
        stock = replace("executorch.backends.cuda.cuda_weight_collector:_write_tensor_storage", write)
        yield
