"""Replacements of `target_cuda` in torch, Triton and ExecuTorch: all are checked first, and undone at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from executorch_moe.backends.cuda.overlapped_launches import overlapped_launches, unknown_host_code
from executorch_moe.backends.cuda.patches.registry import (
    CROSS,
    LOCK,
    OUTPUTS,
    VERSIONS,
    WEIGHTS,
    Replace,
    problem,
    problems,
    refusal,
    replacing,
)
from executorch_moe.kernels.gpus import GpuModel

from . import gpu_stand_ins, host_toolchain
from .placeholder_weights import PlaceholderWeights
from .static_choices import StaticChoices

SMALL = 4096
"""Computations of up to this many elements are fused with distant ones in the program: one launch instead of many."""

INDUCTOR_CONFIG = {
    "compile_threads": 1,  # workers are other processes, without the replacements
    # Host code launches kernels and has no loops over elements. To find vector instructions for them, torch would
    # compile and load up to six test programs: about 6 CPU seconds, and flags that depend on this machine.
    "cpp.vec_isa_ok": False,
    "triton.autotune_at_compile_time": True,
    "triton.autotune_with_sample_inputs": False,
    "deterministic": True,
    "always_keep_tensor_constants": True,  # constants have no values while compiling
    "joint_graph_constant_folding": False,  # would compute on the GPU
    "benchmark_epilogue_fusion": False,
    "shape_padding": False,  # times GEMMs of odd sizes with and without padding
    # Bytes that two kernels must share to be fused. Those that write a key and a value share the 8 of the position.
    "score_fusion_memory_threshold": 8,
    "fx_graph_cache": False,
    # A precompiled header is found by the compiler's path, a temporary one here: 144 MB in the cache for each export.
    "aot_inductor.precompile_headers": False,
    "autotune_local_cache": False,
}
_TARGET_CONFIG = ("cpp.cxx", "cuda.arch", "cuda.version")


_CLAIMING = threading.Lock()
"""Held briefly, while a thread becomes the owner or is refused."""

_owner: int | None = None
"""The thread in which `target_cuda` is active."""


def check_versions() -> None:
    """Check that this module supports the installed torch, Triton and ExecuTorch; changes nothing.

    Raises:
        RuntimeError: a version is not supported or a function is not the expected one (the message lists all), or
            `target_cuda` is active.
    """
    with _CLAIMING:
        _check_owner()
    with LOCK:
        _check_originals()


@contextlib.contextmanager
def _claimed() -> Iterator[None]:
    """Context in which other threads cannot enter `target_cuda`, and wait where they replace other functions."""
    global _owner
    with _CLAIMING:
        _check_owner()
        _owner = threading.get_ident()
    try:
        with LOCK:
            _check_originals()
            yield
    finally:
        _owner = None


def _check_owner() -> None:
    if _owner == threading.get_ident():
        raise RuntimeError("target_cuda is active already: leave it first, and enter it once for each GPU")
    if _owner is not None:
        raise RuntimeError(
            "target_cuda is active in another thread, and changes the whole process: wait until that one is done, or "
            "export in another process"
        )


def _check_originals() -> None:
    from importlib import metadata

    from torch._inductor import config

    wrong = []
    for package, accepted in VERSIONS.items():
        version = metadata.version(package)
        if not any(version == known or version.startswith((f"{known}.", f"{known}+")) for known in accepted):
            wrong.append(f"{package} {version} (works with {', '.join(accepted)})")
    wrong = wrong or [found for use in (CROSS, OUTPUTS, WEIGHTS) for found in problems(use)]
    if not wrong:
        keys = config.get_config_copy()
        settings = (*INDUCTOR_CONFIG, *_TARGET_CONFIG)
        wrong = [f"torch._inductor.config.{key}: does not exist" for key in settings if key not in keys]
    if not wrong and (why := unknown_host_code()):
        wrong = [why]
    if wrong:
        raise RuntimeError(refusal(CROSS, wrong))


@contextlib.contextmanager
def replaced(model: GpuModel, choices: StaticChoices, folder: Path) -> Iterator[None]:
    """Context in which torch, Triton and ExecuTorch compile for `model`; everything is restored at the end.

    Args:
        model: the GPU. choices: decides where Inductor would time.
        folder: an empty folder for files that compiling needs and leaves.

    Raises:
        RuntimeError: see `check_versions`.
    """
    with _claimed(), replacing(CROSS) as replace, contextlib.ExitStack() as stack:
        _forget_devices()
        stack.callback(_forget_devices)
        _replace_toolchain(stack, replace, model, folder)
        _replace_device(stack, replace, model)
        _replace_triton(stack, replace, model)
        _remember_accesses(replace)
        _replace_choices(stack, replace, choices)
        _replace_weights(replace, choices)
        stack.enter_context(overlapped_launches(model.capability))
        yield


def _forget_devices() -> None:
    """Clear caches of properties of the device."""
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


def _replace_toolchain(stack: contextlib.ExitStack, replace: Replace, model: GpuModel, folder: Path) -> None:
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
        # Separate caches: the shared ones do not distinguish targets.
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TRITON_DISABLE_LINE_INFO": "1",
        "LIBRARY_PATH": os.pathsep.join(filter(None, (str(home / "lib64"), os.environ.get("LIBRARY_PATH")))),
    }
    stack.enter_context(mock.patch.dict(os.environ, environment))
    replace("torch.utils.cpp_extension:CUDA_HOME", str(home))
    # With this version set, a CUDA build of torch makes fatbins, which need nvcc.
    replace("torch:version.cuda", None)
    stack.enter_context(config.patch(settings))


def _replace_device(stack: contextlib.ExitStack, replace: Replace, model: GpuModel) -> None:
    from torch._dynamo.device_interface import init_device_reg

    init_device_reg()  # before device_count() is replaced, because it registers every device that is counted
    target = gpu_stand_ins.device_interface(model)
    for name, answer in gpu_stand_ins.cuda_functions(model).items():
        replace(f"torch.cuda:{name}", answer)
    replace("torch._dynamo.device_interface:device_interfaces", {"cuda": target, "cuda:0": target})
    if not torch.backends.cuda.is_built():
        guard = host_toolchain.device_guard()
        if guard.install_guard():
            stack.callback(guard.remove_guard)


def _replace_triton(stack: contextlib.ExitStack, replace: Replace, model: GpuModel) -> None:
    import triton
    from triton.compiler import code_generator

    stock_source = code_generator.get_jit_fn_file_line

    def source(fn: Any) -> tuple[str, int]:
        path, line = stock_source(fn)
        # Kernels' assertions contain it: the name of a temporary folder would make every build different.
        return os.path.basename(path), line

    replace("triton.compiler.code_generator:get_jit_fn_file_line", source)
    driver = gpu_stand_ins.triton_driver(model)
    nvidia = dataclasses.replace(triton.backends.backends["nvidia"], driver=driver)
    replace("triton.backends:backends", {"nvidia": nvidia})
    drivers = triton.runtime.driver
    stack.callback(setattr, drivers, "_active", drivers._active)
    drivers.set_active(driver())
    if not hasattr(torch._C, "_cuda_getCurrentRawStream"):  # CPU builds
        replace("torch._C:_cuda_getCurrentRawStream", lambda device: 0)


def _remember_accesses(replace: Replace) -> None:
    """Cache which arguments a kernel writes to, for each kind of arguments. torch asks several times for each launch.

    Each answer costs a compilation to TTIR, and a model launches the same kernel in every layer. If this torch has no
    such function, nothing is changed and the export takes longer.
    """
    from torch._higher_order_ops import triton_kernel_wrap
    from triton.runtime.autotuner import Autotuner

    name = "torch._higher_order_ops.triton_kernel_wrap:identify_accessed_tensors"
    if problem(name):
        return
    stock = triton_kernel_wrap.identify_accessed_tensors
    known: dict[Any, Any] = {}

    def identify(kernel: Any, kwargs: dict[str, Any], tma_descriptor_metadata: Any) -> Any:
        if tma_descriptor_metadata:
            return stock(kernel, kwargs, tma_descriptor_metadata)
        # A launch with `num_warps` makes a new autotuner of one configuration around the kernel.
        tuned = isinstance(kernel, Autotuner)
        settings = kernel.configs[0].kwargs if tuned and kernel.configs else {}
        kinds = tuple(sorted((name, _kind(value)) for name, value in {**kwargs, **settings}.items()))
        key = (kernel.fn if tuned else kernel, kinds)
        if key not in known:
            known[key] = stock(kernel, kwargs, tma_descriptor_metadata)
        return known[key]

    replace(name, identify)


def _kind(value: Any) -> str:
    """The part of an argument that decides a kernel's code: the dtype of a tensor, the value of a number."""
    import sympy
    from torch._inductor.ir import TensorBox

    if isinstance(value, (torch.Tensor, TensorBox)):
        return f"{'box' if isinstance(value, TensorBox) else 'tensor'} {value.dtype}"
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool, sympy.Expr)):
        return "symbol"
    return f"{type(value).__name__} {value!r}"


def _replace_choices(stack: contextlib.ExitStack, replace: Replace, choices: StaticChoices) -> None:
    from torch._inductor import select_algorithm

    def compile_kernels(self: Any) -> None:
        choices.compile_kernels(self)

    block = "torch._inductor.codegen.wrapper:PythonWrapperCodegen.generate_and_run_autotune_block"
    replace(block, compile_kernels)
    far = "torch._inductor.scheduler:Scheduler.are_long_distant_nodes"

    def are_far(self: Any, node1: Any, node2: Any) -> bool:
        # Inductor keeps distant nodes apart to save memory; a few thousand elements need little.
        return bool(stock_far(self, node1, node2)) and not (_is_small(node1) and _is_small(node2))

    stock_far = replace(far, are_far)
    functions = select_algorithm.get_algorithm_selector_cache().preprocessing_fns
    choose = choices.choose_gemm  # one object: each access makes a new bound method
    select_algorithm.add_preprocessing_fn(choose)
    stack.callback(functions.remove, choose)


def _is_small(node: Any) -> bool:
    """True for a computation of Inductor over a known, small number of elements."""
    group: Any = getattr(node, "group", None)
    try:
        sizes = [int(size) for size in group[1]]
    except TypeError:  # no sizes, or symbols
        return False
    return math.prod(sizes) <= SMALL


def _replace_weights(replace: Replace, choices: StaticChoices) -> None:
    from executorch.backends.cuda import cuda_backend
    from torch._inductor import graph
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    weights = PlaceholderWeights(graph.GraphLowering.get_original_value_of_constant, graph.is_same_tensor)

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
        # The constructor lists the constants with their devices, and the library refuses tensors on another device. The
        # bytes from `value` are on the CPU, but at run time the constants are on the GPU.
        nonlocal describing
        describing = True
        try:
            stock_constructor(self)
        finally:
            describing = False

    replace(f"{wrapper}.codegen_device", device)
    stock_constructor = replace(f"{wrapper}.codegen_model_constructor", constructor)
    backend = "executorch.backends.cuda.cuda_backend"
    replace(f"{backend}:CudaBackend.move_program_to_device", classmethod(move))
    replace(f"{backend}:_aoti_device_type_for_weight", lambda tensor: int(cuda_backend.AOTI_DEVICE_TYPE_CUDA))
    replace("torch._inductor.graph:GraphLowering.get_original_value_of_constant", value)
    replace("torch._inductor.graph:is_same_tensor", weights.same)
