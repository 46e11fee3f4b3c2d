"""Modules that were moved or renamed in version 0.2: their old names import the new ones for one version.

The first import of an old name gives a `FutureWarning` that names the new one.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

PACKAGE = "executorch_moe"
MOVED = {
    "backends.aside": "backends.atomic_files",
    "backends.cpu.partitioner": "backends.cpu.cpu_partitioner",
    "backends.cuda.cross_compile": "backends.cuda.cross.target",
    "backends.cuda.cross_report": "backends.cuda.cross.report",
    "backends.cuda.cubin": "backends.artifact.cubin",
    "backends.cuda.delegate_host": "backends.runtime.delegate_host",
    "backends.cuda.gpu_stand_ins": "backends.cuda.cross.gpu_stand_ins",
    "backends.cuda.graph": "backends.runtime.cuda_graph",
    "backends.cuda.host_toolchain": "backends.cuda.cross.host_toolchain",
    "backends.cuda.kernel_configs": "backends.cuda.cross.kernel_configs",
    "backends.cuda.memory": "backends.runtime.gpu_memory",
    "backends.cuda.method_targets": "backends.artifact.method_targets",
    "backends.cuda.own_outputs": "backends.cuda.output_folders",
    "backends.cuda.partitioner": "backends.cuda.cuda_partitioner",
    "backends.cuda.patches.cross": "backends.cuda.cross.replacements",
    "backends.cuda.runtime_symbols": "backends.artifact.runtime_symbols",
    "backends.cuda.static_choices": "backends.cuda.cross.static_choices",
    "backends.cuda.weight_metadata": "backends.artifact.weight_metadata",
    "backends.cuda.weight_stand_ins": "backends.cuda.cross.placeholder_weights",
    "backends.digests": "backends.artifact.digests",
    "backends.elf": "backends.artifact.elf",
    "backends.fusion.partitioner": "backends.fusion.fusing_partitioner",
    "backends.fusion.recognise": "backends.fusion.recognize",
    "backends.inspect": "backends.artifact.inspect",
    "backends.ptd": "backends.artifact.ptd",
    "backends.pte": "backends.artifact.pte",
    "backends.pybindings": "backends.runtime.pybindings",
    "backends.targets": "backends.lower",
    "export.attention": "export.models.attention",
    "export.benchmark": "export.bench.model",
    "export.breakdown": "export.bench.breakdown",
    "export.causal_lm": "export.models.causal_lm",
    "export.decoder_layer": "export.models.decoder_layer",
    "export.dense": "export.quantize.dense",
    "export.dense_torchao": "export.quantize.dense_torchao",
    "export.experts_interface": "export.models.experts_interface",
    "export.files": "backends.atomic_files",
    "export.generation": "export.generate.generator",
    "export.inspection": "export.report.inspection",
    "export.int4_tensors": "export.quantize.int4_tensors",
    "export.kernel_benchmark": "export.bench.kernel",
    "export.kernel_tuning": "export.bench.tune",
    "export.keywords": "export.models.keywords",
    "export.memory": "export.host_memory",
    "export.metadata": "export.report.metadata",
    "export.preflight": "export.check",
    "export.pretrained": "export.models.pretrained",
    "export.rivals": "export.bench.rivals",
    "export.router": "export.models.router",
    "export.sampling": "export.models.sampling",
    "export.shards": "export.checkpoint.shards",
    "export.sizes": "export.checkpoint.sizes",
    "export.streaming": "export.checkpoint.streaming",
    "export.summary": "export.report.summary",
    "export.synthetic": "export.models.synthetic",
    "export.text_stream": "export.generate.text_stream",
    "export.tied_weights": "export.checkpoint.tied_weights",
    "export.upstream_experts": "export.models.upstream_experts",
    "export.work_folder": "export.checkpoint.work_folder",
    "kernels.aten": "kernels.experts.aten",
    "kernels.benchmark": "kernels.measure.timing",
    "kernels.choose": "kernels.tuning.choose",
    "kernels.compile": "kernels.measure.compile",
    "kernels.configs": "kernels.tuning.configs",
    "kernels.elementwise": "kernels.experts.elementwise",
    "kernels.grouped_gemm": "kernels.experts.grouped_gemm",
    "kernels.one_token": "kernels.decode.kernels",
    "kernels.one_token_arguments": "kernels.decode.arguments",
    "kernels.one_token_aten": "kernels.decode.aten",
    "kernels.one_token_launches": "kernels.decode.launches",
    "kernels.one_token_op": "kernels.decode.op",
    "kernels.plan": "kernels.experts.plan",
    "kernels.problem": "kernels.experts.problem",
    "kernels.rounding": "kernels.packing.rounding",
    "kernels.routing": "kernels.experts.routing",
    "kernels.tables": "kernels.tuning.tables",
    "kernels.tune": "kernels.measure.tune",
}
"""Old module -> new module, below `executorch_moe`."""


class _MovedModules(MetaPathFinder, Loader):
    """Finds modules by their names of before; comes after all other finders."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname.removeprefix(f"{PACKAGE}.") in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = f"{PACKAGE}.{MOVED[spec.name.removeprefix(f'{PACKAGE}.')]}"
        warnings.warn(
            f"{spec.name} is now {new}; the old name will be removed in version 0.3", FutureWarning, stacklevel=2
        )
        module = importlib.import_module(new)
        # The import system is about to give the module the spec of its old name.
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        if spec is not None and spec.loader_state is not None:
            module.__spec__ = spec.loader_state


def install() -> None:
    """Makes the old names importable. Calling it again changes nothing."""
    if not any(isinstance(finder, _MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(_MovedModules())
