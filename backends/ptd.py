"""Reads a .ptd (ExecuTorch's flat tensor format) without copying it: weights are views of the mapped file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from executorch.extension.flat_tensor.serialize.serialize import FlatTensorHeader, _deserialize_to_flat_tensor

from executorch_moe.backends.cuda.placeholders import PLACEHOLDER
from executorch_moe.backends.pte import map_file


class PtdFile:
    """Named data outside the program.

    Args:
        path: the .ptd.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a .ptd, cut short, or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._view = map_file(self.path, "weights")
        if len(self._view) < 48 or bytes(self._view[4:6]) != b"FT":
            raise ValueError(f"{self.path} is not an ExecuTorch .ptd (no 'FT' mark at byte 4): export it again")
        header = FlatTensorHeader.from_bytes(bytes(self._view[8:48]))
        needed = max(
            header.flatbuffer_offset + header.flatbuffer_size,
            header.segment_base_offset + header.segment_data_size,
        )
        if header.is_valid() and len(self._view) < needed:
            raise ValueError(
                f"{self.path} is cut short: {len(self._view)} bytes, its header says {needed}: copy or export it again"
            )
        try:
            if not header.is_valid():
                raise ValueError("bad header")
            table = _deserialize_to_flat_tensor(bytes(self._view[: header.flatbuffer_offset + header.flatbuffer_size]))
            self._spans = {}
            for entry in table.named_data:
                segment = table.segments[entry.segment_index]
                self._spans[entry.key] = (header.segment_base_offset + segment.offset, segment.size)
        except Exception as error:  # flatc and the JSON reader raise whatever the damaged bytes lead to
            raise ValueError(
                f"{self.path} cannot be read as an ExecuTorch .ptd ({error!r}): export it again"
            ) from error
        if any(start + size > len(self._view) for start, size in self._spans.values()):
            raise ValueError(
                f"{self.path} is cut short: a weight ends past its {len(self._view)} bytes: export it again"
            )
        self._bytes: torch.Tensor | None = None

    def sizes(self) -> dict[str, int]:
        """Key -> bytes."""
        return {key: size for key, (_, size) in self._spans.items()}

    def data(self, key: str) -> memoryview:
        """Bytes under a key (KeyError if there is none)."""
        start, size = self._spans[key]
        return self._view[start : start + size]

    def is_placeholder(self, key: str) -> bool:
        """True for a weight that is to be made when it is loaded; see `backends.cuda.placeholders`."""
        return self._spans[key][1] == len(PLACEHOLDER) and bytes(self.data(key)) == PLACEHOLDER

    def tensor(self, key: str) -> torch.Tensor:
        """Bytes under a key as uint8 [n] over the mapped file: copy it before writing to it."""
        start, size = self._spans[key]
        if self._bytes is None:
            # A private mapping: torch does not warn about read-only memory, and a write would not reach the file.
            self._bytes = torch.from_file(str(self.path), shared=False, size=len(self._view), dtype=torch.uint8)
        return self._bytes[start : start + size]

    def digests(self) -> dict[str, tuple[int, bytes]]:
        """Key -> (bytes, SHA-256), reading the whole file; data stored once is read once."""
        done: dict[tuple[int, int], bytes] = {}
        for span in self._spans.values():
            if span not in done:
                done[span] = hashlib.sha256(self._view[span[0] : span[0] + span[1]]).digest()
        return {key: (span[1], done[span]) for key, span in self._spans.items()}
