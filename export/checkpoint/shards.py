"""Reads the safetensors files of a model folder tensor by tensor, after checking them against the index.

Quantized weights are read as floats, or as 4-bit codes; see `formats`.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from executorch_moe.kernels import Int4Codes
from executorch_moe.kernels.packing.mxfp4 import Mxfp4Codes

from .formats import StoredTensor, WeightFormat, read_format
from .formats.base import PARTS
from .gguf import GgufFormat, open_gguf

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# A file with such a name is one of a set of shards. Others (Mistral's "consolidated.safetensors") are ignored.
_SHARD_NAME = re.compile(r"-\d+-of-\d+\.safetensors$")
COMPLETE = "download the missing files, or check that config.json and weights are of the same model"
_TOGETHER = "use index and files of the same download"


class Shards:
    """The safetensors files of a folder. The constructor reads headers only.

    Attributes:
        folder: the folder.
        tensors: name -> tensor, for all files. A quantized weight is one tensor.
        files: names of the files, sorted.
        format: the format of quantized weights that the folder declares; None for plain floats.

    Raises:
        ValueError: several files without an index, an unreadable index, a damaged file, an index that disagrees with
            the files, or weights that do not have the declared format.
        FileNotFoundError: no weights, or a missing file that the index names.
        NotImplementedError: an unsupported format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.format: WeightFormat | None
        self.tensors: dict[str, StoredTensor]
        if files := gguf_files(folder):
            self.files, self.format = files, GgufFormat(folder, files)
            self.tensors = self.format.join({}, folder)
            return
        index = _read_index(folder)
        files = sorted(set(index.values())) if index is not None else [_single_file(folder)]
        _check_files(folder, files)
        self.tensors = {}
        for file in files:
            for name, stored in _read_header(folder / file):
                if name in self.tensors:
                    raise ValueError(
                        f"{name} is in {self.tensors[name].file} and in {file} of {folder}: "
                        "remove the file that does not belong to the model"
                    )
                self.tensors[name] = stored
        if index is not None:
            self._check_index(index)
        self.files = sorted({stored.file for stored in self.tensors.values()})
        self.format = read_format(folder)
        if self.format is not None:
            self.tensors = self.format.join(self.tensors, folder)
        self._check_joined()

    def _check_joined(self) -> None:
        """Refuses parts of quantized weights that the declared format does not have."""
        if left := sorted(name for name in self.tensors if PARTS.search(name)):
            declared = "does not declare a format" if self.format is None else f"declares {self.format.title}"
            raise ValueError(
                f"{self.folder} has {listed(left)}, parts of quantized weights, but {self._declares()} {declared}: a "
                "mix of formats is not supported; use config.json and weights of the same download, or the model in "
                "bf16"
            )
        if self.format is not None and all(stored.encoding is None for stored in self.tensors.values()):
            raise ValueError(
                f"{self.folder} has no weights in {self.format}: use the file of the same download as the weights, or "
                "remove the declaration if the weights are floats"
            )

    def _declares(self) -> str:
        return "config.json" if self.format is None else self.format.file

    def _check_index(self, index: dict[str, str]) -> None:
        where = self.folder / INDEX_FILE
        absent = sorted(name for name, file in index.items() if self._file_of(name) != file)
        if absent:
            raise ValueError(
                f"{where} says that {index[absent[0]]} holds {listed(absent)}, but it does not: {_TOGETHER}"
            )
        if extra := sorted(self.tensors.keys() - index.keys()):
            raise ValueError(
                f"{self.tensors[extra[0]].file} holds {listed(extra)}, which {where} does not list: {_TOGETHER}"
            )

    def _file_of(self, name: str) -> str | None:
        stored = self.tensors.get(name)
        return None if stored is None else stored.file

    @contextlib.contextmanager
    def reader(self) -> Iterator[ShardReader]:
        """A reader that opens files on demand. On exit it closes them; their memory is freed with the last tensor."""
        with contextlib.ExitStack() as stack:
            yield ShardReader(self, stack)


class ShardReader:
    """Reads tensors of `Shards` and refuses NaN and Inf.

    Tensors are views of the mapped file: copy those that must outlive the reader.
    """

    def __init__(self, shards: Shards, stack: contextlib.ExitStack) -> None:
        self._shards, self._stack = shards, stack
        self._open: dict[str, Any] = {}

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Reads a tensor, or `rows` of its first dimension. Quantized weights are dequantized, and so copied.

        Raises:
            ValueError: the tensor has NaN or Inf, or values that contradict its format.
        """
        stored = self._shards.tensors[name]
        if stored.encoding is None:
            return self._finite(stored.file, name, self._stored(stored.file, stored.name, rows))
        # Rows of a matrix share blocks or words; stacked matrices do not.
        part = rows if len(stored.shape) > 2 else None
        weight = stored.encoding.dequantize(self._parts(stored, part))
        self._finite(stored.file, stored.name, weight)
        return weight if rows is None or part is not None else weight[rows]

    def read_codes(self, name: str, rows: slice | None = None) -> Int4Codes:
        """Reads a quantized matrix, or `rows` of stacked ones, as codes, whose scales and zero points are in fp32.

        Raises:
            ValueError: scales that are NaN or Inf, or see `Encoding.codes`.
        """
        stored = self._shards.tensors[name]
        assert stored.encoding is not None, f"{name} has no codes"
        codes = stored.encoding.codes(self._parts(stored, rows))
        self._finite(stored.file, stored.name, codes.scale)
        return codes

    def read_mxfp4(self, name: str, rows: slice | None = None) -> Mxfp4Codes:
        """Reads a weight in MXFP4, or `rows` of its first dimension."""
        stored = self._shards.tensors[name]
        assert stored.encoding is not None, f"{name} has no codes"
        return stored.encoding.mxfp4(self._parts(stored, rows))

    def read_part(self, name: str, role: str) -> Tensor:
        """Reads one part of a quantized weight."""
        part = self._shards.tensors[name].parts[role]
        return self._stored(part.file, part.name, None)

    def _parts(self, stored: StoredTensor, rows: slice | None) -> dict[str, Tensor]:
        """The parts of a quantized weight; of stacked matrices only `rows`. All but the codes are checked."""
        found = {}
        for role, part in stored.parts.items():
            shared = rows is None or part.shape[:1] != stored.shape[:1]
            found[role] = self._stored(part.file, part.name, None if shared else rows)
            if role != "codes":
                self._finite(part.file, part.name, found[role])
        return found

    def _finite(self, file: str, name: str, tensor: Tensor) -> Tensor:
        """Returns the tensor; raises if a value is NaN or Inf."""
        if not all_finite(tensor):
            raise ValueError(
                f"{name} in {self._shards.folder / file} holds NaN or Inf: compare the file's checksum with the "
                "publisher's; if they are equal, use another checkpoint"
            )
        return tensor

    def _stored(self, file: str, name: str, rows: slice | None) -> Tensor:
        from safetensors import safe_open

        if file not in self._open:
            shards = self._shards
            handle: Any
            if isinstance(shards.format, GgufFormat):
                handle = open_gguf(shards.folder, file, shards.format, shards.tensors)
            else:
                handle = safe_open(shards.folder / file, framework="pt", device="cpu")
            self._open[file] = self._stack.enter_context(handle)
        handle = self._open[file]
        tensor: Tensor = handle.get_tensor(name) if rows is None else handle.get_slice(name)[rows]
        return tensor


def all_finite(tensor: Tensor) -> bool:
    """False if a tensor has NaN or Inf, found in one pass. True for dtypes other than floats."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()
    # If any value is NaN, minimum and maximum are too. `isfinite` takes about 20 times as long.
    return bool(torch.stack(tensor.aminmax()).isfinite().all())


def listed(names: Iterable[str], shown: int = 3) -> str:
    """Formats names for a message: the first few, and the number of others."""
    names = list(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _read_index(folder: Path) -> dict[str, str] | None:
    """Tensor name -> file name; None if there is no index."""
    path = folder / INDEX_FILE
    if not path.is_file():
        return None
    try:
        index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not (isinstance(index, dict) and index and all(isinstance(file, str) for file in index.values())):
            raise TypeError("weight_map is not a table of file names")
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not an index of weights ({type(error).__name__}: {error}): download it again"
        ) from None
    return dict(index)


def gguf_files(folder: Path) -> list[str]:
    """GGUF files of a folder that has no safetensors."""
    found = sorted(path.name for path in folder.glob("*.gguf"))
    return [] if any(folder.glob("*.safetensors")) else found


def _single_file(folder: Path) -> str:
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if SINGLE_FILE in found:
        return SINGLE_FILE
    if not found:
        raise FileNotFoundError(f"{folder} has no *.safetensors: download those of the model")
    raise ValueError(f"{folder} has {listed(found)}, but neither {INDEX_FILE} nor {SINGLE_FILE}: add the model's index")


def _check_files(folder: Path, files: list[str]) -> None:
    if absent := [file for file in files if not (folder / file).is_file()]:
        raise FileNotFoundError(
            f"{folder} lacks {listed(absent)} of {len(files)} files that its index lists: download them"
        )
    found = (path.name for path in folder.glob("*.safetensors"))
    if extra := sorted(name for name in found if name not in files and _SHARD_NAME.search(name)):
        raise ValueError(f"{folder} has {listed(extra)}, which do not belong to its weights: remove them")


def _read_header(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118  safe_open is not a mapping
                part = file.get_slice(name)
                yield name, StoredTensor(path.name, tuple(part.get_shape()), part.get_dtype(), name)
    except SafetensorError as error:
        raise ValueError(f"{path} is cut short or damaged ({error}): download it again") from None
