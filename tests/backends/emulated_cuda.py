"""Makes CudaBackend compile for the CPU, so that the delegate host runs in CI with a real AOTInductor delegate.

All code is that of ExecuTorch and of this package (partitioner, weight collector, .pte, .ptd, host). Only the target of
AOTInductor and the container class differ from a GPU machine. There is no Triton, so there are no fused experts.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from executorch.backends.cuda.cuda_backend import CudaBackend
from executorch.exir import ExecutorchProgramManager, to_edge_transform_and_lower
from torch.export import Dim, ExportedProgram, export

from executorch_moe.backends.cuda import MoECudaPartitioner
from executorch_moe.backends.cuda.output_folders import own_outputs

CONTEXT = 8
WIDTH = 16

_OPTIONS = {
    "aot_inductor.link_libtorch": False,
    "aot_inductor.package": True,
    "aot_inductor.package_constants_in_so": False,
    "aot_inductor.package_constants_on_disk_format": "pickle_weights",
    # Without optimization and headers of vector instructions, which take longer to compile than these methods.
    "aot_inductor.compile_wrapper_opt_level": "O0",
    "aot_inductor.precompile_headers": False,
    "cpp.vec_isa_ok": False,
}


class Stateful(torch.nn.Module):
    """A weight, a cache that starts at zero, and a counter that starts at three."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("scale", torch.randn(WIDTH, generator=generator))
        self.register_buffer("cache", torch.zeros(CONTEXT, WIDTH))
        self.register_buffer("count", torch.full((WIDTH,), 3, dtype=torch.int64))

    def forward(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        self.cache[position] = x * self.scale
        self.count.add_(1)
        return self.cache.sum(0) + self.count


class Peek(torch.nn.Module):
    """Reads the other module's cache without writing to it, and returns a view of it."""

    def __init__(self, owner: Stateful) -> None:
        super().__init__()
        self.register_buffer("cache", owner.cache)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.cache.sum(0) * x, self.cache.view(-1)


def stateful_programs(seed: int = 0) -> tuple[Stateful, dict[str, ExportedProgram]]:
    """The eager module, and prefill (dynamic T), decode (T=1) and peek on the same buffers."""
    module = Stateful(seed).eval()
    x, position = torch.randn(5, WIDTH), torch.arange(5)
    tokens = Dim("T", min=2, max=CONTEXT)
    programs = {
        "prefill": export(module, (x, position), dynamic_shapes=({0: tokens}, {0: tokens})),
        "decode": export(module, (x[:1], position[:1])),
        "peek": export(Peek(module), (torch.ones(WIDTH),)),
    }
    return module, programs


@contextlib.contextmanager
def cuda_backend_on_cpu() -> Iterator[None]:
    """Context in which CudaBackend's preprocess compiles for the CPU."""

    def options(cls: type, compile_specs: Any) -> dict[str, Any]:
        return dict(_OPTIONS)

    with (
        mock.patch.object(CudaBackend, "get_device_name", classmethod(lambda cls: "cpu")),
        mock.patch.object(CudaBackend, "get_aoti_compile_options", classmethod(options)),
        mock.patch.object(CudaBackend, "get_custom_passes", classmethod(lambda cls, specs: [])),
    ):
        yield


def lower_emulated(programs: dict[str, ExportedProgram], constants: dict | None = None) -> ExecutorchProgramManager:
    """`lower(programs, "cuda", constants)`, but for the CPU."""
    with cuda_backend_on_cpu(), own_outputs(), torch.no_grad():
        edge = to_edge_transform_and_lower(
            programs,
            partitioner={
                name: [MoECudaPartitioner([CudaBackend.generate_method_name_compile_spec(name)])] for name in programs
            },
            constant_methods=constants,
        )
        return edge.to_executorch()


def open_cpu_container(library: Path, device: torch.device):
    """Open AOTInductor's runner for the CPU."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
    return torch._C._aoti.AOTIModelContainerRunnerCpu(str(library), 1)
