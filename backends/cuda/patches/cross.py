"""All that `target_cuda` replaces in torch, Triton and ExecuTorch: checked before anything is changed, then undone.

A name is "module:attribute"; with it stand the parameters that it must have, or None for what is no function or where
they do not matter.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from executorch_moe.backends.cuda import gpu_stand_ins, host_toolchain
from executorch_moe.backends.cuda.overlapped_launches import overlapped_launches, unknown_host_code
from executorch_moe.backends.cuda.static_choices import StaticChoices
from executorch_moe.backends.cuda.weight_stand_ins import WeightStandIns
from executorch_moe.kernels.gpus import GpuModel

VERSIONS = {"torch": ("2.11", "2.13"), "triton": ("3.6", "3.7"), "executorch": ("1.5.1",)}
"""Versions with which an export was made and looked into; others are refused."""

SMALL = 4096
"""Elements of a computation that may be done with others far away in the program: one launch instead of many."""

Parameters = tuple[str, ...] | None

REPLACED: dict[str, Parameters] = {
    "torch.cuda:is_available": (),
    "torch.cuda:get_device_properties": ("device",),
    "torch.cuda:get_device_capability": ("device",),
    "torch.cuda:get_device_name": ("device",),
    "torch.cuda:current_device": (),
    "torch.cuda:device_count": (),
    "torch.cuda:is_bf16_supported": ("including_emulation",),
    "torch.cuda:synchronize": ("device",),
    "torch:version.cuda": None,
    "torch.utils.cpp_extension:CUDA_HOME": None,
    "torch._dynamo.device_interface:device_interfaces": None,
    "torch._inductor.codegen.wrapper:PythonWrapperCodegen.generate_and_run_autotune_block": ("self",),
    "torch._inductor.codegen.cpp_wrapper_cpu:CppWrapperCpu.codegen_device": ("self", "device"),
    "torch._inductor.codegen.cpp_wrapper_cpu:CppWrapperCpu.codegen_model_constructor": ("self",),
    "torch._inductor.codegen.cuda.device_op_overrides:CUDADeviceOpOverrides.kernel_driver": ("self",),
    "torch._inductor.graph:GraphLowering.get_original_value_of_constant": ("self", "name"),
    "torch._inductor.graph:is_same_tensor": ("data", "value"),
    "torch._inductor.scheduler:Scheduler.are_long_distant_nodes": ("self", "node1", "node2"),
    "triton.backends:backends": None,
    "triton.compiler.code_generator:get_jit_fn_file_line": ("fn",),
    "executorch.backends.cuda.cuda_backend:CudaBackend.move_program_to_device": (
        "edge_program",
        "device",
        "compile_specs",
    ),
    "executorch.backends.cuda.cuda_backend:_aoti_device_type_for_weight": ("tensor",),
}
"""What is replaced."""

CALLED: dict[str, Parameters] = {
    "torch._dynamo.device_interface:init_device_reg": (),
    "torch._dynamo.device_interface:CudaInterface.get_compute_capability": ("device",),
    "torch._dynamo.device_interface:CudaInterface.is_triton_capable": ("device",),
    "torch._dynamo.device_interface:CudaInterface.raise_if_triton_unavailable": ("device",),
    "torch._dynamo.device_interface:CudaInterface.exchange_device": None,
    "torch._dynamo.device_interface:CudaInterface.maybe_exchange_device": None,
    "torch._dynamo.device_interface:CudaInterface.get_raw_stream": None,
    "torch._dynamo.device_interface:CudaInterface.Worker": None,
    "torch._inductor.select_algorithm:add_preprocessing_fn": ("fn",),
    "torch._inductor.select_algorithm:get_algorithm_selector_cache": (),
    "torch._inductor.select_algorithm:TritonTemplateCaller.info_dict": ("self",),
    "torch._inductor.runtime.triton_heuristics:CachingAutotuner.precompile": None,
    "torch._inductor.runtime.triton_heuristics:CachingAutotuner.save_gpu_kernel": ("self", "stream", "launcher"),
    "torch.export.passes:move_to_device_pass": ("ep", "location"),
    "triton.backends.nvidia.driver:CudaDriver.get_current_target": ("self",),
    "triton.backends.nvidia.driver:CudaDriver.get_active_torch_device": ("self",),
    "triton.backends.nvidia.driver:CudaDriver.is_active": (),
    "triton.compiler.compiler:max_shared_mem": None,
    "triton.runtime.driver:DriverConfig.set_active": ("self", "driver"),
    "executorch.backends.cuda.cuda_backend:AOTI_DEVICE_TYPE_CUDA": None,
    "executorch.backends.cuda.cuda_backend:CudaBackend.method_name_from_compile_specs": ("compile_specs",),
}
"""What the replacements call or stand in for."""

INDUCTOR_CONFIG = {
    "compile_threads": 1,  # workers are other processes, in which nothing is replaced
    "cpp.simdlen": 256,  # AVX2, as in the CPU baseline
    "triton.autotune_at_compile_time": True,
    "triton.autotune_with_sample_inputs": False,
    "deterministic": True,
    "always_keep_tensor_constants": True,  # their values are not there while compiling
    "joint_graph_constant_folding": False,  # would compute on the device
    "benchmark_epilogue_fusion": False,
    "shape_padding": False,  # times GEMMs of odd sizes with and without padding
    # Bytes that two kernels must have in common to become one: where a key and a value are written, the position's 8.
    "score_fusion_memory_threshold": 8,
    "fx_graph_cache": False,
    "autotune_local_cache": False,
}
_TARGET_CONFIG = ("cpp.cxx", "cuda.arch", "cuda.version")


_CLAIMING = threading.Lock()
"""Held for as long as somebody checks what is there, so that nothing is replaced meanwhile."""

_owner: int | None = None
"""The thread that has replaced functions now."""


def check_versions() -> None:
    """Check that torch, Triton and ExecuTorch are what this module was made for; changes nothing.

    Raises:
        RuntimeError: another version, or a function that is not as expected; the message names all of them. Or they
            are replaced now.
    """
    with _CLAIMING:
        _check_originals()


@contextlib.contextmanager
def _claimed() -> Iterator[None]:
    """Within it, nobody else replaces anything: two that did would put back each other's functions."""
    global _owner
    with _CLAIMING:
        _check_originals()
        _owner = threading.get_ident()
    try:
        yield
    finally:
        _owner = None


def _check_originals() -> None:
    from importlib import metadata

    if _owner == threading.get_ident():
        raise RuntimeError("target_cuda is active already: leave it first, and enter it once for each GPU")
    if _owner is not None:
        raise RuntimeError(
            "target_cuda is active in another thread, and changes the whole process: wait until that one is done, or "
            "export in another process"
        )
    wrong = []
    for package, accepted in VERSIONS.items():
        version = metadata.version(package)
        if not any(version == known or version.startswith((f"{known}.", f"{known}+")) for known in accepted):
            wrong.append(f"{package} {version} (works with {', '.join(accepted)})")
    if wrong := wrong or _problems():
        raise RuntimeError(
            f"cannot export for a GPU that is not here with {'; '.join(wrong)}: install a version that works, "
            "or export on a machine with that GPU, with target 'cuda'"
        )


@contextlib.contextmanager
def replaced(model: GpuModel, choices: StaticChoices, folder: Path) -> Iterator[None]:
    """Within it, torch, Triton and ExecuTorch compile for `model`; everything is put back at the end.

    Args:
        model: the GPU. choices: what decides instead of timing.
        folder: an empty one for what compiling needs and leaves.

    Raises:
        RuntimeError: see `check_versions`.
    """
    with _claimed(), contextlib.ExitStack() as stack:
        _forget_devices()
        stack.callback(_forget_devices)
        _replace_toolchain(stack, model, folder)
        _replace_device(stack, model, folder)
        _replace_triton(stack, model)
        _remember_accesses(stack)
        _replace_choices(stack, choices)
        _replace_weights(stack, choices)
        stack.enter_context(overlapped_launches(model.capability))
        yield


def _problems() -> list[str]:
    from torch._inductor import config

    found = [problem for entry in {**REPLACED, **CALLED}.items() if (problem := _problem(*entry))]
    keys = config.get_config_copy()
    unknown = [
        f"torch._inductor.config.{key}: is not there" for key in (*INDUCTOR_CONFIG, *_TARGET_CONFIG) if key not in keys
    ]
    if problems := found + unknown:
        return problems
    return [problem] if (problem := unknown_host_code()) else []


def _problem(name: str, parameters: Parameters) -> str:
    try:
        holder, attribute = _holder(name)
        found: Any = getattr(holder, attribute)
        actual = parameters if parameters is None else tuple(inspect.signature(found).parameters)
    except (ImportError, AttributeError, ValueError) as error:
        return f"{name.replace(':', '.')}: {error}"
    if actual == parameters:
        return ""
    return f"{name.replace(':', '.')}({', '.join(actual or ())}), not ({', '.join(parameters or ())})"


def _holder(name: str) -> tuple[Any, str]:
    """What has the attribute, and the attribute's name."""
    module, _, path = name.partition(":")
    holder: Any = importlib.import_module(module)
    *outer, attribute = path.split(".")
    for part in outer:
        holder = getattr(holder, part)
    return holder, attribute


def _replace(stack: contextlib.ExitStack, name: str, new: Any) -> Any:
    """Replace one of `REPLACED`; dictionaries are updated in place. Returns what was there."""
    assert name in REPLACED, f"{name} is not checked"
    holder, attribute = _holder(name)
    stock = getattr(holder, attribute)
    change = mock.patch.dict(stock, new) if isinstance(stock, dict) else mock.patch.object(holder, attribute, new)
    stack.enter_context(change)
    return stock


def _forget_devices() -> None:
    """Empty the caches that hold an answer about the device."""
    import torch.utils._triton
    import triton.compiler.compiler
    from torch._inductor import cpp_builder, cpu_vec_isa, utils
    from torch._inductor.codegen.cuda import cuda_env
    from torch._inductor.runtime.hints import DeviceProperties

    for module in (torch.utils._triton, triton.compiler.compiler, utils, cuda_env, cpp_builder, cpu_vec_isa):
        for function in list(vars(module).values()):
            if callable(function) and hasattr(function, "cache_clear"):
                function.cache_clear()
    DeviceProperties.create.cache_clear()


def _replace_toolchain(stack: contextlib.ExitStack, model: GpuModel, folder: Path) -> None:
    from torch._inductor import config

    home = host_toolchain.make_cuda_home(folder)
    settings: dict[str, Any] = {
        **INDUCTOR_CONFIG,
        "cpp.cxx": (None, str(host_toolchain.make_compiler(folder))),
        "cuda.arch": str(model.capability),
        "cuda.version": "13.0",
    }
    environment = {
        "CUDA_HOME": str(home),
        "CUDA_PATH": str(home),
        "TORCH_CUDA_ARCH_LIST": f"{model.capability // 10}.{model.capability % 10}",
        # Of its own: other caches know nothing of the target.
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TRITON_DISABLE_LINE_INFO": "1",
        "LIBRARY_PATH": os.pathsep.join(filter(None, (str(home / "lib64"), os.environ.get("LIBRARY_PATH")))),
    }
    stack.enter_context(mock.patch.dict(os.environ, environment))
    _replace(stack, "torch.utils.cpp_extension:CUDA_HOME", str(home))
    # A CUDA build of torch asks for fatbins, which need nvcc.
    _replace(stack, "torch:version.cuda", None)
    stack.enter_context(config.patch(settings))


def _replace_device(stack: contextlib.ExitStack, model: GpuModel, folder: Path) -> None:
    from torch._dynamo.device_interface import init_device_reg

    init_device_reg()  # before device_count() is replaced: it registers every device that it counts
    target = gpu_stand_ins.device_interface(model)
    for name, answer in gpu_stand_ins.cuda_functions(model).items():
        _replace(stack, f"torch.cuda:{name}", answer)
    _replace(stack, "torch._dynamo.device_interface:device_interfaces", {"cuda": target, "cuda:0": target})
    if not torch.backends.cuda.is_built():
        guard = host_toolchain.build_guard(folder)
        if guard.install_guard():
            stack.callback(guard.remove_guard)


def _replace_triton(stack: contextlib.ExitStack, model: GpuModel) -> None:
    import triton
    from triton.compiler import code_generator

    stock_source = code_generator.get_jit_fn_file_line

    def source(fn: Any) -> tuple[str, int]:
        path, line = stock_source(fn)
        # It ends up in kernels' assertions: a temporary folder's name would make every build different.
        return os.path.basename(path), line

    _replace(stack, "triton.compiler.code_generator:get_jit_fn_file_line", source)
    driver = gpu_stand_ins.triton_driver(model)
    nvidia = dataclasses.replace(triton.backends.backends["nvidia"], driver=driver)
    _replace(stack, "triton.backends:backends", {"nvidia": nvidia})
    drivers = triton.runtime.driver
    stack.callback(setattr, drivers, "_active", drivers._active)
    drivers.set_active(driver())
    if not hasattr(torch._C, "_cuda_getCurrentRawStream"):  # CPU builds
        stack.enter_context(mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, create=True))


def _remember_accesses(stack: contextlib.ExitStack) -> None:
    """Which arguments a kernel writes to is asked at each of its launches, several times; answer once for each kind.

    The answer costs a compilation to TTIR, and a model launches the same kernel in every layer. Where this torch has no
    such function, nothing is changed.
    """
    from torch._higher_order_ops import triton_kernel_wrap
    from triton.runtime.autotuner import Autotuner

    stock = getattr(triton_kernel_wrap, "identify_accessed_tensors", None)
    if stock is None or tuple(inspect.signature(stock).parameters) != ("kernel", "kwargs", "tma_descriptor_metadata"):
        return
    known: dict[Any, Any] = {}

    def identify(kernel: Any, kwargs: dict[str, Any], tma_descriptor_metadata: Any) -> Any:
        if tma_descriptor_metadata:
            return stock(kernel, kwargs, tma_descriptor_metadata)
        # A launch with `num_warps` makes a new autotuner of one configuration; the kernel is what it holds.
        tuned = isinstance(kernel, Autotuner)
        settings = kernel.configs[0].kwargs if tuned and kernel.configs else {}
        kinds = tuple(sorted((name, _kind(value)) for name, value in {**kwargs, **settings}.items()))
        key = (kernel.fn if tuned else kernel, kinds)
        if key not in known:
            known[key] = stock(kernel, kwargs, tma_descriptor_metadata)
        return known[key]

    stack.enter_context(mock.patch.object(triton_kernel_wrap, "identify_accessed_tensors", identify))


def _kind(value: Any) -> str:
    """What of an argument decides the code of a kernel: a tensor's dtype, a number's value, not that of a symbol."""
    import sympy
    from torch._inductor.ir import TensorBox

    if isinstance(value, (torch.Tensor, TensorBox)):
        return f"{'box' if isinstance(value, TensorBox) else 'tensor'} {value.dtype}"
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool, sympy.Expr)):
        return "symbol"
    return f"{type(value).__name__} {value!r}"


def _replace_choices(stack: contextlib.ExitStack, choices: StaticChoices) -> None:
    from torch._inductor import select_algorithm

    def compile_kernels(self: Any) -> None:
        choices.compile_kernels(self)

    block = "torch._inductor.codegen.wrapper:PythonWrapperCodegen.generate_and_run_autotune_block"
    _replace(stack, block, compile_kernels)
    far = "torch._inductor.scheduler:Scheduler.are_long_distant_nodes"

    def are_far(self: Any, node1: Any, node2: Any) -> bool:
        # Inductor fears for memory, which a few thousand elements do not take.
        return bool(stock_far(self, node1, node2)) and not (_is_small(node1) and _is_small(node2))

    stock_far = _replace(stack, far, are_far)
    functions = select_algorithm.get_algorithm_selector_cache().preprocessing_fns
    choose = choices.choose_gemm  # one object: a bound method is made anew at each access
    select_algorithm.add_preprocessing_fn(choose)
    stack.callback(functions.remove, choose)


def _is_small(node: Any) -> bool:
    """Whether one of Inductor's computations runs over few elements, and it is known how many."""
    group: Any = getattr(node, "group", None)
    try:
        sizes = [int(size) for size in group[1]]
    except TypeError:  # no sizes, or symbols
        return False
    return math.prod(sizes) <= SMALL


def _replace_weights(stack: contextlib.ExitStack, choices: StaticChoices) -> None:
    from executorch.backends.cuda import cuda_backend
    from torch._inductor import graph
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    weights = WeightStandIns(graph.GraphLowering.get_original_value_of_constant, graph.is_same_tensor)

    def move(cls: Any, edge_program: Any, device: str, compile_specs: Any) -> Any:
        choices.method = cls.method_name_from_compile_specs(compile_specs)
        return weights.move(edge_program, device)

    def value(self: Any, name: str) -> torch.Tensor:
        return weights.value(self, name)

    wrapper = "torch._inductor.codegen.cpp_wrapper_cpu:CppWrapperCpu"
    stock_device, describing = CppWrapperCpu.codegen_device, False

    def device(self: Any, where: torch.device) -> str:
        return str(stock_device(self, torch.device(self.device) if describing else where))

    def constructor(self: Any) -> None:
        # It lists the constants with their devices, and the library accepts no tensor from another one. The bytes that
        # `value` gives are on the CPU; where they come to lie is the target.
        nonlocal describing
        describing = True
        try:
            stock_constructor(self)
        finally:
            describing = False

    _replace(stack, f"{wrapper}.codegen_device", device)
    stock_constructor = _replace(stack, f"{wrapper}.codegen_model_constructor", constructor)
    backend = "executorch.backends.cuda.cuda_backend"
    _replace(stack, f"{backend}:CudaBackend.move_program_to_device", classmethod(move))
    _replace(stack, f"{backend}:_aoti_device_type_for_weight", lambda tensor: int(cuda_backend.AOTI_DEVICE_TYPE_CUDA))
    _replace(stack, "torch._inductor.graph:GraphLowering.get_original_value_of_constant", value)
    _replace(stack, "torch._inductor.graph:is_same_tensor", weights.same)
