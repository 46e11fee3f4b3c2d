"""CPU target: our operators as plain ATen, for ExecuTorch's own CPU kernels."""

from .cpu_partitioner import MoECpuPartitioner

__all__ = ["MoECpuPartitioner"]
