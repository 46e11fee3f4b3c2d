"""Stops ExecuTorch from copying the weights of a model while it emits a program for the CPU."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import io
from collections.abc import Iterator
from typing import Any

import torch
from executorch.exir._serialize._cord import FileBackedData
from executorch.exir.emit._emitter import _Emitter
from executorch.exir.schema import EValue
from executorch.exir.tensor import make_tensor_value

from executorch_moe.backends.cuda.patches.registry import CPU, replacing


class StorageData(FileBackedData):
    """The bytes of a tensor's storage, without a copy; keeps the storage alive.

    ExecuTorch accepts `bytes` or a `FileBackedData` as contents of a file, and uses only the methods defined here.
    """

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self._storage = storage
        self._size = storage.nbytes()
        array = (ctypes.c_char * self._size).from_address(storage.data_ptr()) if self._size else b""
        self._view = memoryview(array).cast("B")
        self._sha256: bytes | None = None

    def prefix(self, size: int) -> bytes:
        return bytes(self._view[:size])

    def sha256(self) -> bytes:
        if self._sha256 is None:
            self._sha256 = hashlib.sha256(self._view).digest()
        return self._sha256

    def to_bytes(self) -> bytes:
        return bytes(self._view)

    def write_to_file(self, outfile: io.BufferedIOBase) -> None:
        outfile.write(self._view)

    def close(self) -> None:
        """Nothing to close."""


@contextlib.contextmanager
def uncopied_weights() -> Iterator[None]:
    """Context in which `to_executorch` refers to external weights instead of copying them.

    Its result reads the weights when it is written, so they must not change before. ExecuTorch 1.5's emitter copies
    every weight of every method into a `bytes` object, and keeps those of the first method.

    Raises:
        RuntimeError: the emitter of the installed executorch is not the known one.
    """

    def emit(self: _Emitter, spec: Any, constant_tag: str | None = None) -> EValue:
        if not spec.const or constant_tag is None or spec.mem_id is not None:
            return stock(self, spec, constant_tag)
        data = StorageData(spec.storage)
        digest = data.sha256().hex()
        index = self.program_state.external_constant_hash.get(digest)
        if index is None:
            index = self._save_new_const_tensor(spec, data, digest, None, constant_tag)
        else:
            self._save_to_external_constant_map(spec.extra_tensor_info.fully_qualified_name, index, constant_tag)
        return EValue(make_tensor_value(index, None, spec))

    with replacing(CPU) as replace:
        stock = replace("executorch.exir.emit._emitter:_Emitter._tensor_spec_to_evalue", emit)
        yield
