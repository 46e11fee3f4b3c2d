"""CUDA: the partitioner, and the delegate host that runs its delegates inside PyTorch."""

from .cuda_partitioner import MoECudaPartitioner

__all__ = ["MoECudaPartitioner"]
