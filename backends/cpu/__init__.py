"""CPU: the same operators as ATen, for ExecuTorch's own CPU kernels."""

from executorch_moe.backends.cpu.partitioner import MoECpuPartitioner

__all__ = ["MoECpuPartitioner"]
