"""Sampling the next token on the device: greedy, temperature and top-p, in plain tensor operators.

An exported program cannot hold a random generator, and its result must not depend on earlier calls. So the noise of a
token is a hash of (seed, position, token): the same seed gives the same text in every runtime.

Letters: V vocabulary.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FindNucleus = Callable[[Tensor, Tensor, Tensor], Tensor]

_WORD = 0xFFFFFFFF
# Start values of the two keys of a draw: the first 64 bits of the golden ratio's fraction.
_STARTS = (0x9E3779B9, 0x7F4A7C15)
_BELOW_ONE = 1.0 - 2.0**-24
WAYS = 16
ROUNDS = 4
WIDTHS = (512, 256, 128, 64)
STEPS_PER_UNIT = 256
"""Logits that differ by less than 1 / STEPS_PER_UNIT count as equal at the end of the nucleus. Logits of a bf16 model
above 0.5 have no finer steps. The grid has 16**4 steps, so that all logits 256 below the best and less count as equal.
"""


def hash32(x: Tensor) -> Tensor:
    """Hashes 32-bit numbers by a bijection: int64 in [0, 2**32) -> int64 in [0, 2**32).

    The multipliers are below 2**31, so that products fit into int64.
    Source: C. Wellons, "Prospecting for Hash Functions", lowbias32 with the constants 21f0aaad, 735a2d97.
    """
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _WORD
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _WORD
    return x ^ (x >> 15)


def gumbel_noise(seed: Tensor, position: Tensor, vocabulary: int) -> Tensor:
    """Independent standard Gumbel noise for each token of the vocabulary at one position.

    Args:
        seed: int64 [1], not negative. position: int64 [1], not negative.
        vocabulary: V.

    Returns:
        fp32 [V].
    """
    words = _token_words(seed, position, torch.arange(vocabulary, device=seed.device))
    # -log1p(-u) keeps the precision of small u: these give the largest noise, which decides the draw. The clamp keeps
    # the largest words from being rounded to u = 1, whose noise is -inf: a nucleus of one token could lose that token.
    uniform = ((words.to(torch.float32) + 0.5) * 2.0**-32).clamp(max=_BELOW_ONE)
    return -torch.log(-torch.log1p(-uniform))


def _token_words(seed: Tensor, position: Tensor, tokens: Tensor) -> Tensor:
    """A 32-bit word for each token, int64 [V]; seed and position are int64 [1].

    It uses two keys, hashes of seed and position with different start values. With one key, different pairs of token
    and position would give the same word (the hash of 0 is 0), and many pairs of seeds would give the same noise at
    shifted positions.
    """
    low, high, at = seed & _WORD, (seed >> 32) & _WORD, position & _WORD
    first, second = (hash32(hash32(hash32(low ^ start) ^ high) ^ at) for start in _STARTS)
    return hash32(hash32(tokens ^ first) ^ second)


def nucleus(below: Tensor, weights: Tensor, top_p: Tensor) -> Tensor:
    """Mask of the smallest set of most likely tokens whose probabilities reach `top_p`, with ties of the last one.

    It does not sort: sorting a whole vocabulary takes longer than all other steps. Four rounds find the logit at which
    the nucleus ends; each sums the weights above 16 candidates.

    Args:
        below: fp32 [V], the largest logit minus each logit.
        weights: fp32 [V], proportional to the probabilities.
        top_p: fp32 [1] in (0, 1]; 1 allows all tokens.

    Returns:
        bool [V]; the likeliest token is always included.
    """
    # Whole numbers below 2**16, which fp32 holds exactly; 0 is the likeliest token.
    key = (below * STEPS_PER_UNIT).clamp(max=float(WAYS**ROUNDS - 1)).floor()
    wanted = top_p * weights.sum()
    end = torch.zeros_like(top_p)
    ways = torch.arange(1, WAYS + 1, device=below.device, dtype=torch.float32)
    for width in (WAYS ** (ROUNDS - 1 - n) for n in range(ROUNDS)):
        last = end + ways * width - 1.0
        reached = torch.where(key[None, :] <= last[:, None], weights[None, :], 0.0).sum(1)
        short = (reached < wanted).to(torch.float32).sum(0, keepdim=True)
        # By rounding, the sum of all weights may be less than `wanted`.
        end = end + short.clamp(max=WAYS - 1.0) * width
    return (key <= end) | (top_p >= 1.0)


def sorted_nucleus(below: Tensor, weights: Tensor, top_p: Tensor) -> Tensor:
    """`nucleus` by sorting: for ExecuTorch's CPU kernels, on which 64 comparisons with each token take far longer."""
    key = (below * STEPS_PER_UNIT).clamp(max=float(WAYS**ROUNDS - 1)).floor()
    order = torch.topk(below, below.shape[0], largest=False).indices
    reached = weights.gather(0, order).cumsum(0)
    short = (reached < top_p * weights.sum()).to(torch.int64).sum(0, keepdim=True)
    end = key.gather(0, order.gather(0, short.clamp(max=below.shape[0] - 1)))
    return (key <= end) | (top_p >= 1.0)


def all_tokens(below: Tensor, weights: Tensor, top_p: Tensor) -> Tensor:
    """In place of `nucleus` where there is no top-p."""
    return torch.ones_like(below, dtype=torch.bool)


def fresh_noise(device: torch.device) -> Tensor:
    """A seed that is new in each call of an exported method, int64 [1], from the runtime's random generator."""
    return torch.randint(0, 2**31 - 1, (1,), dtype=torch.int64, device=device)


def greedy(logits: Tensor) -> Tensor:
    """The likeliest token, the first one of ties: fp32 [1, V] -> int64 [1, 1].

    If a row width divides V, it reduces rows first: a reduction to a single number runs in one block of the GPU.
    """
    width = next((width for width in WIDTHS if logits.shape[-1] % width == 0), 1)
    if logits.shape[-1] <= WIDTHS[0] or width == 1:
        return logits.argmax(-1, keepdim=True)
    best, where = logits.reshape(-1, width).max(-1)
    row = best.argmax(-1, keepdim=True)
    return (row * width + where[row])[None]


def sample(
    logits: Tensor,
    position: Tensor,
    temperature: Tensor,
    top_p: Tensor,
    seed: Tensor,
    find_nucleus: FindNucleus = nucleus,
) -> Tensor:
    """The next token: the likeliest at temperature 0, else a draw from softmax(logits / temperature) in the nucleus.

    Args:
        logits: fp32 [1, V].
        position: int64 [1], the position of the new token.
        temperature: fp32 [1], 0 or above. top_p: fp32 [1] in (0, 1]. seed: int64 [1], 0 or above.
        find_nucleus: `nucleus` or `sorted_nucleus`.

    Returns:
        int64 [1, 1], the input_ids of the next call.
    """
    row = logits[0]
    below = row.max() - row
    take_best = temperature <= 0.0
    scaled = -below / torch.where(take_best, 1.0, temperature)
    allowed = find_nucleus(below, torch.exp(scaled), top_p)
    noisy = torch.where(allowed, scaled + gumbel_noise(seed, position, row.shape[0]), -math.inf)
    return greedy(torch.where(take_best, row, noisy)[None])


def fresh_seed() -> int:
    """A random seed from the system, below 2**32 so that it is easy to type."""
    return secrets.randbelow(1 << 32)


@dataclass(frozen=True)
class Sampler:
    """Sampling settings, checked on construction.

    Attributes:
        temperature: 0 always gives the likeliest token.
        seed: of the draws; the same seed gives the same text.
        top_p: tokens are drawn from the smallest set of most likely tokens that reaches this probability.
        top_k: tokens are drawn from this many most likely ones, and those as likely as the last of them; 0: from all.
            `top_p` counts within them. Only sampling from logits (`__call__`) has it; 1 is temperature 0 everywhere.

    Raises:
        ValueError: a value outside its range.
    """

    temperature: float = 0.0
    seed: int = 0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be 0 (always the likeliest token) or above: try 0.8")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1 (all tokens): try 0.95")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} must be a whole number between 0 and 2**63 - 1: choose another")

        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be a whole number, 0 (all tokens) or above: try 40")
        if self.top_k == 1:
            object.__setattr__(self, "temperature", 0.0)

    def inputs(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """temperature, top_p and seed as inputs of `sample` and of exported methods."""
        return (
            torch.tensor([self.temperature], dtype=torch.float32, device=device),
            torch.tensor([self.top_p], dtype=torch.float32, device=device),
            torch.tensor([self.seed], dtype=torch.int64, device=device),
        )

    def __call__(self, logits: Tensor, position: int = 0) -> int:
        """Samples from logits fp32 [1, V] on the CPU as an exported method does; `position` is the new token's."""
        at, logits = torch.tensor([position]), logits.float().cpu()
        if 0 < self.top_k < logits.shape[-1]:
            last = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < last, -math.inf)
        return int(sample(logits, at, *self.inputs(torch.device("cpu"))))
