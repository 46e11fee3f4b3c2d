"""NVIDIA GPUs as data: what the choice of a configuration, and an export for a GPU that is not here, need to know."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch

MAX_DYNAMIC_SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""Largest shared memory of one block by compute capability, bytes. Source: CUDA C++ Programming Guide, "Technical
Specifications per Compute Capability" (per-block opt-in limit)."""

MAX_THREADS_PER_SM = {80: 2048, 86: 1536, 89: 1536, 90: 2048, 100: 2048, 120: 1536}
"""Resident threads of a multiprocessor by compute capability; source as above. Registers are 65536 in all of them."""


@dataclass(frozen=True)
class Gpu:
    """What the choice of a configuration needs to know of a GPU.

    Attributes:
        capability: compute capability times ten, as in sm_90.
        num_sms: multiprocessors. max_shared: largest dynamic shared memory of one block, bytes.
    """

    capability: int
    num_sms: int
    max_shared: int


@dataclass(frozen=True)
class GpuModel:
    """One part on sale; memory and L2 in bytes, as the data sheets have them.

    Attributes:
        name: as `--target` takes it. product: as the driver names it. capability: 90 for sm_90.
        num_sms: multiprocessors that are enabled. l2: level-2 cache. memory: of the board.
    """

    name: str
    product: str
    capability: int
    num_sms: int
    l2: int
    memory: int

    @property
    def arch(self) -> str:
        """sm_90 and the like."""
        return f"sm_{self.capability}"

    @property
    def max_shared(self) -> int:
        return MAX_DYNAMIC_SHARED[self.capability]

    @property
    def max_threads_per_sm(self) -> int:
        return MAX_THREADS_PER_SM[self.capability]

    @property
    def gpu(self) -> Gpu:
        """The part as kernels see it."""
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
"""The part that stands for an architecture where none is named: capability -> name."""


def target_names() -> tuple[str, ...]:
    """All names that `find_model` knows: architectures, then parts."""
    return (*(f"sm_{capability}" for capability in USUAL), *MODELS)


def find_model(target: str) -> GpuModel:
    """The part that a target names: "sm_90" (the usual part of it) or "h200".

    Raises:
        ValueError: no such target is known.
    """
    if target in MODELS:
        return MODELS[target]
    if (found := re.fullmatch(r"sm_(\d+)", target)) and int(found[1]) in USUAL:
        # What stands for an architecture keeps the architecture's name.
        return replace(MODELS[USUAL[int(found[1])]], name=target)
    raise ValueError(f"target {target!r} is not a known GPU: use one of {', '.join(target_names())}")


def find_models(targets: str) -> tuple[GpuModel, ...]:
    """The parts that "sm_80,sm_90" names, in that order.

    Raises:
        ValueError: no such target is known, or two of one architecture: code for one is not told from the other's.
    """
    models = tuple(find_model(target.strip()) for target in targets.split(","))
    for index, model in enumerate(models):
        for other in models[:index]:
            if model.capability == other.capability:
                names = f"{other.name!r} and {model.name!r}"
                raise ValueError(
                    f"targets {names} are both {model.arch}, and an artifact holds code for an architecture once: "
                    "name one of them, or export two files"
                )
    return models


_TARGET: ContextVar[Gpu | None] = ContextVar("executorch_moe_target_gpu", default=None)


@contextlib.contextmanager
def compile_for(gpu: Gpu) -> Iterator[None]:
    """Within it, kernels that are compiled take their configuration for `gpu`, whatever GPU is here."""
    token = _TARGET.set(gpu)
    try:
        yield
    finally:
        _TARGET.reset(token)


def gpu_of(device_index: int | None) -> Gpu:
    """The GPU that kernels are compiled for: the one of `compile_for`, else the CUDA device of this index.

    None is torch's current device, as in `torch.device("cuda")`.
    """
    if (target := _TARGET.get()) is not None:
        return target
    return _device(torch.cuda.current_device() if device_index is None else device_index)


@functools.cache
def _device(index: int) -> Gpu:
    """Properties of a CUDA device, asked for once and kept."""
    p = torch.cuda.get_device_properties(index)
    return Gpu(p.major * 10 + p.minor, p.multi_processor_count, p.shared_memory_per_block_optin)
