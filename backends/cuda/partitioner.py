"""`MoECudaPartitioner`: ExecuTorch's CUDA partitioner for models with fused experts."""

from __future__ import annotations

from dataclasses import replace

from executorch.backends.aoti.aoti_backend import COMPILE_SPEC_KEYS
from executorch.backends.aoti.aoti_partitioner import AotiPartitioner
from executorch.backends.cuda.cuda_backend import CudaBackend
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.backend.partitioner import DelegationSpec, PartitionResult
from executorch.exir.passes.propagate_device_pass import TARGET_DEVICE_COMPILE_SPEC_KEY
from torch.export.exported_program import ExportedProgram

import executorch_moe.kernels  # noqa: F401  registers torch.ops.executorch_moe
from executorch_moe.backends.cuda.weight_metadata import MUTATED_BUFFERS_KEY


class MoECudaPartitioner(AotiPartitioner):
    """Delegates a program to ExecuTorch's `CudaBackend`, fused experts included; a drop-in for `CudaPartitioner`.

    `torch.ops.executorch_moe.fused_experts` reaches AOTInductor as one node, which opens it and embeds our kernels.
    CudaPartitioner is final, so this derives from its base and gives the same delegate id and compile specs.

    Args:
        compile_spec: compile specs of CudaBackend. `method_name` defaults to "forward" (name each method of a program
            with several: the runtime finds per-method options by it), `target_device` to "cuda:0".
    """

    def __init__(self, compile_spec: list[CompileSpec] | None = None) -> None:
        specs = list(compile_spec or [])
        given = {spec.key for spec in specs}
        if COMPILE_SPEC_KEYS.METHOD_NAME.value not in given:
            specs.append(CudaBackend.generate_method_name_compile_spec("forward"))
        if TARGET_DEVICE_COMPILE_SPEC_KEY not in given:
            specs.append(CompileSpec(TARGET_DEVICE_COMPILE_SPEC_KEY, b"cuda:0"))
        super().__init__(CudaBackend.__name__, specs)

    def partition(self, exported_program: ExportedProgram) -> PartitionResult:
        """Tag the program for CudaBackend and record which buffers it mutates.

        The weight metadata that CudaBackend writes does not say which tensors are state (a KV cache). The delegate host
        needs to know to restore just those; CudaBackend itself ignores compile specs that it does not know.
        """
        result = super().partition(exported_program)
        mutated = sorted(set(exported_program.graph_signature.buffers_to_mutate.values()))
        spec = CompileSpec(MUTATED_BUFFERS_KEY, "\n".join(mutated).encode())
        tags = {tag: _with_spec(delegation, spec) for tag, delegation in result.partition_tags.items()}
        return replace(result, partition_tags=tags)


def _with_spec(delegation: DelegationSpec, spec: CompileSpec) -> DelegationSpec:
    kept = [other for other in delegation.compile_specs if other.key != spec.key]
    return DelegationSpec(delegation.backend_id, [*kept, spec])
