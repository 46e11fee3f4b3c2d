"""`target_cuda`: lower for an NVIDIA GPU that is not here, with a CPU or a CUDA build of torch."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import inspect
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from executorch_moe.backends.cuda import host_toolchain
from executorch_moe.kernels.gpus import GpuModel, compile_for, find_model

VERSIONS = {"torch": ("2.11", "2.13"), "triton": ("3.6", "3.7"), "executorch": ("1.5.1",)}
"""Versions with which an export was made and looked into; others are refused."""

# Everything that is replaced or called in other packages: (module, name, parameters). Checked before any change.
_SIGNATURES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("torch.cuda", "get_device_properties", ("device",)),
    ("torch.cuda", "get_device_capability", ("device",)),
    ("torch.cuda", "get_device_name", ("device",)),
    ("torch.cuda", "current_device", ()),
    ("torch.cuda", "device_count", ()),
    ("torch.cuda", "is_bf16_supported", ("including_emulation",)),
    ("torch.cuda", "synchronize", ("device",)),
    ("torch._dynamo.device_interface", "init_device_reg", ()),
    ("torch._dynamo.device_interface", "CudaInterface.get_compute_capability", ("device",)),
    ("torch._dynamo.device_interface", "CudaInterface.is_triton_capable", ("device",)),
    ("torch._dynamo.device_interface", "CudaInterface.raise_if_triton_unavailable", ("device",)),
    ("torch._inductor.codegen.wrapper", "PythonWrapperCodegen.generate_and_run_autotune_block", ("self",)),
    ("torch._inductor.graph", "GraphLowering.get_original_value_of_constant", ("self", "name")),
    ("torch._inductor.graph", "is_same_tensor", ("data", "value")),
    ("torch._inductor.select_algorithm", "add_preprocessing_fn", ("fn",)),
    ("torch._inductor.select_algorithm", "get_algorithm_selector_cache", ()),
    ("torch._inductor.runtime.triton_heuristics", "CachingAutotuner.save_gpu_kernel", ("self", "stream", "launcher")),
    ("torch.export.passes", "move_to_device_pass", ("ep", "location")),
    ("triton.backends.nvidia.driver", "CudaDriver.get_current_target", ("self",)),
    ("triton.runtime.driver", "DriverConfig.set_active", ("self", "driver")),
    ("triton.compiler.code_generator", "get_jit_fn_file_line", ("fn",)),
    (
        "executorch.backends.cuda.cuda_backend",
        "CudaBackend.move_program_to_device",
        ("edge_program", "device", "compile_specs"),
    ),
    ("executorch.backends.cuda.cuda_backend", "_aoti_device_type_for_weight", ("tensor",)),
)

_INDUCTOR_CONFIG = {
    "compile_threads": 1,  # workers are other processes, in which nothing is replaced
    "cpp.simdlen": 256,  # AVX2, as in the CPU baseline
    "triton.autotune_at_compile_time": True,
    "triton.autotune_with_sample_inputs": False,
    "deterministic": True,
    "always_keep_tensor_constants": True,  # their values are not there while compiling
    "joint_graph_constant_folding": False,  # would compute on the device
    "benchmark_epilogue_fusion": False,
    "fx_graph_cache": False,
    "autotune_local_cache": False,
}


@dataclasses.dataclass(frozen=True)
class KernelChoice:
    """One compiled kernel. `candidates`: configurations there were; `config`: the first of them that fits the GPU."""

    kernel: str
    candidates: int
    config: str
    shared: int


@dataclasses.dataclass(frozen=True)
class GemmChoice:
    """One dense GEMM of Inductor's. `candidates`: templates there were; `template`: the one with the best score."""

    shape: tuple[int, ...]
    candidates: int
    template: str


@dataclasses.dataclass
class CrossCompileReport:
    """What was compiled for whom; filled while lowering."""

    model: GpuModel
    cpu: str = host_toolchain.CPU_BASELINE
    kernels: list[KernelChoice] = dataclasses.field(default_factory=list)
    gemms: list[GemmChoice] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        shared = max((choice.shared for choice in self.kernels), default=0)
        return (
            f"{self.model.product} ({self.model.arch}): {len(self.kernels)} kernels, up to {shared} of "
            f"{self.model.max_shared} bytes of shared memory; host code for {self.cpu}"
        )


def check_target(target: str) -> GpuModel:
    """The GPU that a target names, if it can be compiled for on this machine.

    Raises:
        ValueError: unknown target.
        RuntimeError: no compiler, or see `check_versions`.
    """
    model = find_model(target)
    if why := host_toolchain.why_no_toolchain():
        raise RuntimeError(f"cannot export for {target}: {why}")
    check_versions()
    return model


def check_versions() -> None:
    """Check that torch, Triton and ExecuTorch are what this module was made for.

    Raises:
        RuntimeError: another version, or a function that is not as expected; the message names all of them.
    """
    from importlib import metadata

    wrong = []
    for package, accepted in VERSIONS.items():
        version = metadata.version(package)
        if not any(version == known or version.startswith((f"{known}.", f"{known}+")) for known in accepted):
            wrong.append(f"{package} {version} (works with {', '.join(accepted)})")
    wrong = wrong or [problem for entry in _SIGNATURES if (problem := _problem(*entry))]
    if wrong:
        raise RuntimeError(
            f"cannot export for a GPU that is not here with {'; '.join(wrong)}: install a version that works, "
            "or export on a machine with that GPU, with target 'cuda'"
        )


def _problem(module: str, name: str, parameters: tuple[str, ...]) -> str:
    import importlib

    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        actual = tuple(inspect.signature(found).parameters)
    except (ImportError, AttributeError, ValueError) as error:
        return f"{module}.{name}: {error}"
    return "" if actual == parameters else f"{module}.{name}({', '.join(actual)}), not ({', '.join(parameters)})"


@contextlib.contextmanager
def target_cuda(target: str) -> Iterator[CrossCompileReport]:
    """Within it, `to_edge_transform_and_lower` compiles CUDA delegates for `target`; no GPU is needed or used.

    It replaces functions of torch, Triton and ExecuTorch for the whole process and puts them back at the end; nothing
    else may compile with Inductor meanwhile. The exported programs are on the CPU.

    Args:
        target: "sm_90", "h200" or another of `kernels.gpus.target_names()`.

    Yields:
        What was chosen, filled while lowering.

    Raises:
        ValueError: unknown target.
        RuntimeError: no compiler, or versions of torch, Triton or ExecuTorch that are not known to work.
    """
    report = CrossCompileReport(check_target(target))
    with contextlib.ExitStack() as stack:
        # Kept until the process ends: ExecuTorch leaves weights in files here and reads them to write the .ptd.
        folder = Path(tempfile.mkdtemp(prefix="executorch_moe_"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        _forget_devices()
        stack.callback(_forget_devices)
        stack.enter_context(compile_for(report.model.gpu))
        _replace_toolchain(stack, report.model, folder)
        _replace_device(stack, report.model, folder)
        _replace_triton_driver(stack, report.model)
        _replace_choices(stack, report)
        _replace_weights(stack)
        yield report


def _forget_devices() -> None:
    """Empty the caches that hold an answer about the device."""
    import torch.utils._triton
    from torch._inductor import cpp_builder, cpu_vec_isa, utils
    from torch._inductor.codegen.cuda import cuda_env
    from torch._inductor.runtime.hints import DeviceProperties

    for module in (torch.utils._triton, utils, cuda_env, cpp_builder, cpu_vec_isa):
        for function in list(vars(module).values()):
            if callable(function) and hasattr(function, "cache_clear"):
                function.cache_clear()
    DeviceProperties.create.cache_clear()


def _replace_toolchain(stack: contextlib.ExitStack, model: GpuModel, folder: Path) -> None:
    import torch.utils.cpp_extension
    from torch._inductor import config

    home = host_toolchain.make_cuda_home(folder)
    settings: dict[str, Any] = {
        **_INDUCTOR_CONFIG,
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
    stack.enter_context(mock.patch.object(torch.utils.cpp_extension, "CUDA_HOME", str(home)))
    # A CUDA build of torch asks for fatbins, which need nvcc.
    stack.enter_context(mock.patch.object(torch.version, "cuda", None))
    stack.enter_context(config.patch(settings))


def _properties(model: GpuModel) -> SimpleNamespace:
    return SimpleNamespace(
        name=model.product, major=model.capability // 10, minor=model.capability % 10, total_memory=model.memory,
        # Inductor has no GEMM templates for parts with fewer, and its other choice is a library that is not there.
        multi_processor_count=max(model.num_sms, 68), L2_cache_size=model.l2, warp_size=32,
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=model.max_threads_per_sm,
        max_threads_per_block=1024, shared_memory_per_block=49152, shared_memory_per_block_optin=model.max_shared,
        shared_memory_per_multiprocessor=model.max_shared + 1024, is_integrated=0, is_multi_gpu_board=0,
        gcnArchName="", uuid="0",
    )  # fmt: skip


def _replace_device(stack: contextlib.ExitStack, model: GpuModel, folder: Path) -> None:
    import torch._dynamo.device_interface as interfaces

    properties, capability = _properties(model), (model.capability // 10, model.capability % 10)
    answers: dict[str, Callable[..., Any]] = {
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: capability,
        "get_device_name": lambda device=None: model.product,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "is_bf16_supported": lambda including_emulation=True: True,
        "synchronize": lambda device=None: None,
    }
    interfaces.init_device_reg()  # before device_count() is replaced: it registers every device that it counts
    for name, answer in answers.items():
        stack.enter_context(mock.patch.object(torch.cuda, name, answer))
    worker: dict[str, Callable[..., Any]] = {
        "set_device": lambda device: None,
        "current_device": answers["current_device"],
        "get_device_properties": answers["get_device_properties"],
    }
    methods: dict[str, Callable[..., Any]] = {
        **{name: answers[name] for name in ("get_device_properties", "current_device", "device_count", "synchronize")},
        "is_bf16_supported": answers["is_bf16_supported"],
        "set_device": lambda device: None,
        "get_raw_stream": lambda device: 0,
        "exchange_device": lambda device: 0,
        "maybe_exchange_device": lambda device: 0,
        "is_available": lambda: True,
        "get_compute_capability": lambda device=None: model.capability,
        "is_triton_capable": lambda device=None: True,
        "raise_if_triton_unavailable": lambda device=None: None,
    }
    members: dict[str, Any] = {name: staticmethod(method) for name, method in methods.items()}
    members["Worker"] = SimpleNamespace(**worker)
    target = type("TargetInterface", (interfaces.CudaInterface,), members)
    stack.enter_context(mock.patch.dict(interfaces.device_interfaces, {"cuda": target, "cuda:0": target}))
    if not torch.backends.cuda.is_built():
        guard = host_toolchain.build_guard(folder)
        if guard.install_guard():
            stack.callback(guard.remove_guard)


def _replace_triton_driver(stack: contextlib.ExitStack, model: GpuModel) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver
    from triton.compiler import code_generator

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("there is no GPU: kernels are compiled here, not run")

    memory = {"max_shared_mem": model.max_shared, "max_num_regs": 65536, "multiprocessor_count": model.num_sms}
    clocks = {"warpSize": 32, "sm_clock_rate": 1980000, "mem_clock_rate": 2619000, "mem_bus_width": 6144}
    utils = SimpleNamespace(
        get_device_properties=lambda device: {**memory, **clocks},
        # module, function, registers, spills, threads: never used, for nothing is launched.
        load_binary=lambda name, kernel, shared, device: (1, 1, 0, 0, 1024),
    )

    class TargetDriver(CudaDriver):  # Inductor asks whether the driver is a CudaDriver
        def __init__(self) -> None:  # the base class loads libcuda
            self.utils = utils
            self.launcher_cls = lambda *_, **__: refuse
            self.get_device_capability = lambda device=0: (model.capability // 10, model.capability % 10)
            self.get_current_stream = lambda device=0: 0
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None

        @staticmethod
        def is_active() -> bool:
            return True

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", model.capability, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cuda", 0)

        get_benchmarker = refuse
        get_empty_cache_for_benchmark = refuse

    stock_source = code_generator.get_jit_fn_file_line

    def source(fn: Any) -> tuple[str, int]:
        path, line = stock_source(fn)
        # It ends up in kernels' assertions: a temporary folder's name would make every build different.
        return os.path.basename(path), line

    stack.enter_context(mock.patch.object(code_generator, "get_jit_fn_file_line", source))
    nvidia = dataclasses.replace(triton.backends.backends["nvidia"], driver=TargetDriver)
    stack.enter_context(mock.patch.dict(triton.backends.backends, {"nvidia": nvidia}))
    drivers = triton.runtime.driver
    stack.callback(setattr, drivers, "_active", drivers._active)
    drivers.set_active(TargetDriver())
    if not hasattr(torch._C, "_cuda_getCurrentRawStream"):  # CPU builds
        stack.enter_context(mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, create=True))


def _replace_choices(stack: contextlib.ExitStack, report: CrossCompileReport) -> None:
    """Where Inductor would time candidates on the GPU: kernels take the first that fits, GEMMs the best by a score."""
    from torch._inductor import select_algorithm
    from torch._inductor.codegen.wrapper import PythonWrapperCodegen
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    def compile_kernels(self: PythonWrapperCodegen) -> None:
        self.kernel_autotune_defs.splice("async_compile.wait(globals())\ndel async_compile\n")
        scope: dict[str, Any] = {}
        try:
            exec(self.kernel_autotune_defs.getvalue(), scope)
            tuners = [value for value in scope.values() if isinstance(value, CachingAutotuner)]
            for tuner in tuners:
                tuner.precompile()
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RuntimeError(
                f"a kernel does not compile for {report.model.arch} with {report.model.max_shared} bytes of shared "
                f"memory ({reason}): choose another --target or scheme"
            ) from error
        for tuner in tuners:
            launcher = tuner.launchers[0]
            name = tuner.inductor_meta.get("kernel_name")
            shared = launcher.bin.metadata.shared
            report.kernels.append(KernelChoice(name, len(tuner.launchers), str(launcher.config), shared))
            tuner.save_gpu_kernel("stream0", launcher)

    def choose_gemm(choices: list[Any]) -> list[Any]:
        templates = [choice for choice in choices if isinstance(choice, select_algorithm.TritonTemplateCaller)]
        if not templates:
            return choices
        best = max(templates, key=lambda choice: score_gemm(choice, report.model))
        report.gemms.append(GemmChoice(_static_shape(best), len(templates), best.description))
        return [best]

    stack.enter_context(mock.patch.object(PythonWrapperCodegen, "generate_and_run_autotune_block", compile_kernels))
    functions = select_algorithm.get_algorithm_selector_cache().preprocessing_fns
    select_algorithm.add_preprocessing_fn(choose_gemm)
    stack.callback(functions.remove, choose_gemm)


def _static_shape(choice: Any) -> tuple[int, ...]:
    """Output shape of a GEMM; 64 stands for a size known only at run time."""
    from torch._inductor.virtualized import V

    return tuple(V.graph.sizevars.optimization_hints(choice.layout.size, fallback=64))


def score_gemm(choice: Any, model: GpuModel) -> tuple[float, ...]:
    """Rank of a GEMM template without timing it: fits shared memory, wastes few rows, fills the GPU, reuses most."""
    info = choice.info_dict()
    try:
        block_m, block_k, block_n = (int(part) for part in str(info["tile_shape"]).strip("()").split(","))
        stages = int(info["num_stages"])
    except (KeyError, ValueError):
        return (-1.0,)
    *batch, columns = _static_shape(choice)
    rows = math.prod(batch)
    fits = stages * block_k * (block_m + block_n) * choice.layout.dtype.itemsize <= model.max_shared
    row_blocks = math.ceil(rows / block_m)
    programs = row_blocks * math.ceil(columns / block_n)
    return (
        float(fits and stages > 1),
        float(row_blocks * block_m <= 2 * rows or block_m == 16),
        min(programs / model.num_sms, 1.0),
        float(block_m * block_n),
        float(min(block_k, 64)),
        float(stages),
    )


def _replace_weights(stack: contextlib.ExitStack) -> None:
    """The compiler sees weights without bytes on a CUDA device, the .ptd gets the bytes that are on the CPU."""
    from executorch.backends.cuda import cuda_backend
    from torch._guards import detect_fake_mode
    from torch._inductor import graph
    from torch._inductor.graph import GraphLowering
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.export.passes import move_to_device_pass

    by_name: dict[str, Tensor] = {}
    # Constants can lose their name on the way (_tensor_constant0), never their storage, which is kept alive here.
    by_storage: dict[int, tuple[Tensor, Tensor]] = {}
    stock_value, stock_same = GraphLowering.get_original_value_of_constant, graph.is_same_tensor

    def move(cls: type, edge_program: Any, device: str, compile_specs: Any) -> Any:
        mode = detect_fake_mode([node.meta.get("val") for node in edge_program.graph.nodes if node.op == "placeholder"])
        by_name.clear()
        by_storage.clear()
        state = (edge_program._state_dict, edge_program._constants)
        for tensors in state:
            for name, tensor in tensors.items():
                if isinstance(tensor, Tensor):
                    by_name[name] = own_storage(tensor.detach())
                    with mode:
                        fake = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
                    is_parameter = isinstance(tensor, torch.nn.Parameter)
                    tensors[name] = torch.nn.Parameter(fake, requires_grad=False) if is_parameter else fake
        edge_program._example_inputs = None
        with mode, torch.no_grad():
            moved = move_to_device_pass(edge_program, device)
        for tensors in (moved._state_dict, moved._constants):
            for name, tensor in tensors.items():
                if name in by_name:
                    by_storage[tensor.untyped_storage()._cdata] = (tensor, by_name[name])
        return moved

    def value(self: GraphLowering, name: str) -> Tensor:
        found = stock_value(self, name)
        if not isinstance(found, FakeTensor):
            return found
        real = by_name.get(self.allocated_constant_name[name])
        if real is None:
            real = by_storage[self.constants[name].untyped_storage()._cdata][1]
        assert (real.shape, real.stride(), real.dtype) == (found.shape, found.stride(), found.dtype), name
        return real

    def same(data: Tensor, value: Tensor) -> bool:
        fake = isinstance(data, FakeTensor) or isinstance(value, FakeTensor)
        return data is value if fake else stock_same(data, value)

    def device_type(tensor: Tensor) -> int:
        return int(cuda_backend.AOTI_DEVICE_TYPE_CUDA)

    stack.enter_context(mock.patch.object(cuda_backend.CudaBackend, "move_program_to_device", classmethod(move)))
    stack.enter_context(mock.patch.object(GraphLowering, "get_original_value_of_constant", value))
    stack.enter_context(mock.patch.object(graph, "is_same_tensor", same))
    stack.enter_context(mock.patch.object(cuda_backend, "_aoti_device_type_for_weight", device_type))


def own_storage(tensor: Tensor) -> Tensor:
    """The tensor itself if it fills its storage, else a copy of just its span, with the same strides."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    span = span if tensor.numel() else 0
    if tensor.storage_offset() == 0 and tensor.untyped_storage().nbytes() == span * tensor.element_size():
        return tensor
    flat = torch.as_strided(tensor, (span,), (1,), tensor.storage_offset()).clone()
    return torch.as_strided(flat, tensor.shape, tensor.stride(), 0)
