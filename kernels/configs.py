"""Tile shapes: what a configuration is, what fits a GPU, and the choice for a problem."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .gpus import MAX_DYNAMIC_SHARED, Gpu
from .schemes import K_BLOCK, Scheme

GROUP_SIZES_M = (1, 8, 16, 32)
"""Row blocks that a group of the tile order may hold."""


@dataclass(frozen=True)
class GemmConfig:
    """One tile configuration of `moe_grouped_gemm`.

    Attributes:
        block_m: tokens of a tile. block_n: weight rows of a tile (GEMM1: gate and up rows together).
        group_size_m: row blocks of a group in the tile order.
        num_warps, num_stages: of the compiled kernel and its software pipeline.
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
    ctas_per_sm: int = 2
    split_k: int = 1
    scale_after: bool = False

    def __post_init__(self) -> None:
        if self.block_m < 8 or self.block_m & (self.block_m - 1):
            raise ValueError(f"block_m={self.block_m} must be a power of two of at least 8")
        if self.block_n not in (64, 128, 256):
            raise ValueError(f"block_n={self.block_n} must be 64, 128 or 256: packed rows are padded to 128")
        if self.group_size_m not in GROUP_SIZES_M:
            raise ValueError(f"group_size_m={self.group_size_m} must be one of {GROUP_SIZES_M}")


INTERPRETER_GPU = Gpu(90, 4, MAX_DYNAMIC_SHARED[90])
"""Stands in for a GPU under Triton's interpreter: few programs, so that each walks many tiles."""


def pipeline_bytes(config: GemmConfig, scheme: Scheme, gemm: int) -> int:
    """Shared memory of the software pipeline's buffers, bytes: activations and raw weights of each stage."""
    x_bytes = 1 if scheme.act_group(gemm) else 2
    stage = K_BLOCK * (config.block_m * x_bytes + config.block_n * scheme.weight_bits // 8)
    return config.num_stages * stage


def fit(config: GemmConfig, scheme: Scheme, gemm: int, gpu: Gpu) -> GemmConfig:
    """The configuration with as many stages, then as small a tile, as the GPU's shared memory asks for."""
    # The epilogue's transposition and barriers take a little beside the pipeline.
    budget = gpu.max_shared - 4096
    while pipeline_bytes(config, scheme, gemm) > budget:
        if config.num_stages > 2:
            config = replace(config, num_stages=config.num_stages - 1)
        elif config.block_m > 16:
            config = replace(config, block_m=config.block_m // 2)
        else:
            config = replace(config, block_n=config.block_n // 2)
    return config


def choose_block_m(num_pairs: int | None, num_experts: int) -> int:
    """Tokens of a tile from the mean number of pairs an expert has; None stands for a number known only at run time."""
    return 64 if num_pairs is None or num_pairs > 20 * num_experts else 16


def choose_gemm(gpu: Gpu, scheme: Scheme, gemm: int, n: int, num_experts: int, num_pairs: int | None) -> GemmConfig:
    """Heuristic configuration for one GEMM, from sweeps of the qwen35 shape on an H200.

    Args:
        gpu: the target. scheme: number formats. gemm: 1 or 2. n: rows of the packed matrix, a multiple of 128.
        num_experts: E. num_pairs: T * top_k, None if it is symbolic.
    """
    block_m = choose_block_m(num_pairs, num_experts)
    hopper = gpu.capability >= 90
    wide = hopper and n % 256 == 0
    crowded = num_pairs is not None and num_pairs > 160 * num_experts
    if block_m == 16:
        # Weights stream past a few tokens: tall tiles, so that each token row is read by few programs, unless there
        # are too few of them to go round.
        row_blocks = min(num_pairs or 0, num_experts)
        tall = wide and row_blocks * n // 256 >= 2 * gpu.num_sms
        config = GemmConfig(block_m, 256 if tall else 128, num_warps=4, num_stages=4, ctas_per_sm=2)
    elif gemm == 2 and wide and scheme.packed and not crowded:
        config = GemmConfig(block_m, 256, num_warps=8, num_stages=3, ctas_per_sm=2)
    else:
        stages = 4 if crowded and gemm == 2 else 3
        config = GemmConfig(block_m, 128, num_warps=4 if hopper else 8, num_stages=stages, ctas_per_sm=2)
    return fit(replace(config, scale_after=not crowded), scheme, gemm, gpu)


def choose_few_tokens(gpu: Gpu, scheme: Scheme, gemm: int, n: int, k: int, num_tokens: int, num_pairs: int) -> GemmConfig:
    """Heuristic configuration of the few-token path: small tiles, deep pipelines, enough programs to fill the GPU."""
    block_m = 8 if num_tokens <= 8 else 16
    split_k = 1
    while gemm == 2 and num_pairs * (n // 64) * split_k < gpu.num_sms and k // K_BLOCK >= 16 * split_k:
        split_k *= 2
    config = GemmConfig(block_m, 64, 1, num_warps=4, num_stages=6, split_k=split_k, scale_after=True)
    return fit(config, scheme, gemm, gpu)


def few_tokens_limit(top_k: int) -> int:
    """Largest T that takes the few-token path."""
    return max(1, 128 // top_k)
