"""Safetensors files of a model folder: what is in which file, checked against the index, read tensor by tensor.

Weights in fp8 with a scale for each block, as DeepSeek-V3 and Qwen3's FP8 models are published, are read as bf16: X is
stored as float8 e4m3, X_scale_inv holds what each block is to be multiplied by (the name is DeepSeek's), config.json
the size of a block. Source: `weight_dequant` of DeepSeek-V3's inference code, and transformers' fine-grained FP8.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from executorch_moe.export.models.pretrained import fp8_block, read_config

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# A file of this name belongs to a set of shards. Others (Mistral's "consolidated.safetensors") are not ours to read.
_SHARD_NAME = re.compile(r"-\d+-of-\d+\.safetensors$")
COMPLETE = "download the missing files, or check that config.json and weights are of the same model"
_TOGETHER = "take index and files from one download"
FP8 = "F8_E4M3"
_SCALE = "_scale_inv"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is stored and what its file's header says of it; `dtype` as safetensors writes it ("BF16").

    Attributes:
        scale: of a weight in fp8, where the scales of its blocks are stored. block: rows and columns of a block.
    """

    file: str
    shape: tuple[int, ...]
    dtype: str
    scale: StoredTensor | None = None
    block: tuple[int, int] = (1, 1)

    @property
    def nbytes(self) -> int:
        """Bytes of its values; the first number in a type's name is its bits, as in "BF16" and "F8_E4M3"."""
        bits = re.search(r"\d+", self.dtype)
        return math.prod(self.shape) * (int(bits[0]) // 8 if bits else 1)


class Shards:
    """The safetensors files of a folder. Making it reads headers only.

    Attributes:
        folder: the folder.
        tensors: by name, all tensors of all files; scales of fp8 weights are with their weights.

    Raises:
        ValueError: no index for several files, an index that cannot be read, a damaged file, an index and files that
            disagree about a tensor, or scales that do not fit their weight.
        FileNotFoundError: no weights, or a file that the index names is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = _read_index(folder)
        files = sorted(set(index.values())) if index is not None else [_single_file(folder)]
        _check_files(folder, files)
        self.tensors: dict[str, StoredTensor] = {}
        for file in files:
            for name, stored in _read_header(folder / file):
                if name in self.tensors:
                    raise ValueError(
                        f"{name} is in {self.tensors[name].file} and in {file} of {folder}: "
                        "remove the file that is not the model's"
                    )
                self.tensors[name] = stored
        if index is not None:
            self._check_index(index)
        self._pair_scales()

    @property
    def files(self) -> list[str]:
        """Names of the files, sorted."""
        return sorted({stored.file for stored in self.tensors.values()})

    def _pair_scales(self) -> None:
        """Gives weights in fp8 their scales, which are no tensors of the model."""
        for name, stored in list(self.tensors.items()):
            if stored.dtype != FP8 or len(stored.shape) < 2 or (scale := self.tensors.get(name + _SCALE)) is None:
                continue
            block = fp8_block(read_config(self.folder))
            if block is None:
                continue  # refused as a type that is not known
            rows, columns = (-(-size // of) for size, of in zip(stored.shape[-2:], block, strict=True))
            if scale.shape != (*stored.shape[:-2], rows, columns):
                raise ValueError(
                    f"{name}{_SCALE} of {self.folder} has shape {list(scale.shape)}, but {name} {list(stored.shape)} "
                    f"has {rows} x {columns} blocks of {block[0]} x {block[1]}: "
                    "check that weight_block_size in config.json is the one of these weights"
                )
            self.tensors[name] = replace(stored, scale=scale, block=block)
            del self.tensors[name + _SCALE]

    def _check_index(self, index: dict[str, str]) -> None:
        where = self.folder / INDEX_FILE
        absent = sorted(name for name, file in index.items() if self._file_of(name) != file)
        if absent:
            raise ValueError(
                f"{where} says that {index[absent[0]]} holds {listed(absent)}, but it does not: {_TOGETHER}"
            )
        if extra := sorted(self.tensors.keys() - index.keys()):
            raise ValueError(
                f"{self.tensors[extra[0]].file} holds {listed(extra)}, of which {where} says nothing: {_TOGETHER}"
            )

    def _file_of(self, name: str) -> str | None:
        stored = self.tensors.get(name)
        return None if stored is None else stored.file

    @contextlib.contextmanager
    def reader(self) -> Iterator[ShardReader]:
        """Open files lazily; at the end they are closed, and the memory that their tensors took is given back once the
        tensors are gone."""
        with contextlib.ExitStack() as stack:
            yield ShardReader(self, stack)


class ShardReader:
    """Reads tensors of `Shards`, and refuses NaN and Inf in them. What it returns lies in the mapped file: copy what is
    to stay."""

    def __init__(self, shards: Shards, stack: contextlib.ExitStack) -> None:
        self._shards, self._stack = shards, stack
        self._open: dict[str, Any] = {}

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, or those rows of its first dimension; weights in fp8 as bf16, which do not lie in the file.

        Raises:
            ValueError: it holds NaN or Inf.
        """
        stored = self._shards.tensors[name]
        if stored.scale is None:
            return self._finite(stored.file, name, self._stored(stored.file, name, rows))
        # Of a matrix, rows share blocks; stacked matrices do not.
        part = rows if len(stored.shape) > 2 else None
        codes = self._stored(stored.file, name, part)
        scale = self._stored(stored.scale.file, name + _SCALE, part).float()
        self._finite(stored.scale.file, name + _SCALE, scale)
        for dim, size in ((-2, stored.block[0]), (-1, stored.block[1])):
            scale = scale.repeat_interleave(size, dim)
        weight = (codes.float() * scale[..., : codes.shape[-2], : codes.shape[-1]]).to(torch.bfloat16)
        self._finite(stored.file, name, weight)
        return weight if rows is None or part is not None else weight[rows]

    def _finite(self, file: str, name: str, tensor: Tensor) -> Tensor:
        """The tensor, if all of its values are finite."""
        if not all_finite(tensor):
            raise ValueError(
                f"{name} in {self._shards.folder / file} holds NaN or Inf: compare the file's checksum with the "
                "publisher's; if it is theirs, use another checkpoint"
            )
        return tensor

    def _stored(self, file: str, name: str, rows: slice | None) -> Tensor:
        from safetensors import safe_open

        if file not in self._open:
            handle = safe_open(self._shards.folder / file, framework="pt", device="cpu")
            self._open[file] = self._stack.enter_context(handle)
        handle = self._open[file]
        tensor: Tensor = handle.get_tensor(name) if rows is None else handle.get_slice(name)[rows]
        return tensor


def all_finite(tensor: Tensor) -> bool:
    """False if a tensor holds NaN or Inf, in one pass over it; tensors of other types than floats hold none."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()
    # Both ends are NaN where any value is. `isfinite` takes about 20 times as long.
    return bool(torch.stack(tensor.aminmax()).isfinite().all())


def listed(names: Iterable[str], shown: int = 3) -> str:
    """A list for a message: the first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _read_index(folder: Path) -> dict[str, str] | None:
    """Tensor name -> file, None without an index."""
    path = folder / INDEX_FILE
    if not path.is_file():
        return None
    try:
        index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not (isinstance(index, dict) and index and all(isinstance(file, str) for file in index.values())):
            raise TypeError("weight_map is no table of file names")
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no index of weights ({type(error).__name__}: {error}): download it again"
        ) from None
    return dict(index)


def _single_file(folder: Path) -> str:
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if SINGLE_FILE in found:
        return SINGLE_FILE
    if not found:
        raise FileNotFoundError(f"{folder} has no *.safetensors: download the model's")
    raise ValueError(
        f"{folder} has {listed(found)}, but neither {INDEX_FILE} nor {SINGLE_FILE}: put the model's index there"
    )


def _check_files(folder: Path, files: list[str]) -> None:
    if absent := [file for file in files if not (folder / file).is_file()]:
        raise FileNotFoundError(
            f"{folder} lacks {listed(absent)} of {len(files)} files that its index names: download them"
        )
    found = (path.name for path in folder.glob("*.safetensors"))
    if extra := sorted(name for name in found if name not in files and _SHARD_NAME.search(name)):
        raise ValueError(f"{folder} has {listed(extra)}, which its weights do not name: remove them")


def _read_header(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118  safe_open is no mapping
                part = file.get_slice(name)
                yield name, StoredTensor(path.name, tuple(part.get_shape()), part.get_dtype())
    except SafetensorError as error:
        raise ValueError(f"{path} is cut short or damaged ({error}): download it again") from None
