"""GGUF files: the table of tensors, and reading them. The package gguf parses the files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from executorch_moe.export.checkpoint.formats.base import StoredTensor, WeightFormat

from .architectures import ARCHITECTURES, configuration, expert_names, name_in_model, order_of_rows, stacked_name
from .blocks import FLOATS, TYPES, GgufEncoding, StackedEncoding

# RoPE frequency factors, which llama.cpp stores for some models; transformers computes them from the configuration.
_IGNORED = ("rope_freqs.weight",)
_EXPERT = re.compile(r"^(?P<name>.*)\[(?P<expert>\d+)\]$")


@dataclass(frozen=True)
class Entry:
    """A tensor in the table of a file.

    Attributes:
        file: name of the file.
        kind: name of ggml's type.
        shape: of the tensor, in torch's order.
        start, nbytes: its bytes in the file.
    """

    file: str
    kind: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def read_tables(folder: Path, files: list[str]) -> tuple[dict[str, Any], dict[str, Entry]]:
    """Metadata of the first file, key -> value, and the tensors of all files, name -> entry.

    Raises:
        ValueError: a file that is cut short or damaged.
        NotImplementedError: a tensor type that is not supported.
        RuntimeError: the package gguf is missing.
    """
    try:
        import gguf
    except ImportError:
        raise RuntimeError(
            f"{folder / files[0]} needs the package gguf, which is not installed: pip install 'executorch-moe[gguf]'"
        ) from None

    metadata: dict[str, Any] = {}
    tensors: dict[str, Entry] = {}
    for file in files:
        try:
            reader = gguf.GGUFReader(folder / file)
            metadata = metadata or {name: entry.contents() for name, entry in reader.fields.items()}
            for tensor in reader.tensors:
                shape = tuple(int(size) for size in reversed(tensor.shape.tolist()))
                entry = Entry(file, tensor.tensor_type.name, shape, int(tensor.data_offset), int(tensor.n_bytes))
                tensors[tensor.name] = entry
        except Exception as error:  # the reader raises whatever numpy raises
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(
                f"{folder / file} is cut short, damaged or not a GGUF file ({reason}): download it again"
            ) from None
    for name, entry in tensors.items():
        if entry.kind not in TYPES:
            raise NotImplementedError(
                f"{name} of {folder / entry.file} has the type {entry.kind}, which is not supported yet (only "
                f"{', '.join(TYPES)}): use another file of the model"
            )
    return metadata, tensors


class GgufFormat(WeightFormat):
    """The tensors of the GGUF files in a folder, with transformers' names.

    Args:
        folder: the folder; its config.json is that of the files.
        files: names of the files.

    Raises:
        ValueError, NotImplementedError: see `read_tables` and `configuration`.
    """

    mixed = True

    def __init__(self, folder: Path, files: list[str]) -> None:
        self.file = files[0]
        metadata, self._entries = read_tables(folder, files)
        self._config = read_configuration(folder / files[0], metadata, self._entries)
        self._architecture = ARCHITECTURES[metadata["general.architecture"]]
        kinds = sorted({entry.kind for entry in self._entries.values()} - set(FLOATS))
        self.title = f"GGUF with {', '.join(kinds) or 'floats'}"

    def __str__(self) -> str:
        return f"{self.title} ({self.file})"

    def join(self, tensors: Mapping[str, StoredTensor], folder: Path) -> dict[str, StoredTensor]:
        """All tensors of the files. Each expert is a tensor of its own.

        Raises:
            ValueError: tensors that the architecture does not have.
        """
        found: dict[str, StoredTensor] = dict(tensors)
        unknown = []
        stacked: dict[str, dict[str, StoredTensor]] = {}
        for name, entry in self._entries.items():
            if (place := stacked_name(name, self._architecture)) is not None:
                stacked.setdefault(place[0], {})[place[1]] = _stored(name, entry, entry.shape)
            elif (experts := expert_names(name, self._architecture, entry.shape[0])) is not None:
                for number, expert in enumerate(experts):
                    found[expert] = _stored(f"{name}[{number}]", entry, entry.shape[1:])
            elif (target := name_in_model(name, self._architecture)) is not None:
                rows = order_of_rows(name, self._architecture, self._config, entry.shape[0])
                # The gate of a shared expert is a vector in files, and a matrix with one row in transformers.
                shape = (1, *entry.shape) if name.endswith("ffn_gate_inp_shexp.weight") else entry.shape
                found[target] = _stored(name, entry, shape, rows)
            elif name not in _IGNORED:
                unknown.append(name)
        found |= {name: _stacked(name, parts, folder) for name, parts in stacked.items()}
        if unknown:
            raise ValueError(
                f"{folder / self.file} has {', '.join(unknown[:3])}, which {self._architecture.model_class} does not "
                "use: use the model's safetensors"
            )
        return found


def read_configuration(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Entry]) -> dict[str, Any]:
    """The config.json of a file.

    Raises:
        ValueError: missing metadata.
        NotImplementedError: see `configuration`.
    """
    try:
        return configuration(metadata, set(tensors), tensors["token_embd.weight"].shape[0])
    except KeyError as error:
        raise ValueError(f"{path} lacks {error.args[0]}: download it again, or use the model's safetensors") from None
    except NotImplementedError as error:
        raise NotImplementedError(f"{path}: {error}") from None


def _stored(name: str, entry: Entry, shape: tuple[int, ...], rows: tuple[int, ...] | None = None) -> StoredTensor:
    if entry.kind in FLOATS and rows is None:
        return StoredTensor(entry.file, shape, entry.kind, name)
    encoding = GgufEncoding(entry.kind, rows)
    length = entry.nbytes * shape[-1] // _count(entry.shape)
    kind = entry.kind if entry.kind in FLOATS else "U8"
    codes = StoredTensor(entry.file, (*shape[:-1], shape[-1] if kind != "U8" else length), kind, name)
    return StoredTensor(entry.file, shape, entry.kind, name, encoding, {"codes": codes})


def _stacked(name: str, parts: Mapping[str, StoredTensor], folder: Path) -> StoredTensor:
    """A stacked weight or bias made of several tensors, in the shape that it has in transformers.

    Raises:
        ValueError: a missing part.
    """
    roles = ("down",) if "down" in parts else ("gate", "up")
    first = next(iter(parts.values()))
    if set(roles) != set(parts) or len({part.shape for part in parts.values()}) > 1:
        raise ValueError(
            f"{folder / first.file} has {first.name}, but not {' and '.join(roles)} of one shape for {name}: download "
            "it again, or use the model's safetensors"
        )
    e, n, *k = first.shape
    shape = (e, *k, n * len(roles)) if k else (e, n * len(roles))
    encoding = StackedEncoding(tuple((role, parts[role].dtype) for role in roles))
    inner = {role: parts[role].parts.get("codes", parts[role]) for role in roles}
    return StoredTensor(first.file, shape, first.dtype, first.name, encoding, inner)


def _count(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


class OpenGguf:
    """A mapped file, with those methods of safetensors' `safe_open` that readers use.

    Names are those of `StoredTensor.name`: NAME, or NAME[NUMBER] for one of stacked experts.
    """

    def __init__(self, path: Path, entries: Mapping[str, Entry], shapes: Mapping[str, tuple[int, ...]]) -> None:
        # Copy-on-write, because torch warns of memory that it may not write to. Nothing writes to it.
        self._bytes = np.memmap(path, dtype=np.uint8, mode="c")
        self._entries, self._shapes = entries, shapes

    def __enter__(self) -> OpenGguf:
        return self

    def __exit__(self, *error: object) -> None:
        del self._bytes

    def get_tensor(self, name: str) -> Tensor:
        """Floats in their dtype, blocks as uint8 [..., bytes of a row]."""
        match = _EXPERT.match(name)
        entry = self._entries[match["name"] if match else name]
        start, nbytes = entry.start, entry.nbytes
        if match:
            nbytes //= entry.shape[0]
            start += int(match["expert"]) * nbytes
        data = torch.from_numpy(self._bytes[start : start + nbytes])
        if entry.kind in FLOATS:
            # Tensors are aligned to 32 bytes; experts of few floats may not be.
            data = data.view(FLOATS[entry.kind]) if start % 4 == 0 else data.clone().view(FLOATS[entry.kind])
        return data.reshape(self._shapes[name])

    def get_slice(self, name: str) -> Tensor:
        """The same. Slices of it are views."""
        return self.get_tensor(name)


def open_gguf(folder: Path, file: str, format: WeightFormat | None, tensors: Mapping[str, StoredTensor]) -> OpenGguf:
    """Maps a file of a folder whose tensors were read by `GgufFormat`."""
    assert isinstance(format, GgufFormat)
    return OpenGguf(folder / file, format._entries, dict(_shapes(tensors)))


def _shapes(tensors: Mapping[str, StoredTensor]) -> Iterator[tuple[str, tuple[int, ...]]]:
    for stored in tensors.values():
        for part in stored.parts.values() or (stored,):
            yield part.name, part.shape
