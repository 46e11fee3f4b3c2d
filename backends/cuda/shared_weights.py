"""Keeps ExecuTorch from copying weights for each method that it compiles, and from sharing what only looks the same."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from executorch_moe.backends.cuda.patches.registry import WEIGHTS, replacing


@contextlib.contextmanager
def shared_weights() -> Iterator[None]:
    """Within it, the copy of a program that CudaBackend works on has a graph of its own, but the program's tensors.

    CudaBackend replaces weights in the copy's tables when it moves them to the GPU, and never writes to them. Weights
    that are on the GPU already are copied all the same: CudaBackend frees what it finds there in the end.
    ExecuTorch 1.5 does the same in its low-memory mode, which changes other things as well.

    Constants that lowering itself makes (`_lifted_tensor_constant3`) are numbered anew in each method, but share a name
    with those of all: methods whose third constants differ are refused as damaged. They become each method's own, as
    those that AOTInductor makes are.
    """

    def is_local(fqn: str) -> bool:
        return bool(stock(fqn)) or fqn.startswith("_lifted_tensor_constant")

    def copy_program(cls: type, edge_program: Any, compile_specs: Any) -> Any:
        tables = (edge_program.state_dict, edge_program.constants)
        tensors = (value for table in tables for value in table.values() if isinstance(value, Tensor))
        return copy.deepcopy(edge_program, {id(tensor): tensor for tensor in tensors if tensor.device.type == "cpu"})

    with replacing(WEIGHTS) as replace:
        backend = "executorch.backends.cuda.cuda_backend:CudaBackend"
        replace(f"{backend}.copy_exported_program_for_preprocess", classmethod(copy_program))
        stock = replace("executorch.backends.cuda.cuda_weight_collector:_is_aoti_library_local_fqn", is_local)
        yield
