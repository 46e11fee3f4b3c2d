"""What an export for a GPU that is not here was compiled with: configurations, GEMM templates, shared memory."""

from __future__ import annotations

import dataclasses
from typing import Any

from executorch_moe.kernels.gpus import GpuModel

from . import host_toolchain

OUR_PREFIX = "moe_"
"""How the names of this package's kernels start."""


@dataclasses.dataclass(frozen=True)
class KernelChoice:
    """One compiled kernel.

    Attributes:
        method: of the program.
        kernel: its name in the artifact.
        candidates: configurations that it lists; config: the one that was taken (`kernel_configs`), and what the kernel
            was specialized for.
        shared: dynamic shared memory that it is launched with, bytes.
    """

    method: str
    kernel: str
    candidates: int
    config: dict[str, Any]
    shared: int

    @property
    def ours(self) -> bool:
        """True for a kernel of this package, whose configuration comes from its tables; False for Inductor's."""
        return self.kernel.startswith(OUR_PREFIX)


@dataclasses.dataclass(frozen=True)
class GemmChoice:
    """One dense GEMM of Inductor's. `candidates`: templates there were; `template`: the one with the best score."""

    method: str
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

    @property
    def shared(self) -> int:
        """Largest shared memory of a kernel, bytes."""
        return max((choice.shared for choice in self.kernels), default=0)

    def __str__(self) -> str:
        return (
            f"{self.model.product} ({self.model.arch}): {len(self.kernels)} kernels, up to {self.shared} of "
            f"{self.model.max_shared} bytes of shared memory; host code for {self.cpu}"
        )

    def check_shared(self, budget: int | None = None) -> None:
        """Check that every kernel can be launched on the GPU, or stays within a smaller budget.

        Raises:
            ValueError: kernels that need more; names them all.
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
