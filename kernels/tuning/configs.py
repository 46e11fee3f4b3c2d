"""Tile configurations, and how they are reduced to fit a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

from executorch_moe.kernels.gpus import Gpu
from executorch_moe.kernels.schemes import K_BLOCK, Scheme

GROUP_SIZES_M = (1, 8, 16, 32)
"""Allowed numbers of row blocks in a group of the tile order."""


@dataclass(frozen=True)
class GemmConfig:
    """Tile configuration of one GEMM.

    Attributes:
        block_m: tokens of a tile, a power of two of at least 8.
        block_n: weight rows of a tile (GEMM1: gate and up rows together), 32, 64, 128 or 256.
        group_size_m: row blocks of a group in the tile order, one of GROUP_SIZES_M.
        num_warps: of a program. num_stages: of the software pipeline. unroll: K blocks of one of its steps.
        ctas_per_sm: programs of the persistent grid for each multiprocessor.
        split_k: number of parts of K, each done by a different program. Only for GEMM2 of the few-token path, which
            sums over pairs anyway.
        scale_after: multiply the accumulator by the scale after each K block, instead of the decoded weights. It takes
            fewer instructions for each weight and more for each output, so it pays off for small block_m. Only for
            W4A16 weights without zero points and with group_size >= 128; otherwise it is ignored.

    Raises:
        ValueError: block_m, block_n or group_size_m is not an allowed value.
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


@dataclass(frozen=True)
class GluonConfig:
    """Tile configuration of one GEMM of the Gluon kernel (kernels/gluon).

    Attributes:
        block_m: tokens of a tile, 16 to 256. block_n: weight rows of a tile (GEMM1: gate and up rows together), 64, 128
            or 256, 16 or 32 for each warp that multiplies.
        num_warps: that multiply, 4 or 8; four more load.
        num_stages: K blocks that are in shared memory at once. pieces: parts of a K block that are decoded at once, 2
            or 4. group_size_m, ctas_per_sm: as in `GemmConfig`.
        fence: order the copies of tokens before the reads of the tensor cores with a fence of its own.

    Raises:
        ValueError: a value is not allowed.
    """

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 4
    pieces: int = 2
    group_size_m: int = 1
    ctas_per_sm: int = 1
    fence: bool = False

    def __post_init__(self) -> None:
        allowed = {"block_m": (16, 32, 64, 128, 256), "num_warps": (4, 8), "pieces": (2, 4)}
        allowed["block_n"] = (16 * self.num_warps, 32 * self.num_warps)
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)} must be one of {values}")
        if self.num_stages < 2:
            raise ValueError(f"num_stages={self.num_stages} must be at least 2")


@dataclass(frozen=True)
class MatvecConfig:
    """Sizes of a program of the matrix-vector path for one GEMM.

    Attributes:
        rows: weight rows (GEMM1: gate and up rows together), a power of two; of GEMM1 at least 16.
        reps: rows of a thread, a power of two of at most half of `rows`.
        chunk: largest number of K blocks that are loaded at once, of all experts of a program, a power of two.

    Raises:
        ValueError: a value is not allowed.
    """

    rows: int = 16
    reps: int = 8
    chunk: int = 64

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name}={value} must be a power of two")
        if self.reps * 2 > self.rows:
            raise ValueError(f"reps={self.reps} must be at most half of rows={self.rows}")


def pipeline_bytes(config: GemmConfig, scheme: Scheme, gemm: int) -> int:
    """Bytes of shared memory for the software pipeline: activations and packed weights of each stage."""
    x_bytes = 1 if scheme.act_group(gemm) else 2
    stage = K_BLOCK * (config.block_m * x_bytes + config.block_n * scheme.weight_bits // 8)
    return config.num_stages * config.unroll * stage


def fit(config: GemmConfig, scheme: Scheme, gemm: int, gpu: Gpu) -> GemmConfig:
    """Reduce a configuration until it fits the GPU's shared memory: first unrolling and stages, then the tile.

    Raises:
        ValueError: the smallest tile does not fit.
    """
    # The epilogue's transposition and barriers need a little shared memory too.
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
