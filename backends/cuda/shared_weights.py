"""Stops ExecuTorch from copying the weights for each method, and from sharing different constants of the same name."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from executorch_moe.backends.cuda.patches.registry import WEIGHTS, replacing


@contextlib.contextmanager
def shared_weights() -> Iterator[None]:
    """Context in which CudaBackend's copy of a program has its own graph, but shares the tensors of the program.

    CudaBackend replaces weights in the tables of the copy when it moves them to the GPU, and never writes to them.
    Weights that are already on the GPU are still copied, because CudaBackend frees them at the end. ExecuTorch 1.5 does
    the same in its low-memory mode, which has other effects as well.

    Lowering numbers the constants that it makes (`_lifted_tensor_constant3`) separately in each method, but ExecuTorch
    takes equal names for one constant and refuses methods whose values differ. Here such constants belong to their
    method, like those that AOTInductor makes.
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
