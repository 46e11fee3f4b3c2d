"""Tile configurations: what one is, and what of it fits a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

from executorch_moe.kernels.gpus import MAX_DYNAMIC_SHARED, Gpu
from executorch_moe.kernels.schemes import K_BLOCK, Scheme

GROUP_SIZES_M = (1, 8, 16, 32)
"""Row blocks that a group of the tile order may hold."""


@dataclass(frozen=True)
class GemmConfig:
    """One tile configuration of the grouped GEMM.

    Attributes:
        block_m: tokens of a tile. block_n: weight rows of a tile (GEMM1: gate and up rows together).
        group_size_m: row blocks of a group in the tile order.
        num_warps, num_stages: of the compiled kernel and its software pipeline.
        unroll: K blocks of one step of the software pipeline.
        ctas_per_sm: programs that the persistent grid starts on each multiprocessor.
        split_k: parts of K that different programs take; few-token GEMM2 only, which sums over pairs anyway.
        scale_after: multiply the scale into the accumulator after each K block, not into the decoded weights: fewer
            instructions a weight, more an output, so it pays for small block_m. Only for symmetric W4A16 weights with
            group_size >= 128; otherwise it is ignored.
    """

    block_m: int
    block_n: int
    group_size_m: int = 8
    num_warps: int = 4
    num_stages: int = 3
    unroll: int = 1
    ctas_per_sm: int = 2
    split_k: int = 1
    scale_after: bool = False

    def __post_init__(self) -> None:
        if self.block_m < 8 or self.block_m & (self.block_m - 1):
            raise ValueError(f"block_m={self.block_m} must be a power of two of at least 8")
        if self.block_n not in (32, 64, 128, 256):
            raise ValueError(f"block_n={self.block_n} must be 32, 64, 128 or 256: packed rows are padded to 128")
        if self.group_size_m not in GROUP_SIZES_M:
            raise ValueError(f"group_size_m={self.group_size_m} must be one of {GROUP_SIZES_M}")


INTERPRETER_GPU = Gpu(90, 4, MAX_DYNAMIC_SHARED[90])
"""Stands in for a GPU under Triton's interpreter: few programs, so that each walks many tiles."""


def pipeline_bytes(config: GemmConfig, scheme: Scheme, gemm: int) -> int:
    """Shared memory of the software pipeline's buffers, bytes: activations and raw weights of each stage."""
    x_bytes = 1 if scheme.act_group(gemm) else 2
    stage = K_BLOCK * (config.block_m * x_bytes + config.block_n * scheme.weight_bits // 8)
    return config.num_stages * config.unroll * stage


def fit(config: GemmConfig, scheme: Scheme, gemm: int, gpu: Gpu) -> GemmConfig:
    """The configuration with as many stages, then as small a tile, as the GPU's shared memory asks for.

    Raises:
        ValueError: not even the smallest tile fits.
    """
    # The epilogue's transposition and barriers take a little beside the pipeline.
    budget = gpu.max_shared - 4096
    while pipeline_bytes(config, scheme, gemm) > budget:
        if config.unroll > 1:
            config = replace(config, unroll=config.unroll // 2)
        elif config.num_stages > 2:
            config = replace(config, num_stages=config.num_stages - 1)
        elif config.block_m > 16:
            config = replace(config, block_m=config.block_m // 2)
        elif config.block_n > 64:
            config = replace(config, block_n=config.block_n // 2)
        else:
            raise ValueError(
                f"no tile of GEMM{gemm} in scheme {scheme.name} fits {gpu.max_shared} bytes of shared memory "
                f"(sm_{gpu.capability}): use a GPU with 48 KB or more"
            )
    return config
