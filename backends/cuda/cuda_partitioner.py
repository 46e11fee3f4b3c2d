"""`MoECudaPartitioner`: ExecuTorch's CUDA partitioner for models with fused experts."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from executorch.backends.aoti.aoti_backend import COMPILE_SPEC_KEYS
from executorch.backends.aoti.aoti_partitioner import AotiPartitioner
from executorch.backends.cuda.cuda_backend import CudaBackend
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.backend.partitioner import DelegationSpec, PartitionResult
from executorch.exir.passes.propagate_device_pass import TARGET_DEVICE_COMPILE_SPEC_KEY
from torch.export.exported_program import ExportedProgram
from torch.export.graph_signature import InputKind

import executorch_moe.kernels  # noqa: F401  registers torch.ops.executorch_moe
from executorch_moe.backends.artifact.weight_metadata import MUTATED_BUFFERS_KEY
from executorch_moe.backends.fusion import ExpertFuser, FusingPartitioner, FusionOptions

from .missing_operators import check_operators
from .torch_defects import avoid_defects

# torch._inductor.graph.GraphLowering.can_inline_constant
_INLINED_ELEMENTS = 8


class MoECudaPartitioner(FusingPartitioner, AotiPartitioner):
    """Delegates a program with fused experts to ExecuTorch's `CudaBackend`; a drop-in for `CudaPartitioner`.

    The expert layers of a program, also of unmodified transformers models, become `fused_experts` nodes on packed
    weights. AOTInductor gets each of them as one node, from which it compiles our kernels.
    CudaPartitioner is final, so this class derives from its base and has the same delegate id and compile specs.

    Partitioning disables, for the process, settings of Inductor that compile wrong programs (`torch_defects`).

    Args:
        compile_spec: compile specs of CudaBackend. `method_name` defaults to "forward" (name each method of a program
            with several: the runtime finds per-method options by it), `target_device` to "cuda:0".
        fusion: scheme and group size (None: w4a16, 32), or the `ExpertFuser` that all methods of a program share.

    Raises:
        TypeError: `compile_spec` is not a list of CompileSpec, for example the fusion options.
    """

    def __init__(
        self, compile_spec: list[CompileSpec] | None = None, fusion: FusionOptions | ExpertFuser | None = None
    ) -> None:
        specs = _listed(compile_spec)
        given = {spec.key for spec in specs}
        if COMPILE_SPEC_KEYS.METHOD_NAME.value not in given:
            specs.append(CudaBackend.generate_method_name_compile_spec("forward"))
        if TARGET_DEVICE_COMPILE_SPEC_KEY not in given:
            specs.append(CompileSpec(TARGET_DEVICE_COMPILE_SPEC_KEY, b"cuda:0"))
        super().__init__(CudaBackend.__name__, specs)
        self.set_fusion(fusion)

    def transform_for_pre_decomposition(self, exported_program: ExportedProgram) -> ExportedProgram:
        """Fuse the experts, then check that ExecuTorch's CUDA runtime supports all other operators.

        Raises:
            NotImplementedError: experts cannot be fused (with `require_fused`), or the runtime lacks operators
                (`MissingOperatorsError`).
        """
        fused = self.fuse_experts(exported_program)
        check_operators(fused)
        return fused

    def ops_to_not_decompose(
        self, ep: ExportedProgram
    ) -> tuple[list[torch._ops.OpOverload], Callable[[torch.fx.Node], bool] | None]:
        """All operators of the program but `split`: ExecuTorch's verifier refuses to keep it, because it is a view."""
        kept, supported = super().ops_to_not_decompose(ep)
        return [op for op in kept if op is not torch.ops.aten.split.Tensor], supported

    def partition(self, exported_program: ExportedProgram) -> PartitionResult:
        """Tag the program for CudaBackend and record which buffers it mutates.

        The weight metadata of CudaBackend does not say which tensors are state (a KV cache), and the delegate host
        restores only those. CudaBackend ignores unknown compile specs.

        Raises:
            NotImplementedError: a mutated buffer is so small that Inductor would compile its initial value in.
        """
        mutated = sorted(set(exported_program.graph_signature.buffers_to_mutate.values()))
        check_state(exported_program, mutated)
        avoid_defects()  # the delegate is compiled after this returns
        result = super().partition(exported_program)
        spec = CompileSpec(MUTATED_BUFFERS_KEY, "\n".join(mutated).encode())
        tags = {tag: _with_spec(delegation, spec) for tag, delegation in result.partition_tags.items()}
        return replace(result, partition_tags=tags)


def check_state(exported_program: ExportedProgram, mutated: Collection[str]) -> None:
    """Check that no state of a program is so small that AOTInductor compiles it in as a constant.

    A method would always read the initial value of such a buffer, without any error. torch 2.13 inlines 1-D tensors of
    up to 8 elements and folds single elements of any rank.

    Args:
        exported_program: the program.
        mutated: names of buffers that this or another method of the same file writes to.

    Raises:
        NotImplementedError: a mutated buffer would be compiled in.
    """
    for spec in exported_program.graph_signature.input_specs:
        if spec.kind != InputKind.BUFFER or spec.target not in mutated:
            continue
        buffer = exported_program.state_dict.get(spec.target, exported_program.constants.get(spec.target))
        if not isinstance(buffer, torch.Tensor):
            continue
        if buffer.numel() == 1 or (buffer.dim() == 1 and buffer.numel() <= _INLINED_ELEMENTS):
            raise NotImplementedError(
                f"mutated buffer {spec.target!r} has shape {list(buffer.shape)}: AOTInductor would compile its initial "
                f"value in. Give it more than {_INLINED_ELEMENTS} elements, or pass it to the method as an input"
            )


def _listed(compile_spec: Any) -> list[CompileSpec]:
    if compile_spec is None:
        return []
    if not isinstance(compile_spec, list | tuple) or not all(isinstance(spec, CompileSpec) for spec in compile_spec):
        raise TypeError(
            f"compile_spec is a {type(compile_spec).__name__}, expected a list of CompileSpec: pass fusion options by "
            "name, as in MoECudaPartitioner(fusion=FusionOptions('w4a16'))"
        )
    return list(compile_spec)


def _with_spec(delegation: DelegationSpec, spec: CompileSpec) -> DelegationSpec:
    kept = [other for other in delegation.compile_specs if other.key != spec.key]
    return DelegationSpec(delegation.backend_id, [*kept, spec])
