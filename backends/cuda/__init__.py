"""CUDA target: the partitioner, and compiling its delegates for the GPU of this or of another machine."""

from .cuda_partitioner import MoECudaPartitioner

__all__ = ["MoECudaPartitioner"]
