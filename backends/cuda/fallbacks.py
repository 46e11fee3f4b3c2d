"""Predicts, without compiling, which operators of a program would end its export for ExecuTorch's CUDA backend.

An operator passes two gates. ExecuTorch's edge dialect takes Core ATen and what it can decompose. Then AOTInductor
makes a kernel for each operator that it can lower and calls a library for the rest, of which ExecuTorch has a few
functions; any other ends the export after minutes of compiling, one method at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from executorch.backends.cuda.cuda_backend import CudaBackend
from torch._export.verifier import SpecViolationError
from torch.export.exported_program import ExportedProgram
from torch.fx import Node

aten = torch.ops.aten

# ExecuTorch puts Triton kernels of its own in place of these, before AOTInductor sees them.
_REPLACED = (aten.scaled_dot_product_attention.default, aten.topk.default)
_TOPK_MAX_N = 4096  # executorch.backends.cuda.triton.replacement_pass: longer rows are not replaced


@dataclass(frozen=True)
class MissingKernel:
    """An operator that would be refused, the module that calls it (name and class), and which gate refuses it."""

    operator: str
    module: str
    family: str
    gate: str

    def __str__(self) -> str:
        return f"{self.operator} in {self.module or 'the model itself'} ({self.family}): {self.gate}"


NOT_CORE = "not in ExecuTorch's edge dialect"
NO_KERNEL = "no kernel in ExecuTorch's CUDA runtime"


def predict_missing(program: ExportedProgram) -> list[MissingKernel]:
    """Every operator that would be refused, once for each module that calls it, in graph order.

    It is a prediction: operators are decomposed as ExecuTorch and AOTInductor do, and looked up in their tables. A
    lowering that decides by shape or type whether it calls a library is taken for one that does not.

    Args:
        program: ATen program with its experts fused; experts that are not fused count as any other operators.
    """
    with torch.no_grad():
        functional = program.run_decompositions({})
    refused = _not_edge({node.target for node in _operators(functional)})
    found = [_missing(node, NOT_CORE) for node in _operators(functional) if node.target in refused]
    known = {missing.operator for missing in found}
    lowered = [_missing(node, NO_KERNEL) for node in _operators(_decomposed(program)) if _lacks_kernel(node)]
    return list(dict.fromkeys([*found, *(missing for missing in lowered if missing.operator not in known)]))


def _not_edge(operators: Collection[Any]) -> set[Any]:
    """Operators that ExecuTorch's edge dialect neither takes nor decomposes."""
    from executorch.exir.program._program import _default_decomposition_table
    from executorch.exir.verification.verifier import EXIRATenDialectVerifier

    verifier, refused = EXIRATenDialectVerifier(), set()
    # Views become copies and assertions go before anything is checked.
    checked = {op for op in operators if not (op.is_view or op._opname.startswith("_assert"))}
    for operator in checked - _default_decomposition_table().keys():
        try:
            verifier.check_valid_op(operator)
        except SpecViolationError:
            refused.add(operator)
    return refused


def _decomposed(program: ExportedProgram) -> ExportedProgram:
    """The program in the operators that AOTInductor lowers."""
    from torch._inductor.decomposition import select_decomp_table

    table = {**select_decomp_table(), **CudaBackend.get_decomposition_table()}
    for operator in _REPLACED:
        table.pop(operator, None)
    with torch.no_grad():
        return program.run_decompositions(table)


def _operators(program: ExportedProgram) -> Iterator[Node]:
    for module in program.graph_module.modules():  # branches of conditions too
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
                    yield node


def _lacks_kernel(node: Node) -> bool:
    # Inductor fills these when its lowerings are loaded.
    from torch._inductor import lowering
    from torch._library.triton import triton_ops_to_kernels

    operator: Any = node.target
    if operator in _REPLACED:
        return not _is_replaced(node)
    if operator._name in triton_ops_to_kernels:  # AOTInductor opens it
        return False
    lowered = lowering.lowerings.get(operator)
    if lowered is not None and not getattr(lowered, "_is_fallback_handler", False):
        return False
    return not _has_library_function(operator)


def _is_replaced(node: Node) -> bool:
    if node.target is not aten.topk.default:
        return True
    value = node.args[0].meta["val"]  # type: ignore[union-attr]
    dim = node.args[2] if len(node.args) > 2 else -1
    size = value.shape[dim]
    return not isinstance(size, int) or size <= _TOPK_MAX_N


def _has_library_function(operator: Any) -> bool:
    """True if ExecuTorch has the function that AOTInductor would call, by any of the names that it may have."""
    name = operator._schema.name.partition("::")[2]
    overload = operator._schema.overload_name
    full = f"{name}_{overload}" if overload else name
    supported = CudaBackend.get_supported_fallback_kernels()
    return any(key in supported for key in (operator._name, f"at::_ops::{full}::call", f"aoti_torch_cuda_{full}"))


def _missing(node: Node, gate: str) -> MissingKernel:
    """What to say of a node: its operator, and the innermost module that it came from."""
    stack = node.meta.get("nn_module_stack") or {"": ("", "")}
    path, kind = list(stack.values())[-1]
    name = path.removeprefix("L['self'].").removeprefix("L['self']").partition("@")[0]
    family = str(kind if isinstance(kind, str) else kind.__name__).rpartition(".")[2]
    return MissingKernel(str(node.target), name, family, gate)
