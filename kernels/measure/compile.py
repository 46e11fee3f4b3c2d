"""Compiles kernels for GPUs that need not be present, and reports registers, spills and shared memory."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from executorch_moe.kernels.experts.plan import Options, run_fused_experts
from executorch_moe.kernels.gpus import Gpu, GpuModel, gpu_of
from executorch_moe.kernels.launch import Launch
from executorch_moe.kernels.shapes import LayerShape

from .timing import random_packed

_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class KernelReport:
    """Resources of one compiled kernel.

    Attributes:
        kernel: its name. capability: 90 for sm_90. constants: the constexprs that distinguish its variants.
        shared: dynamic shared memory, bytes. registers: of a thread. spill_bytes: local memory of a thread, bytes.
        num_warps: of a program.
    """

    kernel: str
    capability: int
    constants: str
    shared: int
    registers: int
    spill_bytes: int
    num_warps: int

    def programs_per_sm(self, gpu: GpuModel) -> int:
        """Number of programs of this kernel that can be resident on one multiprocessor."""
        threads = 32 * self.num_warps
        registers = self.num_warps * -(-self.registers * 32 // 256) * 256  # allocated to a warp in units of 256
        # The system takes 1 KB of each block. A multiprocessor has the limit of one block plus that 1 KB.
        shared = (gpu.max_shared + 1024) // (self.shared + 1024)
        return min(65536 // registers, shared, gpu.max_threads_per_sm // threads)


def record_launches(
    gpu: Gpu,
    scheme: str,
    tokens: int,
    shape: LayerShape,
    options: Options,
    activation: str = "silu",
    bias: bool = False,
) -> list[Launch]:
    """Launches of one expert layer, on meta tensors, for a GPU that need not be present."""
    packed = random_packed(shape, scheme, "meta", torch.Generator())
    with torch.device("meta"):
        if bias:
            rows = (shape.padded().rows_and_k(gemm)[0] for gemm in (1, 2))
            biases = (torch.empty(shape.experts, n) for n in rows)
            packed = packed.with_tensors(dict(zip(("w13_bias", "w2_bias"), biases, strict=True)))
        x = torch.empty(tokens, shape.hidden, dtype=torch.bfloat16)
        ids = torch.empty(tokens, shape.top_k, dtype=torch.int64)
        weights = torch.empty(tokens, shape.top_k)
        launches: list[Launch] = []
        arguments = packed.arguments(x, ids, weights, activation)
        run_fused_experts(arguments, options=options, gpu=gpu, submit=launches.append)
    return launches


def _signature(launch: Launch) -> tuple[dict[str, str], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    names = launch.kernel.arg_names
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for index, name in enumerate(names):
        value = launch.args.get(name)
        if isinstance(value, Tensor):
            signature[name] = _POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif name in launch.args:
            signature[name] = "i32"
        else:
            signature[name] = "constexpr"
            constants[(index,)] = launch.constexprs[name]
    return signature, constants, attributes


def cuobjdump(cubin: bytes, option: str) -> str:
    """Output of Triton's cuobjdump for a cubin: its instructions with "-sass", its registers with "-res-usage"."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    handle, path = tempfile.mkstemp(suffix=".cubin")
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(cubin)
        return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout
    finally:
        os.unlink(path)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and local memory bytes of a thread, for the only kernel of a cubin."""
    text = cuobjdump(cubin, "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text!r}")
    return int(found[1]), int(found[2])


def compile_kernel(launch: Launch, capability: int) -> Any:
    """Compile one launch for a capability, without a GPU. Returns Triton's compiled kernel."""
    signature, constants, attributes = _signature(launch)
    kind = GluonASTSource if launch.kernel.is_gluon() else ASTSource
    source = kind(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {key: value for key, value in launch.options.items() if key != "launch_pdl"}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def compile_launch(launch: Launch, capability: int) -> KernelReport:
    """Compile one launch for a capability, without a GPU, and report its resources.

    Raises:
        RuntimeError: Triton cannot compile the kernel, or cuobjdump prints no resource usage.
    """
    compiled = compile_kernel(launch, capability)
    registers, spill_bytes = _resources(compiled.asm["cubin"])
    telling = ("GEMM", "W_BITS", "ACT_GROUP", "GROUP", "BLOCK_M", "BLOCK_N", "NUM_STAGES", "PERSISTENT")
    return KernelReport(
        kernel=launch.kernel.__name__,
        capability=capability,
        constants=" ".join(f"{n}={launch.constexprs[n]}" for n in telling if n in launch.constexprs),
        shared=compiled.metadata.shared,
        registers=registers,
        spill_bytes=spill_bytes,
        num_warps=launch.num_warps,
    )


@dataclass(frozen=True)
class CompileJob:
    """An expert layer whose kernels are compiled ahead."""

    shape: LayerShape
    scheme: str
    tokens: int
    options: Options


def compile_ahead(jobs: Sequence[CompileJob], on_done: Callable[[], None] = lambda: None) -> None:
    """Fill Triton's cache for the GPU of this machine, on all cores, because compiling takes longer than timing.

    TORCHINDUCTOR_COMPILE_THREADS, torch's own variable, limits the processes; with 1 there are none.

    Args:
        jobs: layers to compile. on_done: called after each job.
    """
    gpu = gpu_of(torch.cuda.current_device())
    cores = int(os.environ.get("TORCHINDUCTOR_COMPILE_THREADS") or (os.cpu_count() or 2) - 1)
    workers, work = max(1, min(cores, len(jobs))), [(gpu, job) for job in jobs]
    if workers == 1:
        for one in work:
            _fill_cache(one)
            on_done()
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for _ in pool.map(_fill_cache, work, chunksize=2):
            on_done()


def _fill_cache(work: tuple[Gpu, CompileJob]) -> None:
    gpu, job = work
    for launch in record_launches(gpu, job.scheme, job.tokens, job.shape, job.options):
        launch.kernel.warmup(**launch.args, **launch.constexprs, **launch.options, grid=launch.grid)
