"""A small reader of 64-bit little-endian ELF images: sections, symbols, header flags."""

from __future__ import annotations

import struct
from dataclasses import dataclass

MACHINE_CUDA = 190
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_SHT_DYNSYM = 11
_SHT_NOBITS = 8
_SHT_VERSYM = 0x6FFFFFFF
_SHT_VERNEED = 0x6FFFFFFE


@dataclass(frozen=True)
class Section:
    """One section header."""

    name: str
    kind: int
    offset: int
    size: int
    link: int
    info: int


@dataclass(frozen=True)
class UndefinedSymbol:
    """A symbol that the loader must find in another library; `version` is empty if the linker recorded none."""

    name: str
    version: str
    weak: bool


class ElfImage:
    """An ELF image inside a larger buffer.

    Args:
        data: starts at the first byte of the image and may be longer than it.

    Raises:
        ValueError: not a 64-bit little-endian ELF, or damaged.
    """

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = memoryview(data)
        if (
            bytes(self._data[:4]) != b"\x7fELF"
            or len(self._data) < _HEADER.size
            or self._data[4] != 2
            or self._data[5] != 1
        ):
            raise ValueError("not a 64-bit little-endian ELF image")
        header = _HEADER.unpack_from(self._data)
        self.abi_version = header[0][8]
        self.machine, self.flags = header[2], header[7]
        section_offset, entry_size, count, names_index = header[6], header[11], header[12], header[13]
        program_headers_end = header[5] + header[9] * header[10]
        try:
            raw = [_SECTION.unpack_from(self._data, section_offset + i * entry_size) for i in range(count)]
            names = self._data[raw[names_index][4] : raw[names_index][4] + raw[names_index][5]]
            self.sections = [Section(_text(names, s[0]), s[1], s[4], s[5], s[6], s[7]) for s in raw]
        except (struct.error, IndexError) as error:
            raise ValueError(f"damaged ELF image: {error}") from error
        ends = [
            program_headers_end,
            section_offset + count * entry_size,
            *(s.offset + s.size for s in self.sections if s.kind != _SHT_NOBITS),
        ]
        self.size = max(ends)
        if self.size > len(self._data):
            raise ValueError(f"ELF image is cut short: {len(self._data)} bytes, its sections need {self.size}")

    def undefined_symbols(self) -> list[UndefinedSymbol]:
        """Dynamic symbols without a definition, with the version that the linker bound them to."""
        versions = self._needed_versions()
        version_of = next((s for s in self.sections if s.kind == _SHT_VERSYM), None)
        found = []
        for section in self.sections:
            if section.kind != _SHT_DYNSYM:
                continue
            names = self.content(self.sections[section.link])
            for index in range(1, section.size // _SYMBOL.size):
                name, info, _, where, _, _ = _SYMBOL.unpack_from(self._data, section.offset + index * _SYMBOL.size)
                if where != 0:
                    continue
                version = ""
                if version_of is not None:
                    (number,) = struct.unpack_from("<H", self._data, version_of.offset + 2 * index)
                    version = versions.get(number & 0x7FFF, "")
                found.append(UndefinedSymbol(_text(names, name), version, weak=info >> 4 == 2))
        return found

    def _needed_versions(self) -> dict[int, str]:
        """Version index -> name, from the version-needs section."""
        table: dict[int, str] = {}
        for section in self.sections:
            if section.kind != _SHT_VERNEED:
                continue
            names = self.content(self.sections[section.link])
            at = section.offset
            for _ in range(section.info):
                _, count, _, aux, step = struct.unpack_from("<HHIII", self._data, at)
                entry = at + aux
                for _ in range(count):
                    _, _, number, name, next_entry = struct.unpack_from("<IHHII", self._data, entry)
                    table[number & 0x7FFF] = _text(names, name)
                    entry += next_entry
                at += step
        return table

    def content(self, section: Section) -> memoryview:
        """Bytes of a section."""
        return self._data[section.offset : section.offset + section.size]


def _text(table: memoryview, offset: int) -> str:
    raw = bytes(table[offset : offset + 4096])
    end = raw.find(b"\0")
    return raw[: end if end >= 0 else len(raw)].decode("utf-8", "replace")
