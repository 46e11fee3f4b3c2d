"""Digests of a .pte and its .ptd, in a trailer of the .pte, checked before native code reads either file.

The trailer follows the last byte that the program's header covers, where ExecuTorch's loaders do not read. It contains
the size and digest of everything before it, the size and digest of the whole .ptd, and a digest of itself, so it covers
every byte of both files. The program also contains the key `SEALED_KEY`, which distinguishes a file that lost its
trailer from one that never had one.

A digest is the SHA-256 of the SHA-256 values of all chunks of 16 MiB; several threads read and hash the chunks.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SEALED_KEY = "executorch_moe.sealed"
CHUNK = 16 << 20
_BLOCK = 1 << 20  # read and hashed at once; fits into the processor's cache
_THREADS = 16
_MAGIC = b"executorch_moe 1"
_LAYOUT = struct.Struct("<16sQ32sQ32s")
TRAILER_BYTES = _LAYOUT.size + hashlib.sha256().digest_size

COPY_AGAIN = "copy both files of the export again, or export again"


@dataclass(frozen=True)
class Trailer:
    """Sizes in bytes and digests of a program (without its trailer) and of its .ptd."""

    pte_bytes: int
    pte_digest: bytes
    ptd_bytes: int
    ptd_digest: bytes

    def pack(self) -> bytes:
        """The trailer as `TRAILER_BYTES` bytes."""
        fields = _LAYOUT.pack(_MAGIC, self.pte_bytes, self.pte_digest, self.ptd_bytes, self.ptd_digest)
        return fields + hashlib.sha256(fields).digest()


def trailer_of(pte: Path, ptd: Path) -> Trailer:
    """The trailer for two finished files; the program has none yet."""
    return Trailer(pte.stat().st_size, file_digest(pte), ptd.stat().st_size, file_digest(ptd))


def read_trailer(path: Path, content: mmap.mmap) -> Trailer | None:
    """The trailer of a program, or None if it was written without one.

    Raises:
        ValueError: the trailer is damaged, or the program is longer or shorter than the trailer says.
    """
    tail = content[-TRAILER_BYTES:]
    fields, digest = tail[: _LAYOUT.size], tail[_LAYOUT.size :]
    if tail.startswith(_MAGIC) and len(tail) == TRAILER_BYTES and hashlib.sha256(fields).digest() == digest:
        trailer = Trailer(*_LAYOUT.unpack(fields)[1:])
        found = len(content) - TRAILER_BYTES
        if found != trailer.pte_bytes:
            raise ValueError(
                f"{path} is damaged: it has {found} bytes before its digests, the export wrote {trailer.pte_bytes}: "
                f"{COPY_AGAIN}"
            )
        return trailer
    if content.find(SEALED_KEY.encode()) >= 0:
        raise ValueError(f"{path} is cut short or damaged: its digests are not at its end: {COPY_AGAIN}")
    return None


def file_digest(path: Path, size: int | None = None) -> bytes:
    """Digest (32 bytes) of the first `size` bytes of a file, by default of all.

    Raises:
        ValueError: the file is shorter.
        OSError: the file cannot be read.
    """
    size = path.stat().st_size if size is None else size
    starts = range(0, size, CHUNK)

    def chunk_digest(start: int) -> bytes:
        return _digest_of(path, start, min(CHUNK, size - start))

    pool = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1))
    try:
        return hashlib.sha256(b"".join(pool.map(chunk_digest, starts))).digest()
    finally:
        pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C, do not start the remaining chunks


def _digest_of(path: Path, start: int, size: int) -> bytes:
    digest, block = hashlib.sha256(), memoryview(bytearray(min(_BLOCK, size)))
    # Read, not mapped, so that a disk error is an OSError and not a signal.
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while size:
            read = file.readinto(block[: min(len(block), size)])
            if not read:
                raise ValueError(f"{path} became shorter while it was read: {COPY_AGAIN}")
            digest.update(block[:read])
            size -= read
    return digest.digest()
