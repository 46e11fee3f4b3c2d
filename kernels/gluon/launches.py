"""Launches of the Gluon kernel: what it supports, its tile configuration, shared memory and registers."""

from __future__ import annotations

from typing import Any

from executorch_moe.kernels.gpus import Gpu
from executorch_moe.kernels.launch import Launch
from executorch_moe.kernels.schemes import K_BLOCK
from executorch_moe.kernels.shapes import LayerShape
from executorch_moe.kernels.tuning.configs import GluonConfig

LOADING_WARPS = 4


def check_gluon(gpu: Gpu, constants: dict[str, Any], packed_bf16: bool, offset: int) -> None:
    """Check that the Gluon kernel supports a GEMM.

    Args:
        gpu: to run on. constants: constexprs of the GEMM. packed_bf16: its weights are packed for bf16 activations.
        offset: where the tokens start in their memory, in elements.

    Raises:
        ValueError: another GPU than sm_90, or weights, zero points or tokens that the kernel does not read.
    """
    if gpu.capability != 90:
        raise ValueError(
            f"path='gluon' multiplies with wgmma, which only sm_90 has, but the GPU is sm_{gpu.capability}: "
            "use path='grouped', or None for the fastest"
        )
    if not packed_bf16 or constants["HAS_ZERO"]:
        what = "zero points" if packed_bf16 else "this scheme"
        raise ValueError(
            f"path='gluon' supports scheme w4a16 without zero points, not {what}: use path='grouped', or None"
        )
    if offset % 8:
        raise ValueError(
            f"path='gluon' copies 16 bytes of a token at once, but the tokens start {offset} values into their memory, "
            "not a multiple of 8: pass a copy (clone) of them, or use path='grouped'"
        )


def stage_bytes(config: GluonConfig) -> int:
    """Shared memory of one place of the ring, without scales: packed weights and tokens of a K block."""
    return K_BLOCK * (config.block_m * 2 + config.block_n // 2)


def max_registers(config: GluonConfig) -> int:
    """Registers of a thread, on average over a program, with which `ctas_per_sm` programs are resident."""
    threads = 32 * (config.num_warps + LOADING_WARPS) * config.ctas_per_sm
    return min(255, 65536 // threads // 8 * 8)


def default_configs(layer: LayerShape, num_pairs: Any) -> tuple[GluonConfig, GluonConfig]:
    """Configurations of both GEMMs: tiles as high as the mean number of pairs of an expert, at most 128."""
    mean = num_pairs / layer.experts if isinstance(num_pairs, int) else 64
    block_m = 32 if mean <= 24 else 64 if mean <= 96 else 128
    wide = all(layer.rows_and_k(gemm)[0] % 256 == 0 for gemm in (1, 2))
    stages = (8, 6, 4)[(32, 64, 128).index(block_m)]
    config = GluonConfig(block_m, 256, 8, stages) if wide else GluonConfig(block_m, 128, 4, stages // 2, ctas_per_sm=2)
    return config, config


def gluon_gemm(
    gpu: Gpu, config: GluonConfig, tensors: dict[str, Any], constants: dict[str, Any], stride_x: int, tiles: Any
) -> Launch:
    """GEMM1 or GEMM2 of the expert layer with the Gluon kernel.

    Args:
        tensors: arguments of `moe_grouped_gemm` by name; those that the kernel does not have are left out.
        constants: constexprs of the GEMM. stride_x: elements from one row of x to the next.
        tiles: largest number of tiles that routing may give.
    """
    from .grouped_gemm import moe_gluon_grouped_gemm  # not every installation that exports has Gluon

    names = set(moe_gluon_grouped_gemm.arg_names)
    if constants["N"] % config.block_n:
        raise ValueError(f"block_n={config.block_n} must divide N={constants['N']} of GEMM{constants['GEMM']}: use 128")
    programs = gpu.num_sms * config.ctas_per_sm
    return Launch(
        moe_gluon_grouped_gemm,
        (min(programs, tiles) if isinstance(tiles, int) else programs,),
        {name: tensor for name, tensor in tensors.items() if name in names},
        {
            **{name: value for name, value in constants.items() if name in names},
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "GROUP_SIZE_M": config.group_size_m,
            "NUM_STAGES": config.num_stages,
            "PIECES": config.pieces,
            "STRIDE_X": stride_x,
            "LOADING_REGISTERS": 48 if config.ctas_per_sm <= 2 else 40,
            "FENCE": config.fence,
        },
        num_warps=config.num_warps,
        max_registers=max_registers(config),
    )
