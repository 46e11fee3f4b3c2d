"""GGUF files: the table of tensors, and reading them. The package gguf parses the files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from executorch_moe.export.checkpoint.formats.base import Encoding, StoredTensor, WeightFormat

from .architectures import (
    ARCHITECTURES,
    GATE_AND_UP,
    Architecture,
    change_of,
    expert_names,
    joined_rows,
    layer_of,
    name_in_model,
    part_of,
    shape_in_model,
)
from .blocks import FLOATS, TYPES, GgufEncoding, Kinds, LatentEncoding, RowsEncoding, StackedEncoding
from .changes import SAME, Change
from .configurations import SAFETENSORS, configuration, prediction_layers

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
        ValueError: a file that is cut short or damaged, or a tensor in two files.
        NotImplementedError: a tensor type, or an order of bytes, that is not supported.
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
        twice = ""
        try:
            reader = gguf.GGUFReader(folder / file)
            swapped = reader.byte_order == "S"
            metadata = metadata or {name: entry.contents() for name, entry in reader.fields.items()}
            for tensor in reader.tensors:
                shape = tuple(int(size) for size in reversed(tensor.shape.tolist()))
                entry = Entry(file, tensor.tensor_type.name, shape, int(tensor.data_offset), int(tensor.n_bytes))
                first = tensors.setdefault(tensor.name, entry)
                twice = twice or (tensor.name if first is not entry else "")
        except Exception as error:  # the reader raises whatever numpy raises
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(
                f"{folder / file} is cut short, damaged or not a GGUF file ({reason}): download it again"
            ) from None
        if swapped:
            raise NotImplementedError(f"{folder / file} has big-endian numbers, which are not supported: {SAFETENSORS}")
        if twice:
            raise ValueError(
                f"{twice} is in {tensors[twice].file} and in {file} of {folder}: give one of the files, or remove "
                "those of other models from the folder"
            )
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
        self._predicts = prediction_layers(metadata) > 0
        for name, entry in self._entries.items():
            if f".{GATE_AND_UP}." in name and len(entry.shape) == 3:
                experts, rows, *k = entry.shape
                self._entries[name] = replace(entry, shape=(2 * experts, rows // 2, *k))
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
        several: dict[str, dict[str, StoredTensor]] = {}
        kind, layers = self._architecture, self._config["num_hidden_layers"]
        for name, entry in self._entries.items():
            if self._predicts and layer_of(name) >= layers:
                continue
            if (part := part_of(name, kind)) is not None:
                several.setdefault(part.weight, {})[part.role] = _stored(name, entry, entry.shape)
            elif (experts := expert_names(name, kind, entry.shape[0])) is not None:
                for number, expert in enumerate(experts):
                    found[expert] = _stored(f"{name}[{number}]", entry, entry.shape[1:])
            elif (target := name_in_model(name, kind)) is not None:
                change = change_of(name, kind, self._config, entry.shape[0])
                found[target] = _stored(name, entry, shape_in_model(name, entry.shape), change)
            elif name not in _IGNORED:
                unknown.append(name)
        # Some files of DeepSeek have the projection of the latents both whole and in parts.
        for name in several.keys() - found.keys():
            found[name] = _joined(name, several[name], kind, self._config, folder)
        if unknown:
            raise ValueError(
                f"{folder / self.file} has {', '.join(unknown[:3])}, which {kind.model_class} does not use: "
                f"{SAFETENSORS}"
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
        raise ValueError(f"{path} lacks {error.args[0]}: download it again, or {SAFETENSORS}") from None
    except NotImplementedError as error:
        raise NotImplementedError(f"{path}: {error}") from None


def _stored(name: str, entry: Entry, shape: tuple[int, ...], change: Change = SAME) -> StoredTensor:
    if entry.kind in FLOATS and change == SAME:
        return StoredTensor(entry.file, shape, entry.kind, name)
    encoding = GgufEncoding(entry.kind, change)
    length = entry.nbytes * shape[-1] // _count(entry.shape)
    kind = entry.kind if entry.kind in FLOATS else "U8"
    codes = StoredTensor(entry.file, (*shape[:-1], shape[-1] if kind != "U8" else length), kind, name)
    return StoredTensor(entry.file, shape, entry.kind, name, encoding, {"codes": codes})


_ROLES = (("down",), ("gate", "up"), ("keys", "values"), ("qkv", "gates"))
"""Roles of the tensors that make up a weight."""


def _joined(
    name: str, parts: Mapping[str, StoredTensor], kind: Architecture, config: Mapping[str, Any], folder: Path
) -> StoredTensor:
    """A weight made of several tensors, in the shape that it has in transformers.

    Raises:
        ValueError: a part that is missing or has another shape.
    """
    roles = next(roles for roles in _ROLES if roles[0] in parts or roles[-1] in parts)
    first = next(iter(parts.values()))
    shapes = [parts[role].shape for role in roles if role in parts]
    shape = _shape_of_joined(roles, shapes) if set(roles) == set(parts) else None
    if shape is None:
        same = "of one shape " if roles == ("gate", "up") else "of shapes that fit "
        raise ValueError(
            f"{folder / first.file} has {first.name}, but not {' and '.join(roles)} {same}for {name}: download "
            f"it again, or {SAFETENSORS}"
        )
    kinds: Kinds = tuple((role, parts[role].dtype) for role in roles)
    encoding: Encoding
    if roles[0] == "keys":
        encoding = LatentEncoding(kinds)
    elif roles[0] == "qkv":
        encoding = RowsEncoding(kinds, joined_rows(kind, config))
    else:
        encoding = StackedEncoding(kinds)
    inner = {role: parts[role].parts.get("codes", parts[role]) for role in roles}
    return StoredTensor(first.file, shape, first.dtype, first.name, encoding, inner)


def _shape_of_joined(roles: tuple[str, ...], shapes: list[tuple[int, ...]]) -> tuple[int, ...] | None:
    """The shape of a weight made of parts in these roles; None if they do not fit."""
    if roles[0] == "keys":
        if len(shapes[0]) != 3 or len(shapes[1]) != 3:
            return None
        (heads, rank, keys), (others, values, width) = shapes
        return (heads * (keys + values), rank) if heads == others and rank == width else None
    if roles[0] == "qkv":
        (rows, *k), (others, *same) = shapes
        return (rows + others, *k) if k == same else None
    e, n, *k = shapes[0]
    if any(shape != shapes[0] for shape in shapes):
        return None
    return (e, *k, n * len(roles)) if k else (e, n * len(roles))


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
