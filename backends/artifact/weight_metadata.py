"""The payload of a CudaBackend delegate in the .pte: the key of its shared library, and one entry for each weight.

Source: executorch/backends/cuda/cuda_weight_collector.py (1.5.1), format ETCUDAFQN3.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

MAGIC = b"ETCUDAFQN3"
CUDA_BACKEND = "CudaBackend"
# Compile spec that MoECudaPartitioner adds: names of the buffers that the delegate writes to, one in each line.
MUTATED_BUFFERS_KEY = "executorch_moe.mutated_buffers"
_DEVICES = {0: "cpu", 1: "cuda"}


@dataclass(frozen=True)
class CudaWeight:
    """One constant of a delegate: a strided view of a named storage in the .ptd (offset and strides in elements)."""

    fqn: str
    storage_key: str
    storage_nbytes: int
    dtype: int
    device: str
    storage_offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class CudaDelegate:
    """Shared library and weights of one delegate."""

    library_key: str
    weights: tuple[CudaWeight, ...]


def parse_delegate(payload: bytes, where: str) -> CudaDelegate:
    """Decode a delegate's payload.

    Args:
        payload: processed bytes of a CudaBackend delegate.
        where: a name for the delegate, for messages.

    Raises:
        NotImplementedError: the payload has another format version.
        ValueError: the payload is damaged.
    """
    if not payload.startswith(MAGIC):
        start = payload[: len(MAGIC)]
        found = repr(start) if start.isascii() and start.decode().isprintable() else "bytes that are not text"
        raise NotImplementedError(
            f"{where}: the delegate starts with {found}, this package reads {MAGIC!r} (ExecuTorch 1.5.x): "
            "export it again"
        )
    reader = _Reader(payload, len(MAGIC))
    try:
        library_key = reader.string()
        weights = tuple(_read_weight(reader) for _ in range(reader.unpack("<I")[0]))
    except (struct.error, UnicodeDecodeError, KeyError) as error:
        why = "a name is not UTF-8" if isinstance(error, UnicodeDecodeError) else repr(error)
        raise ValueError(f"{where}: the delegate's weight table is damaged ({why}): export it again") from error
    if reader.offset != len(payload):
        raise ValueError(
            f"{where}: {len(payload) - reader.offset} bytes after the delegate's weight table: export it again"
        )
    return CudaDelegate(library_key, weights)


class _Reader:
    def __init__(self, data: bytes, offset: int) -> None:
        self.data, self.offset = data, offset

    def unpack(self, layout: str) -> tuple[int, ...]:
        values = struct.unpack_from(layout, self.data, self.offset)
        self.offset += struct.calcsize(layout)
        return values

    def string(self) -> str:
        (length,) = self.unpack("<I")
        text = self.data[self.offset : self.offset + length]
        if len(text) != length:
            raise struct.error("string ends past the payload")
        self.offset += length
        return text.decode()


def _read_weight(reader: _Reader) -> CudaWeight:
    fqn, storage_key = reader.string(), reader.string()
    nbytes, dtype, device, offset, rank = reader.unpack("<QiiqI")
    sizes, strides = reader.unpack(f"<{rank}q"), reader.unpack(f"<{rank}q")
    return CudaWeight(fqn, storage_key, nbytes, dtype, _DEVICES[device], offset, sizes, strides)
