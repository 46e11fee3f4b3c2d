"""Methods of one program share their weights while CudaBackend compiles them."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from executorch.backends.cuda import cuda_weight_collector
from executorch.backends.cuda.cuda_backend import CudaBackend

from executorch_moe.backends.cuda.shared_weights import shared_weights


def test_weights_are_not_copied_for_each_method() -> None:
    program = torch.export.export(torch.nn.Linear(4, 4), (torch.zeros(1, 4),))
    with shared_weights():
        copied = CudaBackend.copy_exported_program_for_preprocess(program, [])
        # CudaBackend frees tensors that are not on the CPU: those must be its own.
        elsewhere = SimpleNamespace(state_dict={"weight": torch.empty(1, device="meta")}, constants={})
        other = CudaBackend.copy_exported_program_for_preprocess(elsewhere, [])
    assert other.state_dict["weight"] is not elsewhere.state_dict["weight"]
    assert copied.state_dict["weight"] is program.state_dict["weight"]
    assert copied.graph is not program.graph and copied.state_dict is not program.state_dict
    stock = CudaBackend.copy_exported_program_for_preprocess(program, [])
    assert stock.state_dict["weight"] is not program.state_dict["weight"]


def test_lowered_constants_are_each_methods_own() -> None:
    with shared_weights():
        is_local = cuda_weight_collector._is_aoti_library_local_fqn
        assert is_local("_lifted_tensor_constant3") and is_local("_tensor_constant0")
        assert not is_local("model.norm.weight")
    assert not cuda_weight_collector._is_aoti_library_local_fqn("_lifted_tensor_constant3")
