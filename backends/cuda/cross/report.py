"""Report of an export for another GPU: chosen configurations, GEMM templates, shared memory."""

from __future__ import annotations

import dataclasses
from typing import Any

from executorch_moe.kernels.gpus import GpuModel

from . import host_toolchain

OUR_PREFIX = "moe_"
"""Prefix of the names of this package's kernels."""


@dataclasses.dataclass(frozen=True)
class KernelChoice:
    """One compiled kernel.

    Attributes:
        method: method of the program.
        kernel: name in the artifact.
        candidates: number of configurations that it lists.
        config: the chosen configuration (`kernel_configs`), and the constants that the kernel is specialized for.
        shared: dynamic shared memory at launch, bytes.
    """

    method: str
    kernel: str
    candidates: int
    config: dict[str, Any]
    shared: int

    @property
    def ours(self) -> bool:
        """True for a kernel of this package, configured by its tables; False for other kernels."""
        return self.kernel.startswith(OUR_PREFIX)


@dataclasses.dataclass(frozen=True)
class GemmChoice:
    """One dense GEMM of Inductor. `candidates`: number of templates; `template`: the one with the best score."""

    method: str
    shape: tuple[int, ...]
    candidates: int
    template: str


@dataclasses.dataclass
class CrossCompileReport:
    """All choices of an export for one GPU; filled while lowering."""

    model: GpuModel
    cpu: str = host_toolchain.CPU_BASELINE
    kernels: list[KernelChoice] = dataclasses.field(default_factory=list)
    gemms: list[GemmChoice] = dataclasses.field(default_factory=list)

    @property
    def shared(self) -> int:
        """Largest shared memory of any kernel, bytes."""
        return max((choice.shared for choice in self.kernels), default=0)

    def __str__(self) -> str:
        return (
            f"{self.model.product} ({self.model.arch}): {len(self.kernels)} kernels, up to {self.shared} of "
            f"{self.model.max_shared} bytes of shared memory; host code for {self.cpu}"
        )

    def check_shared(self, budget: int | None = None) -> None:
        """Check that every kernel fits into the shared memory of the GPU, or into a smaller budget in bytes.

        Raises:
            ValueError: kernels need more; the message lists all of them.
        """
        limit = self.model.max_shared if budget is None else budget
        if over := [choice for choice in self.kernels if choice.shared > limit]:
            listed = ", ".join(f"{choice.kernel} of {choice.method} ({choice.shared})" for choice in over)
            raise ValueError(
                f"{self.model.arch}: kernels need more than {limit} bytes of shared memory: {listed}: "
                "raise the budget, or choose another target or scheme"
            )

    def as_dict(self) -> dict[str, Any]:
        """For JSON: target, product, arch, cpu, max_shared, shared, kernels, gemms."""
        return {
            "target": self.model.name,
            "product": self.model.product,
            "arch": self.model.arch,
            "cpu": self.cpu,
            "max_shared": self.model.max_shared,
            "shared": self.shared,
            "kernels": [{**dataclasses.asdict(choice), "ours": choice.ours} for choice in self.kernels],
            "gemms": [dataclasses.asdict(choice) for choice in self.gemms],
        }
