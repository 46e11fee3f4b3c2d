"""Registry of everything that this package patches in other packages while exporting, and of their internals it calls.

An entry's name is "module:attribute". Each entry has the parameters that a function must have, and what to do if it has
others (`overlapped_launches` also checks a text). All of it was tested with the `VERSIONS`. Nothing is patched without
an entry here and `replacing`. It holds one lock for the process, so that threads cannot use or undo each other's
patches.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

VERSIONS = {"torch": ("2.11", "2.13"), "triton": ("3.6", "3.7"), "executorch": ("1.5.1",)}
"""Versions with which exports were tested. `target_cuda` refuses others."""

Parameters = tuple[str, ...] | None
"""Names of a function's parameters; None for values, and for functions whose parameters do not matter."""

REFUSE, GO_WITHOUT = "refuse", "go without"


@dataclass(frozen=True)
class Use:
    """The purpose of a group of patches, for messages.

    Attributes:
        cannot: what an export cannot do without them. remedy: what the user can do.
    """

    cannot: str
    remedy: str


CROSS, OUTPUTS, WEIGHTS, LAUNCHES, STORAGES, CPU = "cross", "outputs", "weights", "launches", "storages", "cpu"
KERNELS, HISTORY = "kernels", "history"
USES = {
    CROSS: Use(
        "export for a GPU that is not in this machine",
        "install a version that works, or export on a machine with that GPU, with target 'cuda'",
    ),
    OUTPUTS: Use("give each CUDA method files of its own", "install executorch 1.5.1"),
    WEIGHTS: Use("share weights between CUDA methods", "install executorch 1.5.1"),
    LAUNCHES: Use("let launches overlap", "install torch 2.11 to 2.13"),
    KERNELS: Use("check the kernels that torch generates", "install torch 2.11 to 2.13"),
    STORAGES: Use("write the weights of CUDA methods", "install executorch 1.5.1"),
    CPU: Use("export for target 'cpu'", "install executorch 1.5.1"),
    HISTORY: Use("let nodes share the records of their origin", "install torch 2.11 to 2.13"),
}


@dataclass(frozen=True)
class Patch:
    """One function or value of another package.

    Attributes:
        use: key of `USES`. parameters: see `Parameters`.
        otherwise: what to do if the function differs. REFUSE: do not export. GO_WITHOUT: export without the patch.
        replaced: False for functions that this package calls or that its stand-ins mimic.
        optional: it may be missing; the patch then adds it.
    """

    use: str
    parameters: Parameters = None
    otherwise: str = REFUSE
    replaced: bool = True
    optional: bool = False


def _called(parameters: Parameters = None) -> Patch:
    return Patch(CROSS, parameters, replaced=False)


_INTERFACE = "torch._dynamo.device_interface"
_INDUCTOR = "torch._inductor"
_CPP = f"{_INDUCTOR}.codegen.cpp_wrapper_cpu:CppWrapperCpu"
_BACKEND = "executorch.backends.cuda.cuda_backend"
_COLLECTOR = "executorch.backends.cuda.cuda_weight_collector"
_EMITTER = "executorch.exir.emit._emitter:_Emitter"

PATCHES: dict[str, Patch] = {
    # target_cuda: properties of the GPU
    "torch.cuda:is_available": Patch(CROSS, ()),
    "torch.cuda:get_device_properties": Patch(CROSS, ("device",)),
    "torch.cuda:get_device_capability": Patch(CROSS, ("device",)),
    "torch.cuda:get_device_name": Patch(CROSS, ("device",)),
    "torch.cuda:current_device": Patch(CROSS, ()),
    "torch.cuda:device_count": Patch(CROSS, ()),
    "torch.cuda:is_bf16_supported": Patch(CROSS, ("including_emulation",)),
    "torch.cuda:synchronize": Patch(CROSS, ("device",)),
    "torch._C:_cuda_getCurrentRawStream": Patch(CROSS, optional=True),  # CPU builds lack it
    "torch:version.cuda": Patch(CROSS),
    "torch.utils.cpp_extension:CUDA_HOME": Patch(CROSS),
    f"{_INTERFACE}:device_interfaces": Patch(CROSS),
    # target_cuda: choices without timing
    f"{_INDUCTOR}.codegen.wrapper:PythonWrapperCodegen.generate_and_run_autotune_block": Patch(CROSS, ("self",)),
    f"{_INDUCTOR}.scheduler:Scheduler.are_long_distant_nodes": Patch(CROSS, ("self", "node1", "node2")),
    f"{_INDUCTOR}.runtime.triton_heuristics:CachingAutotuner.precompile": Patch(CROSS),
    "ast:parse": Patch(CROSS),
    # Caches results; without it an export takes longer.
    "torch._higher_order_ops.triton_kernel_wrap:identify_accessed_tensors": Patch(
        CROSS, ("kernel", "kwargs", "tma_descriptor_metadata"), GO_WITHOUT
    ),
    # target_cuda: weights without bytes on the GPU
    f"{_CPP}.codegen_device": Patch(CROSS, ("self", "device")),
    f"{_CPP}.codegen_model_constructor": Patch(CROSS, ("self",)),
    f"{_INDUCTOR}.graph:GraphLowering.get_original_value_of_constant": Patch(CROSS, ("self", "name")),
    f"{_INDUCTOR}.graph:is_same_tensor": Patch(CROSS, ("data", "value")),
    f"{_BACKEND}:CudaBackend.move_program_to_device": Patch(CROSS, ("edge_program", "device", "compile_specs")),
    f"{_BACKEND}:_aoti_device_type_for_weight": Patch(CROSS, ("tensor",)),
    # target_cuda: Triton compiles for the target
    "triton.backends:backends": Patch(CROSS),
    "triton.compiler.code_generator:get_jit_fn_file_line": Patch(CROSS, ("fn",)),
    # target_cuda: functions that the replacements call or mimic
    f"{_INTERFACE}:init_device_reg": _called(()),
    f"{_INTERFACE}:CudaInterface.get_compute_capability": _called(("device",)),
    f"{_INTERFACE}:CudaInterface.is_triton_capable": _called(("device",)),
    f"{_INTERFACE}:CudaInterface.raise_if_triton_unavailable": _called(("device",)),
    f"{_INTERFACE}:CudaInterface.exchange_device": _called(),
    f"{_INTERFACE}:CudaInterface.maybe_exchange_device": _called(),
    f"{_INTERFACE}:CudaInterface.get_raw_stream": _called(),
    f"{_INTERFACE}:CudaInterface.Worker": _called(),
    f"{_INDUCTOR}.select_algorithm:add_preprocessing_fn": _called(("fn",)),
    f"{_INDUCTOR}.select_algorithm:get_algorithm_selector_cache": _called(()),
    f"{_INDUCTOR}.select_algorithm:TritonTemplateCaller.info_dict": _called(("self",)),
    f"{_INDUCTOR}.runtime.triton_heuristics:CachingAutotuner.save_gpu_kernel": _called(("self", "stream", "launcher")),
    "torch.export.passes:move_to_device_pass": _called(("ep", "location")),
    "triton.backends.nvidia.driver:CudaDriver.get_current_target": _called(("self",)),
    "triton.backends.nvidia.driver:CudaDriver.get_active_torch_device": _called(("self",)),
    "triton.backends.nvidia.driver:CudaDriver.is_active": _called(()),
    "triton.compiler.compiler:max_shared_mem": _called(),
    "triton.runtime.driver:DriverConfig.set_active": _called(("self", "driver")),
    "triton.runtime:driver._active": _called(),
    f"{_BACKEND}:AOTI_DEVICE_TYPE_CUDA": _called(),
    f"{_BACKEND}:CudaBackend.method_name_from_compile_specs": _called(("compile_specs",)),
    # Every target. An export takes a tenth longer without it.
    "torch.fx.traceback:NodeSource.__deepcopy__": Patch(HISTORY, otherwise=GO_WITHOUT, optional=True),
    # Every CUDA target
    f"{_INDUCTOR}.codegen.cuda.device_op_overrides:CUDADeviceOpOverrides.kernel_driver": Patch(
        LAUNCHES, ("self",), GO_WITHOUT
    ),
    f"{_INDUCTOR}.codegen.triton:TritonScheduling.define_kernel": Patch(
        KERNELS, ("self", "src_code", "node_schedule", "kernel")
    ),
    f"{_BACKEND}:CudaBackend.get_aoti_compile_options": Patch(OUTPUTS, ("compile_specs",)),
    f"{_BACKEND}:CudaBackend.copy_exported_program_for_preprocess": Patch(WEIGHTS, ("edge_program", "compile_specs")),
    f"{_COLLECTOR}:_is_aoti_library_local_fqn": Patch(WEIGHTS, ("fqn",)),
    f"{_COLLECTOR}:_write_tensor_storage": Patch(STORAGES, ("tensor", "path")),
    # Target "cpu"
    f"{_EMITTER}._tensor_spec_to_evalue": Patch(CPU, ("self", "spec", "constant_tag")),
    f"{_EMITTER}._save_new_const_tensor": Patch(
        CPU, ("self", "spec", "buffer_data", "hashed", "allocation_info", "constant_tag"), replaced=False
    ),
    f"{_EMITTER}._save_to_external_constant_map": Patch(
        CPU, ("self", "fqn", "buffer_idx", "constant_tag"), replaced=False
    ),
}

LOCK = threading.RLock()
"""Held while patches are active, and while functions are checked."""

_entered: list[str] = []
"""Uses that the thread with the lock has entered, with repetitions."""

Replace = Callable[[str, Any], Any]
"""replace(name, new) -> the original; dictionaries are updated in place."""


def problem(name: str) -> str:
    """Empty if the function of an entry has the expected parameters, else the difference."""
    patch = PATCHES[name]
    try:
        holder, attribute = holder_of(name)
        found: Any = getattr(holder, attribute)
        actual = patch.parameters if patch.parameters is None else tuple(inspect.signature(found).parameters)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        return "" if patch.optional else f"{name.replace(':', '.')}: {error}"
    if actual == patch.parameters:
        return ""
    return f"{name.replace(':', '.')}({', '.join(actual or ())}), not ({', '.join(patch.parameters or ())})"


def problems(use: str) -> list[str]:
    """Differences in the functions of a use for which the export must be refused."""
    entries = (name for name, patch in PATCHES.items() if patch.use == use and patch.otherwise == REFUSE)
    return [found for name in entries if (found := problem(name))]


@contextlib.contextmanager
def replacing(use: str) -> Iterator[Replace]:
    """Context in which only this thread replaces functions of other packages; the originals are restored at the end.

    Other threads that enter wait until then. One thread can nest several of these contexts.

    Args:
        use: key of `USES`; only its entries can be replaced.

    Yields:
        replace(name, new), for entries of this use.

    Raises:
        RuntimeError: a function is not the expected one; nothing was replaced.
    """
    with LOCK, contextlib.ExitStack() as stack:
        if use not in _entered and (wrong := problems(use)):
            raise RuntimeError(refusal(use, wrong))
        _entered.append(use)
        stack.callback(_entered.remove, use)

        def replace(name: str, new: Any) -> Any:
            patch = PATCHES.get(name)
            assert patch is not None and patch.use == use and patch.replaced, f"{name} is not checked"
            holder, attribute = holder_of(name)
            stock = getattr(holder, attribute, None)
            if isinstance(stock, dict):
                stack.enter_context(mock.patch.dict(stock, new))
            else:
                stack.enter_context(mock.patch.object(holder, attribute, new, create=patch.optional))
            return stock

        yield replace


def refusal(use: str, wrong: list[str]) -> str:
    """Message for a refused use: the reason and the remedy."""
    return f"cannot {USES[use].cannot} with {'; '.join(wrong)}: {USES[use].remedy}"


def holder_of(name: str) -> tuple[Any, str]:
    """The object and the attribute name of an entry's name."""
    module, _, path = name.partition(":")
    holder: Any = importlib.import_module(module)
    *outer, attribute = path.split(".")
    for part in outer:
        holder = getattr(holder, part)
    return holder, attribute
