"""Reads a .ptd (ExecuTorch's flat tensor format) without copying: weights are views of the mapped file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from executorch.extension.flat_tensor.serialize.serialize import FlatTensorHeader, _deserialize_to_flat_tensor

from executorch_moe.backends.errors import said_in_one_line

from .digests import COPY_AGAIN
from .pte import map_file

PLACEHOLDER = b"executorch_moe: made when it is loaded"
"""The bytes of a placeholder: a weight that the .ptd names without its values (see `backends.cuda.placeholders`)."""

MakeWeights = Callable[[str, int], "torch.Tensor | None"]
"""(qualified name, size in bytes) -> uint8 [bytes], or None to read the weight from the .ptd.

Asked for every weight of an artifact with placeholders; a returned tensor is used even if the .ptd has the weight.
"""

_GIVE_THE_PTD = "give the .ptd of the same export as the .pte"
_PART = 1 << 23
_HEADER_END = 8 + FlatTensorHeader.EXPECTED_LENGTH


class PtdFile:
    """The named data of a .ptd.

    Args:
        path: the .ptd.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a .ptd, cut short, or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._view = memoryview(map_file(self.path, "weights"))
        if bytes(self._view[4:6]) != b"FT":
            raise ValueError(f"{self.path} is not an ExecuTorch .ptd (no 'FT' mark at byte 4): {_GIVE_THE_PTD}")
        if len(self._view) < _HEADER_END:
            raise ValueError(f"{self.path} is cut short: {len(self._view)} bytes, a .ptd has more: {COPY_AGAIN}")
        header = FlatTensorHeader.from_bytes(bytes(self._view[8:_HEADER_END]))
        if not header.is_valid():
            raise self._damaged("its header is not that of a .ptd")
        table_end = header.flatbuffer_offset + header.flatbuffer_size
        needed = max(table_end, header.segment_base_offset + header.segment_data_size)
        if len(self._view) != needed:
            wrong = "cut short" if len(self._view) < needed else "damaged"
            raise ValueError(f"{self.path} is {wrong}: {len(self._view)} bytes, its header says {needed}: {COPY_AGAIN}")
        # Damaged bytes make flatc and the JSON reader raise errors of any type.
        with said_in_one_line(f"{self.path} cannot be read as an ExecuTorch .ptd", COPY_AGAIN, ValueError):
            table = _deserialize_to_flat_tensor(bytes(self._view[:table_end]))
            self._spans = {}
            for entry in table.named_data:
                if not 0 <= entry.segment_index < len(table.segments):
                    raise self._damaged(f"{entry.key!r} is in no segment")
                segment = table.segments[entry.segment_index]
                self._spans[entry.key] = (header.segment_base_offset + segment.offset, segment.size)
            if any(not 0 <= start <= start + size <= len(self._view) for start, size in self._spans.values()):
                raise self._damaged("a weight ends past the file")
        self._bytes: torch.Tensor | None = None
        self._empty: dict[tuple[int, int], bool] = {}

    def _damaged(self, why: str) -> ValueError:
        return ValueError(f"{self.path} is damaged: {why}: {COPY_AGAIN}")

    def sizes(self) -> dict[str, int]:
        """Key -> bytes."""
        return {key: size for key, (_, size) in self._spans.items()}

    def data(self, key: str) -> memoryview:
        """Bytes under a key; KeyError if the file does not have it."""
        start, size = self._spans[key]
        return self._view[start : start + size]

    def is_placeholder(self, key: str) -> bool:
        """True for a weight without values, which the loader must make; see `backends.cuda.placeholders`."""
        return self._spans[key][1] == len(PLACEHOLDER) and bytes(self.data(key)) == PLACEHOLDER

    def is_empty(self, key: str) -> bool:
        """True if all bytes under a key are zero, as in a KV cache. Keys with the same content are read once."""
        span = self._spans[key]
        if span not in self._empty:
            self._empty[span] = not any(bool(part.any()) for part in self.tensor(key).split(_PART))
        return self._empty[span]

    def tensor(self, key: str) -> torch.Tensor:
        """Bytes under a key as a uint8 [bytes] view of the mapped file. Copy it before writing to it."""
        start, size = self._spans[key]
        if self._bytes is None:
            # A private mapping: torch does not warn about read-only memory, and writes do not reach the file.
            self._bytes = torch.from_file(str(self.path), shared=False, size=len(self._view), dtype=torch.uint8)
        return self._bytes[start : start + size]

    def digests(self) -> dict[str, tuple[int, bytes]]:
        """Key -> (size in bytes, SHA-256). Reads the whole file; data that several keys share is read once."""
        done: dict[tuple[int, int], bytes] = {}
        for span in self._spans.values():
            if span not in done:
                done[span] = hashlib.sha256(self._view[span[0] : span[0] + span[1]]).digest()
        return {key: (span[1], done[span]) for key, span in self._spans.items()}
