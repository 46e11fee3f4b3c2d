"""One kernel launch as data: to run it, to record it while tracing, or to compile it for a GPU that is not present."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.library import wrap_triton
from triton.runtime.jit import JITFunction

from .gpus import INTERPRETER_GPU, Gpu, gpu_of


@dataclass
class Launch:
    """One kernel launch.

    Attributes:
        kernel: function decorated with `triton.jit`. grid: number of programs in up to three dimensions.
        args: tensors and sizes by parameter name. constexprs: constants by parameter name; PTX is one of them.
        num_warps: of a program. max_registers: of a thread; None leaves them to the compiler.
    """

    kernel: Any
    grid: tuple[Any, ...]
    args: dict[str, Any]
    constexprs: dict[str, Any]
    num_warps: int = 4
    max_registers: int | None = None

    def run(self) -> None:
        """Run the kernel, or record the launch if an operator is being traced."""
        kernel = wrap_triton(self.kernel) if isinstance(self.kernel, JITFunction) else self.kernel
        if kernel is self.kernel:
            self.run_now()
        else:
            with on_device(value for value in self.args.values() if not is_traced(value)):
                kernel[self.grid](**self.args, **self.constexprs, num_warps=self.num_warps)

    def run_now(self) -> None:
        """Run the kernel on the device of its tensors, even while torch traces."""
        with on_device(self.args.values()):
            self.kernel[self.grid](**self.args, **self.constexprs, **self.options)

    @property
    def options(self) -> dict[str, Any]:
        """Triton's launch options. From sm_90 on, the launch overlaps with the previous one; see `launches_before`."""
        options: dict[str, Any] = {"num_warps": self.num_warps}
        if self.constexprs["PTX"] >= 90:
            options["launch_pdl"] = True
        if self.max_registers is not None:
            options["maxnreg"] = self.max_registers
        return options


def kernel_gpu(tensor: Tensor) -> Gpu:
    """The GPU to configure kernels for that work on `tensor`; see `gpu_of`."""
    return INTERPRETER_GPU if _interpreted() else gpu_of(tensor.device.index)


def ptx_of(gpu: Gpu) -> int:
    """The kernels' constant PTX; see _device.py."""
    return 0 if _interpreted() else gpu.capability


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def is_traced(value: Any) -> bool:
    """True for a tensor that has no values: torch is tracing."""
    return isinstance(value, FakeTensor | FunctionalTensor)


def on_device(arguments: Iterable[Any]) -> AbstractContextManager[Any]:
    """Context in which the CUDA device of the first CUDA tensor of `arguments` is current.

    Triton launches on torch's current device and stream, whatever device the tensors are on.
    """
    for argument in arguments:
        if isinstance(argument, Tensor) and argument.device.type == "cuda":
            if argument.device.index == torch.cuda.current_device():
                break
            return torch.cuda.device(argument.device)
    return contextlib.nullcontext()
