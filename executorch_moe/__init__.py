"""Fused Mixture-of-Experts operators for ExecuTorch's CUDA backend.

Quantize the experts of a Hugging Face model, lower it with one partitioner, save and run it:

    import torch, executorch_moe as moe
    from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.bfloat16)
    model.config.use_cache = False
    moe.quantize_experts_(model, scheme="w4a16", group_size=32)
    program = torch.export.export(model, (torch.zeros(1, 16, dtype=torch.int64),))
    edge = to_edge_transform_and_lower(program, partitioner=[moe.MoECudaPartitioner()])
    moe.save(edge.to_executorch(ExecutorchBackendConfig(external_constants=True)), "model.pte")
    logits = moe.load("model.pte").run("forward", torch.zeros(1, 16, dtype=torch.int64))

`export_model(ExportOptions(...))` does all of this for a language model with a KV cache, as the command
`executorch-moe export` does. docs/api.md describes every name; what is not listed there may change.

Names are imported when they are first used, so that `import executorch_moe` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from executorch_moe import _moved

if TYPE_CHECKING:
    from executorch_moe.backends.artifact import save
    from executorch_moe.backends.cpu import MoECpuPartitioner
    from executorch_moe.backends.cuda import MoECudaPartitioner
    from executorch_moe.backends.cuda.cross.target import target_cuda
    from executorch_moe.backends.fusion import FusionOptions
    from executorch_moe.backends.lower import lower
    from executorch_moe.backends.runtime import load
    from executorch_moe.export.models.delta_rule import any_length
    from executorch_moe.export.options import Context, Dense, Experts, ExportOptions, Target
    from executorch_moe.export.pipeline import export_model
    from executorch_moe.export.quantize import quantize_experts_
    from executorch_moe.kernels import FusedExperts

__all__ = [
    "Context",
    "Dense",
    "Experts",
    "ExportOptions",
    "FusedExperts",
    "FusionOptions",
    "MoECpuPartitioner",
    "MoECudaPartitioner",
    "Target",
    "__version__",
    "any_length",
    "export_model",
    "load",
    "lower",
    "quantize_experts_",
    "save",
    "target_cuda",
]

_HOMES = {
    "Context": "export.options",
    "Dense": "export.options",
    "Experts": "export.options",
    "ExportOptions": "export.options",
    "FusedExperts": "kernels",
    "FusionOptions": "backends.fusion",
    "MoECpuPartitioner": "backends.cpu",
    "MoECudaPartitioner": "backends.cuda",
    "Target": "export.options",
    "any_length": "export.models.delta_rule",
    "export_model": "export.pipeline",
    "load": "backends.runtime",
    "lower": "backends.lower",
    "quantize_experts_": "export.quantize",
    "save": "backends.artifact",
    "target_cuda": "backends.cuda.cross.target",
}
"""Public name -> module that defines it, below `executorch_moe`."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("executorch-moe")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}: public names are {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_moved.install()
