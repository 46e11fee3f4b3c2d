"""Chooses the tile configurations of an expert layer: from the checked-in tables, else by heuristics."""

from __future__ import annotations

from dataclasses import dataclass, replace

from executorch_moe.kernels.gpus import Gpu
from executorch_moe.kernels.schemes import K_BLOCK, Scheme
from executorch_moe.kernels.shapes import LayerShape

from .configs import GemmConfig, MatvecConfig, fit
from .tables import TunedLayer, find_table

MAX_PAIRS = 2**31 - 1
"""Largest number of pairs of token and expert in a call; routing counts them in 32 bits."""
MAX_VARIANTS = 3
"""Each variant costs two launches, and those of all but one do nothing."""


@dataclass(frozen=True)
class Variant:
    """Configurations of both GEMMs for P = T * top_k from `pairs_from` to `pairs_to`, both included."""

    pairs_from: int
    pairs_to: int
    gemm1: GemmConfig
    gemm2: GemmConfig


def matvec_configs(
    gpu: Gpu, scheme: Scheme, layer: LayerShape, num_tokens: int, tables: bool = True
) -> tuple[MatvecConfig, MatvecConfig] | None:
    """Sizes of both GEMMs for the matrix-vector path. None: another path is faster, or the scheme has none.

    Args:
        layer: with padded sizes. num_tokens: T.
        tables: False ignores the tables.
    """
    if not scheme.packed or scheme.act_group(2):
        return None
    table = find_table(gpu, scheme, layer) if tables else None
    if table is not None:
        return next(((row.gemm1, row.gemm2) for row in table.matvec if num_tokens <= row.up_to), None)
    return heuristic_matvec(layer) if num_tokens <= heuristic_matvec_limit(layer) else None


def few_token_configs(
    gpu: Gpu, scheme: Scheme, layer: LayerShape, num_tokens: int, tables: bool = True
) -> tuple[GemmConfig, GemmConfig] | None:
    """Configurations of both GEMMs for the few-token path, or None if the grouped path is faster.

    Args:
        layer: with padded sizes. num_tokens: T.
        tables: False ignores the tables.
    """
    table = find_table(gpu, scheme, layer) if tables else None
    if table is not None:
        for entry in table.few_tokens:
            if num_tokens <= entry.up_to:
                return _fitted(entry.gemm1, entry.gemm2, scheme, gpu)
        return None
    if num_tokens > heuristic_few_tokens_limit(layer):
        return None
    return heuristic_few_tokens(gpu, scheme, layer, num_tokens)


def grouped_variants(
    gpu: Gpu, scheme: Scheme, layer: LayerShape, num_pairs: int | None, tables: bool = True
) -> tuple[Variant, ...]:
    """Variants of the grouped path.

    Args:
        layer: with padded sizes.
        num_pairs: P, or None if it is known at run time only; then the variants cover any number of pairs.
        tables: False ignores the tables.
    """
    rows = _grouped_rows(gpu, scheme, layer, tables)
    if num_pairs is not None:
        _, gemm1, gemm2 = next(row for row in rows if num_pairs <= row[0])
        return (Variant(0, MAX_PAIRS, gemm1, gemm2),)
    # One variant for each tile height: its row for the most pairs, where a wrong choice costs most.
    last = {gemm1.block_m: (up_to, gemm1, gemm2) for up_to, gemm1, gemm2 in rows}
    if len(last) > MAX_VARIANTS and max(last) > 128:  # two tiles of half the height are almost as fast
        del last[max(last)]
    while len(last) > MAX_VARIANTS:  # heights are powers of two: the next one is almost as fast
        del last[sorted(last)[1]]
    kept = sorted(last.values(), key=lambda row: row[0])
    variants = []
    first = 0
    for up_to, gemm1, gemm2 in kept:
        end = MAX_PAIRS if gemm1 is kept[-1][1] else up_to
        variants.append(Variant(first, end, gemm1, gemm2))
        first = end + 1
    return tuple(variants)


def _fitted(
    gemm1: GemmConfig, gemm2: GemmConfig, scheme: Scheme, gpu: Gpu, one_height: bool = False
) -> tuple[GemmConfig, GemmConfig]:
    gemm1, gemm2 = fit(gemm1, scheme, 1, gpu), fit(gemm2, scheme, 2, gpu)
    if one_height and gemm1.block_m != gemm2.block_m:  # both GEMMs use the same row blocks
        height = min(gemm1.block_m, gemm2.block_m)
        gemm1, gemm2 = replace(gemm1, block_m=height), replace(gemm2, block_m=height)
    return gemm1, gemm2


def _grouped_rows(
    gpu: Gpu, scheme: Scheme, layer: LayerShape, tables: bool
) -> list[tuple[int, GemmConfig, GemmConfig]]:
    """Ascending rows (most pairs, GEMM1, GEMM2), up to MAX_PAIRS. Both GEMMs of a row have the same tile height."""
    table: TunedLayer | None = find_table(gpu, scheme, layer) if tables else None
    if table is not None:
        rows = [(entry.up_to * layer.experts, entry.gemm1, entry.gemm2) for entry in table.grouped]
    else:
        rows = []
        for up_to, height in HEURISTIC_HEIGHTS:
            gemm1, gemm2 = (heuristic_gemm(gpu, scheme, layer, gemm, height) for gemm in (1, 2))
            rows.append((up_to * layer.experts, gemm1, gemm2))
    rows[-1] = (MAX_PAIRS, rows[-1][1], rows[-1][2])
    return [(int(up_to), *_fitted(gemm1, gemm2, scheme, gpu, one_height=True)) for up_to, gemm1, gemm2 in rows]


# ------------------------------------------------------- heuristics, from measurements of the qwen35 shape on an H200

HEURISTIC_HEIGHTS = ((20, 16), (96, 64), (1e6, 128))
"""(largest mean number of pairs of an expert, tile height)."""


def heuristic_matvec(layer: LayerShape) -> tuple[MatvecConfig, MatvecConfig]:
    """Sizes of the matrix-vector path. With more scales for each weight, a thread of GEMM1 does more rows."""
    return MatvecConfig(32, 16) if layer.group_size < 128 else MatvecConfig(), MatvecConfig()


def heuristic_matvec_limit(layer: LayerShape) -> int:
    """Largest T of the matrix-vector path; 0 where a program cannot request all its weights at once."""
    sizes = heuristic_matvec(layer)
    slots = (1, power_of_two(layer.top_k))
    whole = all(
        slots[gemm - 1] * power_of_two(layer.rows_and_k(gemm)[1] // K_BLOCK) <= sizes[gemm - 1].chunk for gemm in (1, 2)
    )
    return 2 if whole else 0


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def heuristic_gemm(gpu: Gpu, scheme: Scheme, layer: LayerShape, gemm: int, block_m: int) -> GemmConfig:
    """Configuration of a GEMM of the grouped path for a tile height."""
    n, _ = layer.rows_and_k(gemm)
    warps = 4 if gpu.capability >= 90 else 8
    if block_m == 16:
        # Few tokens, many weights: tiles of many weight rows, so that few programs read each token row.
        tall = gpu.capability >= 90 and scheme.packed and n % 256 == 0
        return GemmConfig(16, 256 if tall else 128, num_warps=4, num_stages=3, ctas_per_sm=4, scale_after=True)
    if block_m == 128 and not (gpu.capability == 90 and scheme.packed):
        warps = 8  # four spill registers
    return GemmConfig(block_m, 128, num_warps=warps, num_stages=3, ctas_per_sm=2)


def heuristic_few_tokens(gpu: Gpu, scheme: Scheme, layer: LayerShape, num_tokens: int) -> tuple[GemmConfig, GemmConfig]:
    """Configurations of the few-token path: small tiles, so that the programs fill the GPU."""
    block_m = 8 if num_tokens <= 8 else 16
    found = []
    for gemm in (1, 2):
        n, k = layer.rows_and_k(gemm)
        programs = num_tokens * layer.top_k * (n // 64)
        split_k = 1
        while gemm == 2 and programs * split_k < 2 * gpu.num_sms and k // K_BLOCK >= 16 * split_k:
            split_k *= 2
        # Two K blocks at a time shorten a program, but leave fewer registers and less shared memory to others.
        unroll = 2 if programs * split_k <= 4 * gpu.num_sms else 1
        config = GemmConfig(block_m, 64, 1, 2, 3, unroll, split_k=split_k, scale_after=True)
        found.append(fit(config, scheme, gemm, gpu))
    return found[0], found[1]


def heuristic_few_tokens_limit(layer: LayerShape) -> int:
    """Largest T of the few-token path: each of its programs reads all pairs, so its work is quadratic in T."""
    return max(1, 64 // layer.top_k)
