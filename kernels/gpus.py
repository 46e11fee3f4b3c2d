"""Data of NVIDIA GPUs, for the choice of tile configurations and for exports to GPUs that are not present."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch

MAX_DYNAMIC_SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""Largest shared memory of one block in bytes, by compute capability (opt-in limit).

Source: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
"""

MAX_THREADS_PER_SM = {80: 2048, 86: 1536, 89: 1536, 90: 2048, 100: 2048, 120: 1536}
"""Resident threads of a multiprocessor by compute capability; same source. All of these have 65536 registers."""


@dataclass(frozen=True)
class Gpu:
    """Properties of a GPU that decide tile configurations.

    Attributes:
        capability: compute capability times ten, as in sm_90.
        num_sms: multiprocessors. max_shared: largest dynamic shared memory of one block, bytes.
    """

    capability: int
    num_sms: int
    max_shared: int


INTERPRETER_GPU = Gpu(90, 4, MAX_DYNAMIC_SHARED[90])
"""The GPU that Triton's interpreter is configured for: few multiprocessors, so that each program does many tiles."""


@dataclass(frozen=True)
class GpuModel:
    """A GPU product, with the values of its data sheet.

    Attributes:
        name: for `--target`. product: the driver's name for it. capability: 90 for sm_90.
        num_sms: enabled multiprocessors. l2: level-2 cache, bytes. memory: of the board, bytes.
    """

    name: str
    product: str
    capability: int
    num_sms: int
    l2: int
    memory: int

    @property
    def arch(self) -> str:
        """Architecture, as in "sm_90"."""
        return f"sm_{self.capability}"

    @property
    def max_shared(self) -> int:
        return MAX_DYNAMIC_SHARED[self.capability]

    @property
    def max_threads_per_sm(self) -> int:
        return MAX_THREADS_PER_SM[self.capability]

    @property
    def gpu(self) -> Gpu:
        """The properties that decide tile configurations."""
        return Gpu(self.capability, self.num_sms, self.max_shared)


def _model(name: str, product: str, capability: int, num_sms: int, l2_mib: int, memory_gib: int) -> GpuModel:
    return GpuModel(name, product, capability, num_sms, l2_mib << 20, memory_gib << 30)


# Source: NVIDIA's architecture white papers and data sheets.
MODELS = {
    model.name: model
    for model in (
        _model("a100", "NVIDIA A100-SXM4-80GB", 80, 108, 40, 80),
        _model("a10", "NVIDIA A10", 86, 72, 6, 24),
        _model("rtx3090", "NVIDIA GeForce RTX 3090", 86, 82, 6, 24),
        _model("l4", "NVIDIA L4", 89, 58, 48, 24),
        _model("l40s", "NVIDIA L40S", 89, 142, 96, 48),
        _model("rtx4090", "NVIDIA GeForce RTX 4090", 89, 128, 72, 24),
        _model("h100", "NVIDIA H100 80GB HBM3", 90, 132, 50, 80),
        _model("h200", "NVIDIA H200", 90, 132, 50, 141),
        _model("b200", "NVIDIA B200", 100, 148, 126, 180),
        _model("rtx5090", "NVIDIA GeForce RTX 5090", 120, 170, 96, 32),
    )
}

USUAL = {80: "a100", 86: "a10", 89: "rtx4090", 90: "h200", 100: "b200", 120: "rtx5090"}
"""The product that represents an architecture in `--target sm_90`: capability -> name."""


def target_names() -> tuple[str, ...]:
    """All names that `find_model` accepts: architectures, then products."""
    return (*(f"sm_{capability}" for capability in USUAL), *MODELS)


def find_model(target: str) -> GpuModel:
    """The product for a target: "h200", or "sm_90" for the product in `USUAL`.

    Raises:
        ValueError: unknown target.
    """
    if target in MODELS:
        return MODELS[target]
    if (found := re.fullmatch(r"sm_(\d+)", target)) and int(found[1]) in USUAL:
        # It keeps the name that was asked for.
        return replace(MODELS[USUAL[int(found[1])]], name=target)
    raise ValueError(f"target {target!r} is not a known GPU: use one of {', '.join(target_names())}")


def find_models(targets: str) -> tuple[GpuModel, ...]:
    """The products for comma-separated targets, as in "sm_80,sm_90", in that order.

    Raises:
        ValueError: unknown target, or two targets of one architecture, whose code an artifact could not tell apart.
    """
    models = tuple(find_model(target.strip()) for target in targets.split(","))
    for index, model in enumerate(models):
        for other in models[:index]:
            if model.capability == other.capability:
                names = f"{other.name!r} and {model.name!r}"
                raise ValueError(
                    f"targets {names} are both {model.arch}, and an artifact holds code for an architecture only once: "
                    "name one of them, or export two files"
                )
    return models


_TARGET: ContextVar[Gpu | None] = ContextVar("executorch_moe_target_gpu", default=None)


@contextlib.contextmanager
def compile_for(gpu: Gpu) -> Iterator[None]:
    """Context in which kernels are configured for `gpu` instead of the GPU of this machine."""
    token = _TARGET.set(gpu)
    try:
        yield
    finally:
        _TARGET.reset(token)


def gpu_of(device_index: int | None) -> Gpu:
    """The GPU to configure kernels for: that of `compile_for`, else the CUDA device with this index.

    Index None is torch's current device, as in `torch.device("cuda")`.
    """
    if (target := _TARGET.get()) is not None:
        return target
    return _device(torch.cuda.current_device() if device_index is None else device_index)


@functools.cache
def _device(index: int) -> Gpu:
    """Properties of a CUDA device, cached."""
    p = torch.cuda.get_device_properties(index)
    return Gpu(p.major * 10 + p.minor, p.multi_processor_count, p.shared_memory_per_block_optin)
