"""`missing_operators`: operators without a kernel in ExecuTorch's CUDA runtime, found before compiling."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.nn.attention import SDPBackend, sdpa_kernel

Operator: TypeAlias = OpOverload | HigherOrderOperator
Module = tuple[str, str]
"""(qualified name, class)."""

# Inductor generates kernels for these only with a setting that is off by default; otherwise it calls a library.
_SELECTIONS = frozenset(
    getattr(getattr(torch.ops.aten, name), overload)
    for name, overload in (("median", "default"), ("median", "dim"), ("kthvalue", "default"), ("mode", "default"))
)


@dataclass(frozen=True, order=True)
class MissingOperator:
    """One operator in one module.

    Attributes:
        operator: "aten.histc", or with an overload other than the default: "aten.sort.values".
        module: qualified name of the module whose forward calls it; "" for the exported module itself.
        module_type: its class, without the package.
    """

    operator: str
    module: str
    module_type: str = ""

    def __str__(self) -> str:
        where = f"{self.module} ({self.module_type})" if self.module else self.module_type or "the model"
        return f"{self.operator} in {where}"


def missing_operators(program: ExportedProgram) -> list[MissingOperator]:
    """Operators for which AOTInductor would call a library function that ExecuTorch's CUDA runtime does not have.

    Runs Inductor's decompositions on fake tensors: takes seconds, needs no GPU and no compiler. Call it on a program
    with fused experts (`ExpertFuser.fuse`): unfused experts contain operators that fusing removes. Operators for which
    Inductor calls a library in some shapes only (an index_put of bool) are found only by lowering.

    Args:
        program: from `torch.export.export`, on any device; not changed.

    Returns:
        Each pair of operator and module once, sorted; empty if everything can be compiled.
    """
    supported = _runtime_kernels()
    found = {
        MissingOperator(_name(operator), *module)
        for node, module, operator in _operators(_decompose(program).graph_module)
        if not _is_compiled(node, operator) and supported.isdisjoint(kernel_names(operator))
    }
    return sorted(found)


def find_operators(program: ExportedProgram, kernels: Iterable[str]) -> list[MissingOperator]:
    """The operators of a program whose library functions have these names, each with its module.

    For names that AOTInductor reports. A name that matches no operator is returned unchanged, without a module.
    """
    unknown = set(kernels)
    wanted = frozenset(unknown)
    found: set[MissingOperator] = set()
    for _, module, operator in _operators(_decompose(program).graph_module):
        if hits := wanted & kernel_names(operator):
            found.add(MissingOperator(_name(operator), *module))
            unknown -= hits
    return sorted(found | {MissingOperator(kernel, "") for kernel in unknown})


class MissingOperatorsError(NotImplementedError):
    """The CUDA runtime lacks operators of a program; the message is one line with all `operators` and the remedy."""

    def __init__(self, operators: Iterable[MissingOperator]) -> None:
        self.operators = sorted(set(operators))
        listed = "; ".join(str(operator) for operator in self.operators)
        super().__init__(
            f"ExecuTorch's CUDA runtime has no kernel for {listed}: rewrite these parts of the model in other operators"
        )


def check_operators(*programs: ExportedProgram) -> None:
    """Check all methods of a program with fused experts.

    Raises:
        MissingOperatorsError: operators are missing; lists each with its module.
    """
    if missing := [operator for program in programs for operator in missing_operators(program)]:
        raise MissingOperatorsError(missing)


def kernel_names(operator: Operator) -> set[str]:
    """Names under which AOTInductor's host code may call an operator's library function."""
    if not isinstance(operator, OpOverload):
        return {str(operator)}
    base = operator._opname
    full = base if operator._overloadname == "default" else f"{base}_{operator._overloadname}"
    # In-place and functional forms become the out variant.
    forms = {base, full, f"{base}_out", f"{full}_out", f"{base.rstrip('_')}_out"}
    shims = {f"aoti_torch_cuda_{form}" for form in forms}
    return {operator.name(), *shims, *(f"at::_ops::{form}::call" for form in forms)}


def _runtime_kernels() -> set[str]:
    from executorch.backends.cuda.cuda_backend import CudaBackend

    return set(CudaBackend.get_supported_fallback_kernels())


def _is_compiled(node: Node, operator: Operator) -> bool:
    """True if Inductor, or an earlier pass of ExecuTorch, generates kernels for an operator."""
    from torch._inductor.lowering import lowerings
    from torch._library.triton import triton_ops_to_kernels

    if operator in _replaced_by_executorch():
        return not _is_long_topk(node)
    if lowering := lowerings.get(operator):
        # Fallback lowerings only call a library.
        return not getattr(lowering, "_is_fallback_handler", False) and operator not in _SELECTIONS
    return isinstance(operator, OpOverload) and operator.name() in triton_ops_to_kernels


def _is_long_topk(node: Node) -> bool:
    """True for a topk of rows that do not fit into one block of ExecuTorch's kernel: its pass does not replace it."""
    from executorch.backends.cuda.triton.replacement_pass import ReplaceEdgeOpWithTritonOpPass

    if node.target is not torch.ops.aten.topk.default:
        return False
    values: Any = node.args[0]
    dim: Any = node.args[2] if len(node.args) > 2 else -1
    length = values.meta["val"].shape[dim]
    return not isinstance(length, int) or length > ReplaceEdgeOpWithTritonOpPass._TOPK_MAX_N


def _replaced_by_executorch() -> set[OpOverload]:
    from executorch.backends.cuda.triton.replacement_pass import EDGE_TO_TRITON_KERNELS

    return {edge._op for edge in EDGE_TO_TRITON_KERNELS}


def _decompose(program: ExportedProgram) -> ExportedProgram:
    """The program after Inductor's decompositions, each node with its module."""
    from torch._inductor.decomposition import select_decomp_table

    composite = {
        operator: function
        for operator, function in torch.export.default_decompositions().items()
        if isinstance(operator, OpOverload) and operator._can_decompose()
    }
    table: dict[Any, Callable[..., Any]] = {**composite, **select_decomp_table()}
    for operator in _replaced_by_executorch():
        table.pop(operator, None)
    # CudaBackend compiles attention that is not replaced in the same way.
    with sdpa_kernel([SDPBackend.MATH]), torch.no_grad():
        return program.run_decompositions(table)


def _operators(graph: GraphModule, outer: Module = ("", "")) -> Iterator[tuple[Node, Module, Operator]]:
    """Every operator call with its module. Calls in branches and loop bodies get the module `outer`."""
    for node in graph.graph.nodes:
        if node.op == "get_attr" and isinstance(inner := getattr(graph, str(node.target), None), GraphModule):
            yield from _operators(inner, next((_module(user, outer) for user in node.users), outer))
        elif node.target is torch.ops.higher_order.with_effects:  # (token, operator, ...)
            yield node, _module(node, outer), node.args[1]
        elif isinstance(node.target, (OpOverload, HigherOrderOperator)):
            yield node, _module(node, outer), node.target


def _name(operator: Operator) -> str:
    return re.sub(r"\.default$", "", str(operator))


def _module(node: Node, outer: Module) -> Module:
    """The innermost module of a node."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return outer
    path, kind = stack[-1]
    path = path.removeprefix("L['self']").removeprefix(".").partition("@")[0]  # strict export; a module called twice
    return path, (kind if isinstance(kind, str) else kind.__name__).rpartition(".")[2]
