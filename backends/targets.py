"""`lower`: exported programs to an ExecuTorch program for a target."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
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

from executorch_moe.backends.cpu import MoECpuPartitioner
from executorch_moe.backends.cpu.uncopied_weights import uncopied_weights
from executorch_moe.backends.cuda import MoECudaPartitioner
from executorch_moe.backends.cuda.cross_compile import target_cuda
from executorch_moe.backends.cuda.cross_report import CrossCompileReport
from executorch_moe.backends.cuda.generated_kernels import checked_kernels
from executorch_moe.backends.cuda.method_targets import method_for
from executorch_moe.backends.cuda.missing_operators import MissingOperatorsError, check_operators, find_operators
from executorch_moe.backends.cuda.overlapped_launches import overlapped_launches, why_not_overlapped
from executorch_moe.backends.cuda.own_outputs import own_outputs
from executorch_moe.backends.cuda.partitioner import check_state
from executorch_moe.backends.cuda.runtime_symbols import missing_functions
from executorch_moe.backends.cuda.shared_weights import shared_weights
from executorch_moe.backends.cuda.torch_defects import defects_avoided
from executorch_moe.backends.fusion import ExpertFuser, FusionOptions
from executorch_moe.backends.versions import check_versions
from executorch_moe.kernels.gpus import GpuModel, find_models, target_names

TARGETS = ("cuda", "cpu", *target_names())


def lower(
    programs: Mapping[str, ExportedProgram],
    target: str,
    constant_methods: Mapping[str, Any] | None = None,
    fusion: FusionOptions | ExpertFuser | None = None,
    on_report: Callable[[CrossCompileReport], None] | None = None,
) -> ExecutorchProgramManager:
    """Lower all methods of one program; weights and mutated buffers of the same qualified name are shared.

    Args:
        programs: method name -> exported program.
        target: "cuda" compiles with AOTInductor for the GPU of this machine; "sm_90", "h200" and the like
            (`kernels.gpus.target_names`) for that GPU, without one; "sm_80,sm_90" for several, with each method once
            for each, as `decode@sm_90`; "cpu" for ExecuTorch's CPU kernels.
        constant_methods: method name -> bool, int, float, str, or lists of them.
        fusion: how experts that are not fused yet are fused; pass an `ExpertFuser` to read its report afterwards.
        on_report: gets what was compiled for each GPU that is not here; other targets never call it.

    Returns:
        The program, to be written with `artifact.save`: its weights are external. For target "cpu" they are read when
        it is written, so the model's tensors must not change before.

    Raises:
        ValueError: unknown target, two targets of one architecture, no method, or a name used twice.
        RuntimeError: target "cuda" on a machine without a GPU.
            A GPU that is not here: no compiler, or versions that are not known to work.
            Packages outside the range that this package requires.
        NotImplementedError: a CUDA target and a mutated buffer that AOTInductor would take for a constant, or
            operators that the CUDA runtime lacks, all of them and where they come from; experts that cannot be fused.
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
    # ExecuTorch's passes replay in-place buffer updates, which autograd refuses if a parameter asks for gradients.
    fuser = fusion if isinstance(fusion, ExpertFuser) else ExpertFuser(fusion)
    with torch.no_grad():
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
                edge = _delegate_cuda(programs, fuser, constants)
        else:
            edge = _delegate_each(programs, fuser, models, constants, on_report)
        return edge.to_executorch(ExecutorchBackendConfig(external_constants=True))


def why_slower(target: str) -> str:
    """Empty, or why what this machine exports for a target is right but slower than it could be: one sentence."""
    if target != "cuda":  # GPUs that are not here are refused then
        return ""
    major, minor = torch.cuda.get_device_capability()
    return why_not_overlapped(10 * major + minor)


def why_no_cuda_export() -> str:
    """Empty if "cuda" can be lowered here, else the reason why not."""
    from torch._dynamo.device_interface import get_interface_for_device

    if get_interface_for_device("cuda").is_available():
        return ""
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is a CPU build"
    return "no CUDA device is visible"


def _any_operator() -> EdgeCompileConfig:
    """Core ATen is what ExecuTorch's own kernels understand; AOTInductor takes more, what it lacks is checked for."""
    return EdgeCompileConfig(_check_ir_validity=False)


def _delegate_each(
    programs: Mapping[str, ExportedProgram],
    fuser: ExpertFuser,
    models: Sequence[GpuModel],
    constants: dict[str, Any],
    on_report: Callable[[CrossCompileReport], None] | None,
) -> EdgeProgramManager:
    """Delegates for GPUs that are not here; of several, a method for each, on the same weights."""
    lowered: dict[str, ExportedProgram] = {}
    for model in models:
        with target_cuda(model.name) as report:
            edge = _delegate_cuda(programs, fuser)
        for name in programs:
            lowered[name if len(models) == 1 else method_for(name, model)] = edge.exported_program(name)
        report.check_shared()
        if on_report is not None:
            on_report(report)
    return EdgeProgramManager(lowered, constants, _any_operator())


def _delegate_cuda(
    programs: Mapping[str, ExportedProgram], fuser: ExpertFuser, constants: dict[str, Any] | None = None
) -> EdgeProgramManager:
    mutated = {fqn for program in programs.values() for fqn in program.graph_signature.buffers_to_mutate.values()}
    for program in programs.values():
        check_state(program, mutated)
    partitioners = {
        name: [MoECudaPartitioner([CudaBackend.generate_method_name_compile_spec(name)], fuser)] for name in programs
    }
    try:
        with shared_weights(), own_outputs(), defects_avoided(), checked_kernels():
            edge = to_edge_transform_and_lower(
                {name: _with_own_tables(program) for name, program in programs.items()},
                partitioner=partitioners,
                constant_methods=constants,
                compile_config=_any_operator(),
            )
    except MissingOperatorsError:
        check_operators(*map(fuser.fuse, programs.values()))  # the partitioner knows one method only
        raise
    except RuntimeError as error:
        if found := re.search(r"Method (\S+) missing fallback kernels.*?:\n((?:\s+- .*\n?)+)", str(error)):
            kernels = [line.strip(" -") for line in found[2].splitlines()]
            raise MissingOperatorsError(find_operators(fuser.fuse(programs[found[1]]), kernels)) from error
        raise
    for name in programs:
        if functions := missing_functions(edge.exported_program(name)):
            raise MissingOperatorsError(find_operators(fuser.fuse(programs[name]), functions))
    return edge


def _with_own_tables(program: ExportedProgram) -> ExportedProgram:
    """The same program; what lowering drops from its tables of tensors stays in the caller's, for the next target."""
    mine = copy.copy(program)
    mine._state_dict, mine._constants = dict(program.state_dict), dict(program.constants)
    return mine


def _lower_cpu(
    programs: Mapping[str, ExportedProgram], constants: dict[str, Any], fuser: ExpertFuser
) -> ExecutorchProgramManager:
    edge = to_edge_transform_and_lower(
        dict(programs), partitioner=[MoECpuPartitioner(fuser)], constant_methods=constants
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
    """True if a method reshapes a parameter: ExecuTorch 1.5 cannot emit a view without copy of an external weight."""
    view = exir_ops.edge.aten.view_copy.default
    return any(
        node.target is view and isinstance(node.args[0], torch.fx.Node) and node.args[0].op == "placeholder"
        for name in edge.methods
        for node in edge.exported_program(name).graph.nodes
    )


def _mark_state(edge: EdgeProgramManager) -> set[str]:
    """Give every buffer that some method mutates its initial value, in all methods; returns the nodes' names.

    By default ExecuTorch drops the initial value of a mutated buffer. A method that only reads it must also see it as
    state, not as a weight: else it would get a constant copy.
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
