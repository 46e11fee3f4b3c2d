"""Stand-ins for a GPU that is not in this machine: properties, Inductor's device interface, Triton's driver."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from executorch_moe.kernels.gpus import GpuModel

REGISTERS = 65536
# Inductor uses no GEMM templates on GPUs with fewer SMs, and its alternative is a library that the runtime lacks.
FEWEST_SMS = 68


def properties(model: GpuModel) -> SimpleNamespace:
    """The result of `torch.cuda.get_device_properties`."""
    return SimpleNamespace(
        name=model.product, major=model.capability // 10, minor=model.capability % 10, total_memory=model.memory,
        multi_processor_count=max(model.num_sms, FEWEST_SMS), L2_cache_size=model.l2, warp_size=32,
        regs_per_multiprocessor=REGISTERS, max_threads_per_multi_processor=model.max_threads_per_sm,
        max_threads_per_block=1024, shared_memory_per_block=49152, shared_memory_per_block_optin=model.max_shared,
        shared_memory_per_multiprocessor=model.max_shared + 1024, is_integrated=0, is_multi_gpu_board=0,
        gcnArchName="", uuid="0",
    )  # fmt: skip


def cuda_functions(model: GpuModel) -> dict[str, Callable[..., Any]]:
    """Replacements for functions of `torch.cuda`, by name."""
    found, capability = properties(model), (model.capability // 10, model.capability % 10)
    return {
        # The same on every machine: nothing may query or use a GPU of this machine.
        "is_available": lambda: False,
        "get_device_properties": lambda device=None: found,
        "get_device_capability": lambda device=None: capability,
        "get_device_name": lambda device=None: model.product,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "is_bf16_supported": lambda including_emulation=True: True,
        "synchronize": lambda device=None: None,
    }


def device_interface(model: GpuModel) -> type:
    """A class that replaces `torch._dynamo.device_interface.CudaInterface`."""
    from torch._dynamo.device_interface import CudaInterface

    answers = cuda_functions(model)
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
    members["Worker"] = SimpleNamespace(
        set_device=methods["set_device"],
        current_device=answers["current_device"],
        get_device_properties=answers["get_device_properties"],
    )
    return type("TargetInterface", (CudaInterface,), members)


def triton_driver(model: GpuModel) -> type:
    """A class that replaces Triton's `CudaDriver`: it compiles for the target and refuses to launch."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("there is no GPU: kernels are compiled here, not run")

    memory = {"max_shared_mem": model.max_shared, "max_num_regs": REGISTERS, "multiprocessor_count": model.num_sms}
    clocks = {"warpSize": 32, "sm_clock_rate": 1980000, "mem_clock_rate": 2619000, "mem_bus_width": 6144}
    utils = SimpleNamespace(
        get_device_properties=lambda device: {**memory, **clocks},
        # module, function, registers, spills, threads: unused, because nothing is launched.
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

    return TargetDriver
