"""Buffers that are empty when a program is loaded, such as the KV cache: exports write them without their zeros.

An export for 64 sequences can have 13 GB of them. ExecuTorch writes each to a file of its own before it joins those
with the same content, once for every method.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from executorch_moe.backends.cuda.patches.registry import STORAGES, replacing

LEAST_BYTES = 1 << 20
_PART = 1 << 23


@contextlib.contextmanager
def empty_buffers() -> Iterator[None]:
    """Context in which `to_edge_transform_and_lower` writes large storages of zeros as files that take no disk space.

    Raises:
        RuntimeError: the installed executorch writes weights with another function than the known one.
    """

    def write(tensor: Tensor, path: str) -> bytes:
        if not is_empty(tensor):
            return bytes(stock(tensor, path))
        size = tensor.untyped_storage().nbytes()
        with open(path, "wb") as file:
            file.truncate(size)
        return digest_of_zeros(size)

    with replacing(STORAGES) as replace:
        stock = replace("executorch.backends.cuda.cuda_weight_collector:_write_tensor_storage", write)
        yield


def is_empty(tensor: Tensor) -> bool:
    """True for a storage of at least `LEAST_BYTES` that has zeros only."""
    storage = tensor.untyped_storage()
    size = storage.nbytes()
    if size < LEAST_BYTES or tensor.device.type not in ("cpu", "cuda"):
        return False
    whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, 0, (size,), (1,))
    return not any(bool(whole[start : start + _PART].any()) for start in range(0, size, _PART))


@functools.lru_cache(maxsize=16)
def digest_of_zeros(size: int) -> bytes:
    """SHA-256 of so many bytes of zero."""
    digest, part = hashlib.sha256(), bytes(min(size, _PART))
    for start in range(0, size, _PART):
        digest.update(part[: size - start])
    return digest.digest()
