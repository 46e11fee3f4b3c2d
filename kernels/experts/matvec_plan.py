"""The launches of the matrix-vector path."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from executorch_moe.kernels.launch import Launch
from executorch_moe.kernels.tuning.choose import heuristic_matvec, matvec_configs
from executorch_moe.kernels.tuning.configs import MatvecConfig

from .matvec import moe_matvec
from .problem import Problem, cdiv


def run_matvec(p: Problem, logits: Tensor | None = None) -> Tensor:
    """Two launches: GEMM1 with the activation, GEMM2 with the weighted sum over top_k.

    Args:
        logits: of one token, fp32 [E], each a bf16. The kernels choose the experts by them, not by ids and weights.

    Raises:
        ValueError: the weights are not packed in 4 bits, activations are not aligned to 32 bits, or the rows of a
            program do not divide the layer.
    """
    if not p.scheme.packed or p.scheme.act_group(2) or not p.has_aligned_pairs:
        raise ValueError(
            f"scheme {p.scheme.name} with hidden size {p.h} has no matrix-vector path: it is for packed 4-bit weights, "
            "bf16 activations in GEMM2, an even hidden size, and tokens that start at an even element of their storage"
        )
    configs = p.options.matvec
    if configs is None:
        configs = matvec_configs(p.gpu, p.scheme, p.layer, p.num_tokens, p.options.tables) or heuristic_matvec(p.layer)
    hidden = p.empty((p.num_pairs, p.i_pad), torch.bfloat16)
    out = p.empty((p.num_tokens, p.h), torch.bfloat16)
    p.submit(matvec_launch(p, 1, configs[0], p.hidden_states, hidden, logits))
    p.submit(matvec_launch(p, 2, configs[1], hidden, out, logits))
    return out


def matvec_launch(
    p: Problem, gemm: int, config: MatvecConfig, x: Tensor, out: Tensor, logits: Tensor | None = None
) -> Launch:
    """The launch of one GEMM. x, out: see the kernel's parameters; logits: see `run_matvec`."""
    constants = p.constants(gemm)
    del constants["W_BITS"]
    n, k_blocks = constants["N"], constants["KP"] // 128
    if n % config.rows or (gemm == 1 and config.rows < 16):
        raise ValueError(f"rows={config.rows} must divide N={n} of GEMM{gemm}, and be at least 16 in GEMM1: use 16")
    slots = 1 if gemm == 1 else triton.next_power_of_2(p.top_k)
    threads_of_block = 4 * (config.rows // config.reps)
    blocks = min(triton.next_power_of_2(k_blocks), max(1, config.chunk // slots))
    blocks = max(blocks, 32 // (threads_of_block * slots))  # at least one warp
    shared = p.arguments.shared
    width = 1 if shared is None else int(shared.shape[1])
    return Launch(
        moe_matvec,
        (n // config.rows, p.num_pairs if gemm == 1 else p.num_tokens),
        {
            "x_ptr": x,
            **p.weights(gemm),
            "pair_weight_ptr": p.topk_weights if logits is None else logits,
            "topk_ids_ptr": p.topk_ids if logits is None else logits,
            **p.dense(),
            "out_ptr": out,
        },
        {
            **constants,
            "NUM_EXPERTS": p.num_experts,
            "STRIDE_X": int(x.shape[1]),
            "ROWS": config.rows,
            "REPS": config.reps,
            "SLOTS": slots,
            "BLOCKS": blocks,
            "CHUNKS": cdiv(k_blocks, blocks),
            "HAS_SHARED": shared is not None,
            "HAS_DENSE_SCALE": p.arguments.shared_down_scale is not None,
            "S": width,
            "S_POW2": triton.next_power_of_2(width),
        },
        num_warps=slots * blocks * threads_of_block // 32,
    )
