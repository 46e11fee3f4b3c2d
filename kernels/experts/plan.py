"""From the operator's arguments to kernel launches: path, buffers and configurations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from executorch_moe.kernels.arguments import ExpertArguments
from executorch_moe.kernels.decode.launches import run_one_token_linear
from executorch_moe.kernels.gpus import Gpu
from executorch_moe.kernels.launch import Launch, kernel_gpu, ptx_of
from executorch_moe.kernels.packing.fragments import fragment_order
from executorch_moe.kernels.schemes import max_scale_ratio, round_up
from executorch_moe.kernels.tuning.choose import (
    MAX_PAIRS,
    Variant,
    few_token_configs,
    grouped_variants,
    heuristic_few_tokens,
    matvec_configs,
)
from executorch_moe.kernels.tuning.configs import GemmConfig

from .elementwise import moe_quantize_rows, moe_sum_pairs
from .few_tokens_gemm import moe_few_tokens_gemm
from .grouped_gemm import moe_grouped_gemm
from .matvec_plan import run_matvec
from .problem import Options as Options
from .problem import Problem as Problem
from .problem import cdiv, needs_wide_offsets
from .routing import Heights, Routing, max_row_blocks, run_routing

SHORT_WAVE = 3
"""Few-token launches with at most this many programs a multiprocessor are optimized for latency."""


def check_config(config: GemmConfig, gemm: int, n: int) -> None:
    """Check that the tiles of GEMM `gemm` divide its N weight rows.

    Raises:
        ValueError: they do not.
    """
    if n % config.block_n:
        raise ValueError(f"block_n={config.block_n} must divide N={n} of GEMM{gemm}: use block_n=128")


def tile_constants(config: GemmConfig, constants: dict[str, Any]) -> dict[str, Any]:
    """Constexprs of a configuration that both GEMM kernels share."""
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "NUM_STAGES": config.num_stages,
        "UNROLL": config.unroll,
        "SCALE_AFTER": config.scale_after and constants["GROUP"] >= 128 and not constants["HAS_ZERO"],
    }


def run_few_tokens(p: Problem) -> Tensor:
    """Two launches: GEMM1 with the activation, GEMM2 with the weighted sum over top_k."""
    chosen = few_token_configs(p.gpu, p.scheme, p.layer, p.num_tokens, p.options.tables)
    if chosen is None:  # the path was forced
        chosen = heuristic_few_tokens(p.gpu, p.scheme, p.layer, p.num_tokens)
    configs = (p.options.gemm1 or chosen[0], p.options.gemm2 or chosen[1])
    for gemm, config in enumerate(configs, start=1):
        check_config(config, gemm, p.layer.rows_and_k(gemm)[0])
    split_k = configs[1].split_k
    arrivals = triton.next_power_of_2(p.h_pad // configs[1].block_n)
    counters = p.empty((arrivals,), torch.int32)
    hidden = p.empty((p.num_pairs, p.i_pad), torch.bfloat16)
    y = p.empty((split_k * p.num_pairs, p.h), torch.float32)
    out = p.empty((p.num_tokens, p.h), torch.bfloat16)
    for gemm, config, x, made in ((1, configs[0], p.hidden_states, hidden), (2, configs[1], hidden, y)):
        constants = p.constants(gemm)
        parts = split_k if gemm == 2 else 1
        programs = constants["N"] // config.block_n * p.num_pairs * parts
        p.submit(
            Launch(
                moe_few_tokens_gemm,
                (constants["N"] // config.block_n, p.num_pairs, parts),
                {
                    "x_ptr": x,
                    "x_scale_ptr": x,
                    **p.weights(gemm),
                    "y_ptr": made,
                    "pair_weight_ptr": p.topk_weights,
                    "topk_ids_ptr": p.topk_ids,
                    "arrivals_ptr": counters,
                    "out_ptr": out,
                    "num_tokens": p.num_tokens,
                },
                {
                    **constants,
                    **tile_constants(config, constants),
                    "NUM_ARRIVALS": arrivals,
                    "NUM_EXPERTS": p.num_experts,
                    "PAIRS": triton.next_power_of_2(p.num_pairs),
                    "TOKENS": triton.next_power_of_2(p.num_tokens),
                    "STRIDE_X": int(x.shape[1]),
                    "ACT_GROUP": 0,  # int8 takes one more launch and is less exact; weight bytes limit few tokens
                    "SPLIT_K": parts,
                    "SHORT": programs <= SHORT_WAVE * p.gpu.num_sms,
                },
                num_warps=config.num_warps,
            )
        )
    return out


def quantize_rows(p: Problem, x: Tensor, rows: Any, k: int, act_group: int) -> tuple[Tensor, Tensor]:
    """One launch: bf16 [rows, k] -> int8 codes [rows, Kp] and fp32 scales [rows, ceil(Kp / act_group)]."""
    k_pad = round_up(k, 128)
    groups = cdiv(k_pad, act_group)
    groups_pow2 = triton.next_power_of_2(groups)
    q = p.empty((rows, k_pad), torch.int8)
    scale = p.empty((rows, groups), torch.float32)
    p.submit(
        Launch(
            moe_quantize_rows,
            (rows,),
            {"x_ptr": x, "q_ptr": q, "scale_ptr": scale},
            {
                "K": k,
                "KP": k_pad,
                "ACT_GROUP": act_group,
                "NUM_GROUPS": groups,
                "GROUPS_POW2": groups_pow2,
                "MAX_RATIO": max_scale_ratio(k_pad),
                "PTX": p.ptx,
            },
            num_warps=min(16, max(4, groups_pow2 * act_group // 1024)),
        )
    )
    return q, scale


def run_grouped_gemm(
    p: Problem, gemm: int, variants: tuple[Variant, ...], x: Tensor, rows: Any, out: Tensor, r: Routing
) -> None:
    """GEMM1 or GEMM2 over the row blocks of routing: one launch for each variant, of which all but one do nothing."""
    constants = p.constants(gemm)
    act_group = p.scheme.act_group(gemm)
    scale = x
    if act_group:
        x, scale = quantize_rows(p, x, rows, constants["K"], act_group)
    wide = needs_wide_offsets(rows, int(x.shape[1]))
    for variant in variants:
        config = variant.gemm1 if gemm == 1 else variant.gemm2
        check_config(config, gemm, constants["N"])
        tiles = max_row_blocks(p.num_pairs, p.num_experts, config.block_m) * (constants["N"] // config.block_n)
        programs = p.gpu.num_sms * config.ctas_per_sm
        if p.options.persistent:
            grid = min(programs, tiles) if isinstance(tiles, int) else programs
        else:
            grid = tiles
        p.submit(
            Launch(
                moe_grouped_gemm,
                (grid,),
                {
                    "x_ptr": x,
                    "x_scale_ptr": scale,
                    **p.weights(gemm),
                    "out_ptr": out,
                    "pair_weight_ptr": p.topk_weights,
                    **r.pointers(),
                    "num_pairs": p.num_pairs,
                },
                {
                    **constants,
                    **tile_constants(config, constants),
                    "PAIRS_FROM": variant.pairs_from,
                    "PAIRS_TO": variant.pairs_to,
                    "STRIDE_X": int(x.shape[1]),
                    "WIDE_X": wide,
                    "ACT_GROUP": act_group,
                    "GROUP_SIZE_M": p.options.group_size_m or config.group_size_m,
                    "PERSISTENT": p.options.persistent,
                },
                num_warps=config.num_warps,
            )
        )


def forced_variants(p: Problem) -> tuple[Variant, ...]:
    """The variants to run: those of the options, else those of the tables or heuristics.

    Raises:
        ValueError: forced configurations of both GEMMs differ in block_m.
    """
    if p.options.variants is not None:
        return p.options.variants
    pairs = p.num_pairs if isinstance(p.num_pairs, int) else None
    variants = grouped_variants(p.gpu, p.scheme, p.layer, pairs, p.options.tables)
    if p.options.gemm1 is None and p.options.gemm2 is None:
        return variants
    gemm1 = p.options.gemm1 or variants[-1].gemm1
    gemm2 = p.options.gemm2 or variants[-1].gemm2
    if gemm1.block_m != gemm2.block_m:
        raise ValueError(
            f"block_m={gemm1.block_m} of GEMM1 and {gemm2.block_m} of GEMM2 differ: both walk the same row blocks"
        )
    return (Variant(0, MAX_PAIRS, gemm1, gemm2),)


def run_grouped(p: Problem) -> Tensor:
    """Routing, GEMM1, GEMM2, sum over top_k."""
    variants = forced_variants(p)
    routing = run_routing(p, Heights.of(variants))
    hidden = p.empty((p.num_pairs, p.i_pad), torch.bfloat16)
    run_grouped_gemm(p, 1, variants, p.hidden_states, p.num_tokens, hidden, routing)
    y = p.empty((p.num_pairs, p.h), torch.bfloat16)
    run_grouped_gemm(p, 2, variants, hidden, p.num_pairs, y, routing)
    return sum_pairs(p, y)


def sum_pairs(p: Problem, y: Tensor) -> Tensor:
    """One launch: bf16 [P, H] in pair order, weighted -> bf16 [T, H], the sum over top_k."""
    out = p.empty((p.num_tokens, p.h), torch.bfloat16)
    block_h = min(1024, triton.next_power_of_2(p.h))
    p.submit(
        Launch(
            moe_sum_pairs,
            (p.num_tokens, cdiv(p.h, block_h)),
            {"y_ptr": y, "topk_ids_ptr": p.topk_ids, "out_ptr": out},
            {"H": p.h, "TOP_K": p.top_k, "NUM_EXPERTS": p.num_experts, "BLOCK_H": block_h, "PTX": p.ptx},
        )
    )
    return out


def run_gluon(p: Problem) -> Tensor:
    """`run_grouped` with the GEMMs of kernels/gluon."""
    from executorch_moe.kernels.gluon.launches import check_gluon, default_configs, gluon_gemm

    for gemm in (1, 2):
        packed_bf16 = p.scheme.packed and fragment_order(p.scheme, gemm) == "w4a16"
        check_gluon(p.gpu, p.constants(gemm), packed_bf16, int(p.hidden_states.storage_offset()))
    configs = p.options.gluon or default_configs(p.layer, p.num_pairs)
    if configs[0].block_m != configs[1].block_m:
        raise ValueError(
            f"block_m={configs[0].block_m} of GEMM1 and {configs[1].block_m} of GEMM2 differ: "
            "both walk the same row blocks"
        )
    routing = run_routing(p, Heights(configs[0].block_m))
    hidden = p.empty((p.num_pairs, p.i_pad), torch.bfloat16)
    y = p.empty((p.num_pairs, p.h), torch.bfloat16)
    for gemm, x, out in ((1, p.hidden_states, hidden), (2, hidden, y)):
        config, constants = configs[gemm - 1], p.constants(gemm)
        tensors = {
            "x_ptr": x,
            **p.weights(gemm),
            "out_ptr": out,
            "pair_weight_ptr": p.topk_weights,
            **routing.pointers(),
        }
        tiles = max_row_blocks(p.num_pairs, p.num_experts, config.block_m) * (constants["N"] // config.block_n)
        p.submit(gluon_gemm(p.gpu, config, tensors, constants, int(x.shape[1]), tiles))
    return sum_pairs(p, y)


def run_fused_experts(
    arguments: ExpertArguments,
    *,
    options: Options = Options(),
    gpu: Gpu | None = None,
    submit: Callable[[Launch], None] = Launch.run,
) -> Tensor:
    """Run the expert layer with the Triton kernels. The arguments must be checked; `op.fused_experts` does that.

    Args:
        arguments: of the operator.
        options: forced choices. gpu: to configure kernels for; None is the GPU of the tensors.
        submit: called with each launch; the default runs it.

    Returns:
        bf16 [T, H].
    """
    hidden_states = arguments.hidden_states
    gpu = gpu or kernel_gpu(hidden_states)
    num_tokens = hidden_states.shape[0]
    if isinstance(num_tokens, int) and num_tokens == 0:
        return torch.empty_like(hidden_states)
    p = Problem(arguments, gpu, ptx_of(gpu), options, submit)
    path = options.path or choose_path(p)
    out = RUN[path](p)
    return out if arguments.shared is None or path == "matvec" else _with_shared(p, out)


def _with_shared(p: Problem, out: Tensor) -> Tensor:
    """Adds the shared expert with a launch of its own. bf16 [1, H]."""
    a = p.arguments
    assert a.shared is not None and a.shared_down is not None
    dense = run_one_token_linear(a.shared, a.shared_down, a.shared_down_scale, gpu=p.gpu, submit=p.submit)
    return (out + dense * a.share).to(out.dtype)


def choose_path(p: Problem) -> str:
    """The fastest path for the number of tokens; "grouped" if it is known at run time only."""
    if isinstance(p.num_tokens, int):
        of_layer = (p.gpu, p.scheme, p.layer, p.num_tokens, p.options.tables)
        if matvec_configs(*of_layer) is not None and p.has_aligned_pairs:
            return "matvec"
        if few_token_configs(*of_layer) is not None:
            return "few_tokens"
    return "grouped"


RUN: dict[str, Callable[[Problem], Tensor]] = {
    "matvec": run_matvec,
    "few_tokens": run_few_tokens,
    "grouped": run_grouped,
    "gluon": run_gluon,
}
"""The paths by name."""
