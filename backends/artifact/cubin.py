"""Finds GPU code embedded in a delegate's library: cubins, alone or in fatbins, and PTX in fatbins."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

from .elf import MACHINE_CUDA, ElfImage

_FATBIN_MAGIC = struct.pack("<IH", 0xBA55ED50, 1)
_KIND_PTX, _KIND_ELF = 1, 2


@dataclass(frozen=True)
class GpuCode:
    """One embedded image.

    Attributes:
        kind: "cubin" or "ptx".
        sm: compute capability times ten, as in sm_90.
        exact: True for code that runs on this architecture only (sm_90a), not on later ones of its family.
        kernels: names of the kernels; empty for a compressed image.
        size: bytes of the image.
    """

    kind: str
    sm: int
    exact: bool
    kernels: tuple[str, ...]
    size: int

    @property
    def arch(self) -> str:
        """Name in the form of compilers: sm_90a, compute_90."""
        return f"{'sm' if self.kind == 'cubin' else 'compute'}_{self.sm}{'a' if self.exact else ''}"

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """True if a device of this compute capability can run the image."""
        device = capability[0] * 10 + capability[1]
        if self.exact:
            return device == self.sm
        if self.kind == "ptx":
            return device >= self.sm
        return device // 10 == self.sm // 10 and device >= self.sm


def find_gpu_code(library: bytes | memoryview) -> list[GpuCode]:
    """Cubins, then images that only fatbins list (PTX, compressed cubins), inside a shared library."""
    data = bytes(library)
    cubins = _cubins(data)
    found, seen = [code for _, code in cubins], {offset for offset, _ in cubins}
    exact = {code.sm for code in found if code.exact}
    for entry in _fatbin_entries(data):
        if entry.kind == _KIND_PTX:
            # PTX for sm_90a does not run on later GPUs either; the cubin beside it says so.
            found.append(GpuCode("ptx", entry.sm, entry.sm in exact, (), entry.size))
        elif (
            entry.kind == _KIND_ELF and entry.payload not in seen
        ):  # compressed: the entry has the architecture, not the kernels' names
            found.append(GpuCode("cubin", entry.sm, False, (), entry.size))
    return found


def _cubins(data: bytes) -> list[tuple[int, GpuCode]]:
    found = []
    at = data.find(b"\x7fELF")
    while at >= 0:
        step = 4
        try:
            image = ElfImage(memoryview(data)[at:])
        except ValueError:
            image = None
        if image is not None and image.machine == MACHINE_CUDA:
            kernels = tuple(s.name.removeprefix(".text.") for s in image.sections if s.name.startswith(".text."))
            sm, exact = _arch(image)
            found.append((at, GpuCode("cubin", sm, exact, kernels, image.size)))
            step = image.size
        at = data.find(b"\x7fELF", at + step)
    return found


def _arch(image: ElfImage) -> tuple[int, bool]:
    """(sm, architecture-specific).

    ABI version 7 has both in the header flags. Version 8 (ptxas of CUDA 13) moved sm to other bits and no longer
    distinguishes sm_90 from sm_90a there (compared with nvcc 13.0). The compiler's command line in a note does.
    """
    if image.abi_version < 8:
        return image.flags & 0xFF, bool(image.flags & 0x800)
    notes = b"".join(bytes(image.content(s)) for s in image.sections if s.name == ".note.nv.tkinfo")
    return (image.flags >> 8) & 0xFF, re.search(rb"-arch[ =]sm_\d+a\b", notes) is not None


@dataclass(frozen=True)
class _FatbinEntry:
    kind: int
    sm: int
    payload: int
    size: int


def _fatbin_entries(data: bytes) -> list[_FatbinEntry]:
    entries = []
    at = data.find(_FATBIN_MAGIC)
    while at >= 0:
        header_size, total = struct.unpack_from("<HQ", data, at + 6)
        position, end = at + header_size, at + header_size + total
        while header_size >= 16 and position + 64 <= min(end, len(data)):
            kind, _, entry_header, size = struct.unpack_from("<HHIQ", data, position)
            (sm,) = struct.unpack_from("<I", data, position + 28)
            if kind not in (_KIND_PTX, _KIND_ELF) or entry_header < 64 or position + entry_header + size > len(data):
                break
            entries.append(_FatbinEntry(kind, sm, position + entry_header, size))
            position += entry_header + size
        at = data.find(_FATBIN_MAGIC, at + 4)
    return entries
