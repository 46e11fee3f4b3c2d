"""CUDA: the partitioner, and the delegate host that runs its delegates inside PyTorch."""

from executorch_moe.backends.cuda.partitioner import MoECudaPartitioner

__all__ = ["MoECudaPartitioner"]
