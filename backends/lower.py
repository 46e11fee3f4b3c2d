"""`lower`: turns exported programs into an ExecuTorch program for a target."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from executorch.backends.cuda.cuda_backend import CudaBackend
from executorch.exir import (
    EdgeCompileConfig,
    EdgeProgramManager,
    ExecutorchBackendConfig,
    ExecutorchProgramManager,
    to_edge_transform_and_lower,
)
from executorch.exir.dialects._ops import ops as exir_ops
from executorch.exir.passes import MemoryPlanningPass
from torch.export.exported_program import ExportedProgram

from executorch_moe.backends.artifact.method_targets import method_for
from executorch_moe.backends.artifact.runtime_symbols import missing_functions
from executorch_moe.backends.cpu import MoECpuPartitioner
from executorch_moe.backends.cpu.uncopied_weights import uncopied_weights
from executorch_moe.backends.cuda import MoECudaPartitioner
from executorch_moe.backends.cuda.cross.report import CrossCompileReport
from executorch_moe.backends.cuda.cross.target import target_cuda
from executorch_moe.backends.cuda.cuda_partitioner import check_state
from executorch_moe.backends.cuda.empty_buffers import empty_buffers
from executorch_moe.backends.cuda.generated_kernels import AccessReport, checked_kernels
from executorch_moe.backends.cuda.missing_operators import MissingOperatorsError, check_operators, find_operators
from executorch_moe.backends.cuda.output_folders import own_outputs
from executorch_moe.backends.cuda.overlapped_launches import overlapped_launches, why_not_overlapped
from executorch_moe.backends.cuda.patches import replacing
from executorch_moe.backends.cuda.patches.registry import HISTORY
from executorch_moe.backends.cuda.shared_weights import shared_weights
from executorch_moe.backends.cuda.torch_defects import defects_avoided
from executorch_moe.backends.fusion import ExpertFuser, FusionOptions
from executorch_moe.kernels.gpus import GpuModel, find_models, target_names

from .versions import check_versions

TARGETS = ("cuda", "cpu", *target_names())


def lower(
    programs: Mapping[str, ExportedProgram],
    target: str,
    constant_methods: Mapping[str, Any] | None = None,
    fusion: FusionOptions | ExpertFuser | None = None,
    on_report: Callable[[CrossCompileReport], None] | None = None,
    on_accesses: Callable[[AccessReport], None] | None = None,
) -> ExecutorchProgramManager:
    """Lower all methods of one program. Methods share weights and mutated buffers of the same qualified name.

    Args:
        programs: method name -> exported program.
        target: "cuda" compiles with AOTInductor for the GPU of this machine. A name such as "sm_90" or "h200"
            (`kernels.gpus.target_names`) compiles for that GPU and needs none. "sm_80,sm_90" compiles for several, with
            each method once for each: those for the first keep their names, others are named as `decode@sm_90`.
            "cpu" is for ExecuTorch's CPU kernels.
        constant_methods: method name -> bool, int, float, str, or lists of them.
        fusion: how to fuse experts that are not fused yet; pass an `ExpertFuser` to read its report afterwards.
        on_report: called with the report of each GPU that the target names; not called for "cuda" and "cpu".
        on_accesses: called for each CUDA target with the report on memory accesses of the kernels that torch generates.

    Returns:
        The program with external weights, to be written with `artifact.save`. For target "cpu", writing reads the
        model's tensors, so they must not change before.

    Raises:
        ValueError: the target is unknown, two targets have one architecture, there is no method, or two of one name.
        RuntimeError: target "cuda" on a machine without a GPU.
            A named GPU without a C++ compiler, or with versions that are not known to work.
            Installed packages are outside the ranges that this package requires.
        NotImplementedError: experts cannot be fused. For a CUDA target also: AOTInductor would compile in a mutated
            buffer as a constant, or the CUDA runtime lacks operators (the message lists all with their modules).
        OutOfBoundsError: a kernel that torch generated would read or write outside of a buffer.
    """
    check_versions()
    constants = dict(constant_methods or {})
    if any(name not in TARGETS for name in target.split(",")):
        raise ValueError(f"target {target!r} is unknown: choose one of {', '.join(TARGETS)}")
    models = () if target in ("cuda", "cpu") else find_models(target)
    if not programs:
        raise ValueError("programs is empty: pass at least one exported method")
    if both := sorted(constants.keys() & programs.keys()):
        raise ValueError(f"{both[0]!r} is both a method and a constant method: rename one")
    # ExecuTorch's passes replay in-place buffer updates, which autograd refuses if a parameter requires gradients.
    fuser = fusion if isinstance(fusion, ExpertFuser) else ExpertFuser(fusion)
    with torch.no_grad(), shared_history():
        if target == "cpu":
            return _lower_cpu(programs, constants, fuser)
        if target == "cuda":
            if why := why_no_cuda_export():
                raise RuntimeError(
                    f"cannot lower for target 'cuda': {why}. Name the GPU to export for ('sm_90', 'h200'), "
                    "export on a machine with an NVIDIA GPU, or use target 'cpu'"
                )
            major, minor = torch.cuda.get_device_capability()
            with overlapped_launches(10 * major + minor):
                edge = _delegate_cuda(programs, fuser, constants, on_accesses)
        else:
            edge = _delegate_each(programs, fuser, models, constants, on_report, on_accesses)
        return edge.to_executorch(ExecutorchBackendConfig(external_constants=True))


@contextlib.contextmanager
def shared_history() -> Iterator[None]:
    """Nodes share the records of the nodes that they come from.

    torch copies these records, which grow with each tracing, for every node: a tenth of an export's time.
    """
    with replacing(HISTORY) as replace:
        with contextlib.suppress(AttributeError):  # a torch without these records
            replace("torch.fx.traceback:NodeSource.__deepcopy__", lambda record, memo: record)
        yield


def why_slower(target: str) -> str:
    """The reason why this machine's exports for a target are slower than possible; empty if they are not."""
    if target != "cuda":  # exports for a named GPU are refused in this case
        return ""
    major, minor = torch.cuda.get_device_capability()
    return why_not_overlapped(10 * major + minor)


def why_no_cuda_export() -> str:
    """Empty if this machine can lower for "cuda", else the reason."""
    from torch._dynamo.device_interface import get_interface_for_device

    if get_interface_for_device("cuda").is_available():
        return ""
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is a CPU build"
    return "no CUDA device is visible"


def _any_operator() -> EdgeCompileConfig:
    """Allows operators outside Core ATen: AOTInductor supports more; `check_operators` finds those that it lacks."""
    return EdgeCompileConfig(_check_ir_validity=False)


def _delegate_each(
    programs: Mapping[str, ExportedProgram],
    fuser: ExpertFuser,
    models: Sequence[GpuModel],
    constants: dict[str, Any],
    on_report: Callable[[CrossCompileReport], None] | None,
    on_accesses: Callable[[AccessReport], None] | None,
) -> EdgeProgramManager:
    """Delegates for named GPUs. With several GPUs, each method exists once for each, on the same weights."""
    lowered: dict[str, ExportedProgram] = {}
    for model in models:
        with target_cuda(model.name) as report:
            edge = _delegate_cuda(programs, fuser, on_accesses=on_accesses)
        for name in programs:
            lowered[name if model is models[0] else method_for(name, model)] = edge.exported_program(name)
        report.check_shared()
        if on_report is not None:
            on_report(report)
    return EdgeProgramManager(lowered, constants, _any_operator())


def _delegate_cuda(
    programs: Mapping[str, ExportedProgram],
    fuser: ExpertFuser,
    constants: dict[str, Any] | None = None,
    on_accesses: Callable[[AccessReport], None] | None = None,
) -> EdgeProgramManager:
    mutated = {fqn for program in programs.values() for fqn in program.graph_signature.buffers_to_mutate.values()}
    for program in programs.values():
        check_state(program, mutated)
    partitioners = {
        name: [MoECudaPartitioner([CudaBackend.generate_method_name_compile_spec(name)], fuser)] for name in programs
    }
    try:
        with shared_weights(), empty_buffers(), own_outputs(), defects_avoided(), checked_kernels() as accesses:
            edge = to_edge_transform_and_lower(
                {name: _with_own_tables(program) for name, program in programs.items()},
                partitioner=partitioners,
                constant_methods=constants,
                compile_config=_any_operator(),
            )
    except MissingOperatorsError:
        check_operators(*map(fuser.fuse, programs.values()))  # the partitioner's error covers one method only
        raise
    except RuntimeError as error:
        if found := re.search(r"Method (\S+) missing fallback kernels.*?:\n((?:\s+- .*\n?)+)", str(error)):
            kernels = [line.strip(" -") for line in found[2].splitlines()]
            raise MissingOperatorsError(find_operators(fuser.fuse(programs[found[1]]), kernels)) from error
        raise
    for name in programs:
        if functions := missing_functions(edge.exported_program(name)):
            raise MissingOperatorsError(find_operators(fuser.fuse(programs[name]), functions))
    if on_accesses is not None:
        on_accesses(accesses)
    return edge


def _with_own_tables(program: ExportedProgram) -> ExportedProgram:
    """A shallow copy: lowering removes entries from its tables of tensors, which the next target needs."""
    mine = copy.copy(program)
    mine._state_dict, mine._constants = dict(program.state_dict), dict(program.constants)
    return mine


def _lower_cpu(
    programs: Mapping[str, ExportedProgram], constants: dict[str, Any], fuser: ExpertFuser
) -> ExecutorchProgramManager:
    edge = to_edge_transform_and_lower(
        dict(programs),
        partitioner=[MoECpuPartitioner(fuser)],
        constant_methods=constants,
        # `_to_dim_order_copy` takes 5 to 15 times as long as `_to_copy`, which it replaces.
        compile_config=EdgeCompileConfig(_skip_dim_order=True),
    )
    state = _mark_state(edge)
    config = ExecutorchBackendConfig(
        external_constants=lambda node: None if node.name in state else "weights",
        memory_planning_pass=MemoryPlanningPass(share_mutable_buffers=bool(state)),
        remove_view_copy=not _views_a_weight(edge),
    )
    with uncopied_weights():
        return edge.to_executorch(config)


def _views_a_weight(edge: EdgeProgramManager) -> bool:
    """True if a method reshapes a parameter: ExecuTorch 1.5 cannot emit a view of an external weight without a copy."""
    view = exir_ops.edge.aten.view_copy.default
    return any(
        node.target is view and isinstance(node.args[0], torch.fx.Node) and node.args[0].op == "placeholder"
        for name in edge.methods
        for node in edge.exported_program(name).graph.nodes
    )


def _mark_state(edge: EdgeProgramManager) -> set[str]:
    """Mark every buffer that a method mutates as state with an initial value, in all methods; returns the nodes' names.

    By default ExecuTorch drops the initial value of a mutated buffer. In methods that only read the buffer it must be
    state as well, otherwise they get a constant copy.
    """
    signatures = {name: edge.exported_program(name).graph_signature for name in edge.methods}
    mutated = {fqn for signature in signatures.values() for fqn in signature.buffers_to_mutate.values()}
    names = set()
    for name, signature in signatures.items():
        for node in edge.exported_program(name).graph.nodes:
            if node.op == "placeholder" and signature.inputs_to_buffers.get(node.name) in mutated:
                node.meta["et_init_buffer"] = True
                names.add(node.name)
    return names
