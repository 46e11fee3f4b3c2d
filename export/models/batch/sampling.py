"""Sampling the next token of each row, with settings of its own; see `export.models.sampling`.

A row's token is the one that `sample` draws for it alone, apart from the rounding of sums.

Letters: T rows, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from executorch_moe.export.models.sampling import ROUNDS, STEPS_PER_UNIT, WAYS, WIDTHS, FindNucleus, gumbel_noise


def nucleus_rows(below: Tensor, weights: Tensor, top_p: Tensor) -> Tensor:
    """`sampling.nucleus` for rows: below and weights fp32 [T, V], top_p fp32 [T] -> bool [T, V].

    The sums of a round are separate reductions of the same numbers, so that one kernel reads these once for all.
    """
    key = (below * STEPS_PER_UNIT).clamp(max=float(WAYS**ROUNDS - 1)).floor()
    wanted = (top_p * weights.sum(-1))[:, None]
    end = torch.zeros_like(wanted)
    for width in (WAYS ** (ROUNDS - 1 - n) for n in range(ROUNDS)):
        reached = [
            torch.where(key <= end + (way * width - 1.0), weights, 0.0).sum(-1, keepdim=True)
            for way in range(1, WAYS + 1)
        ]
        short = (torch.cat(reached, -1) < wanted).to(torch.float32).sum(-1, keepdim=True)
        # By rounding, the sum of all weights may be less than `wanted`.
        end = end + short.clamp(max=WAYS - 1.0) * width
    return (key <= end) | (top_p >= 1.0)[:, None]


def sorted_nucleus_rows(below: Tensor, weights: Tensor, top_p: Tensor) -> Tensor:
    """`nucleus_rows` by sorting, for ExecuTorch's CPU kernels."""
    key = (below * STEPS_PER_UNIT).clamp(max=float(WAYS**ROUNDS - 1)).floor()
    order = torch.topk(below, below.shape[1], dim=-1, largest=False).indices
    reached = weights.gather(1, order).cumsum(-1)
    wanted = (top_p * weights.sum(-1))[:, None]
    short = (reached < wanted).to(torch.int64).sum(-1, keepdim=True)
    end = key.gather(1, order.gather(1, short.clamp(max=below.shape[1] - 1)))
    return (key <= end) | (top_p >= 1.0)[:, None]


def greedy_rows(logits: Tensor) -> Tensor:
    """The likeliest token of each row, the first one of ties: fp32 [T, V] -> int64 [T, 1]; see `sampling.greedy`."""
    width = next((width for width in WIDTHS if logits.shape[-1] % width == 0), 1)
    if logits.shape[-1] <= WIDTHS[0] or width == 1:
        return logits.argmax(-1, keepdim=True)
    best, where = logits.reshape(logits.shape[0], -1, width).max(-1)
    part = best.argmax(-1, keepdim=True)
    return part * width + where.gather(1, part)


def sample_rows(
    logits: Tensor,
    positions: Tensor,
    temperature: Tensor,
    top_p: Tensor,
    seed: Tensor,
    find_nucleus: FindNucleus = nucleus_rows,
) -> Tensor:
    """The next token of each row; see `sampling.sample`.

    Args:
        logits: fp32 [T, V].
        positions: int64 [T], of the new tokens, 0 or above.
        temperature, top_p: fp32 [T]. seed: int64 [T].
        find_nucleus: `nucleus_rows` or `sorted_nucleus_rows`.

    Returns:
        int64 [T, 1].
    """
    below = logits.max(-1, keepdim=True).values - logits
    take_best = (temperature <= 0.0)[:, None]
    scaled = -below / torch.where(take_best, 1.0, temperature[:, None])
    allowed = find_nucleus(below, torch.exp(scaled), top_p)
    noise = gumbel_noise(seed[:, None], positions[:, None], logits.shape[1])
    noisy = torch.where(allowed, scaled + noise, -math.inf)
    return greedy_rows(torch.where(take_best, logits, noisy))
