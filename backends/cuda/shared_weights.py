"""Keeps ExecuTorch from copying a model's weights once for each method that it compiles."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any
from unittest import mock

from executorch.backends.cuda.cuda_backend import CudaBackend
from torch import Tensor


@contextlib.contextmanager
def shared_weights() -> Iterator[None]:
    """Within it, the copy of a program that CudaBackend works on has a graph of its own, but the program's tensors.

    CudaBackend replaces weights in the copy's tables when it moves them to the GPU, and never writes to them. Weights
    that are on the GPU already are copied all the same: CudaBackend frees what it finds there in the end.
    ExecuTorch 1.5 does the same in its low-memory mode, which changes other things as well.
    """

    def copy_program(cls: type, edge_program: Any, compile_specs: Any) -> Any:
        tables = (edge_program.state_dict, edge_program.constants)
        tensors = (value for table in tables for value in table.values() if isinstance(value, Tensor))
        return copy.deepcopy(edge_program, {id(tensor): tensor for tensor in tensors if tensor.device.type == "cpu"})

    with mock.patch.object(CudaBackend, "copy_exported_program_for_preprocess", classmethod(copy_program)):
        yield
