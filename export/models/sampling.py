"""Picking the next token on the device: greedy, temperature and top-p as plain tensor operators without random state.

An exported program cannot carry a random generator, and its result must not depend on how often it was called. So the
noise of a token is a hash of (seed, position, token): the same seed gives the same text, on every runtime.

Letters: V vocabulary.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
# Where the two keys of a draw start: the first 64 bits of the golden ratio's fraction.
_STARTS = (0x9E3779B9, 0x7F4A7C15)
_BELOW_ONE = 1.0 - 2.0**-24
_WAYS = 16
_ROUNDS = 4
_WIDTHS = (512, 256, 128, 64)
STEPS_PER_UNIT = 256
"""Logits that differ by less than 1 / STEPS_PER_UNIT count as equally likely where the nucleus ends. Those of a bf16
model are no finer, above 0.5; the grid has 16**4 steps, so that logits 256 below the best count as equal too."""


def hash32(x: Tensor) -> Tensor:
    """A bijection of 32-bit numbers that looks random; int64 tensors with values in [0, 2**32), in and out.

    Multipliers are below 2**31, so that no product leaves int64.
    Source: C. Wellons, "Prospecting for Hash Functions", lowbias32 with the constants 21f0aaad, 735a2d97.
    """
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _WORD
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _WORD
    return x ^ (x >> 15)


def gumbel_noise(seed: Tensor, position: Tensor, vocabulary: int) -> Tensor:
    """Independent standard Gumbel variables for the tokens of one position.

    Args:
        seed: int64 [1], not negative. position: int64 [1], not negative.
        vocabulary: V.

    Returns:
        fp32 [V].
    """
    words = _token_words(seed, position, torch.arange(vocabulary, device=seed.device))
    # -log1p(-u) keeps the precision of small u, which decides the draw: those tokens have the largest noise. fp32 would
    # round the largest words to u = 1, whose noise is -inf: a nucleus of one token could then lose it.
    uniform = ((words.to(torch.float32) + 0.5) * 2.0**-32).clamp(max=_BELOW_ONE)
    return -torch.log(-torch.log1p(-uniform))


def _token_words(seed: Tensor, position: Tensor, tokens: Tensor) -> Tensor:
    """A 32-bit word for each token, int64 [V]; seed and position are int64 [1].

    Two keys, each a hash of seed and position from its own start: with one key, tokens and positions that hash to the
    same word would meet (the hash of 0 is 0), and many pairs of seeds would have the same noise at shifted positions.
    """
    low, high, at = seed & _WORD, (seed >> 32) & _WORD, position & _WORD
    first, second = (hash32(hash32(hash32(low ^ start) ^ high) ^ at) for start in _STARTS)
    return hash32(hash32(tokens ^ first) ^ second)


def nucleus(below: Tensor, weights: Tensor, top_p: Tensor) -> Tensor:
    """The most likely tokens whose probabilities first reach `top_p`, and those as likely as the last of them.

    No sort: a sort of a whole vocabulary takes longer than the rest of the choice. The logit where the nucleus ends is
    found in four rounds, each of which sums the weights above 16 candidates.

    Args:
        below: fp32 [V], how far each logit is below the largest.
        weights: fp32 [V], in proportion to the probabilities, which fall as `below` rises.
        top_p: fp32 [1] in (0, 1]; 1 takes all.

    Returns:
        bool [V], true for at least the likeliest token.
    """
    # Whole numbers below 2**16, which fp32 holds exactly; 0 is the likeliest token.
    key = (below * STEPS_PER_UNIT).clamp(max=float(_WAYS**_ROUNDS - 1)).floor()
    wanted = top_p * weights.sum()
    end = torch.zeros_like(top_p)
    ways = torch.arange(1, _WAYS + 1, device=below.device, dtype=torch.float32)
    for width in (_WAYS ** (_ROUNDS - 1 - n) for n in range(_ROUNDS)):
        last = end + ways * width - 1.0
        reached = torch.where(key[None, :] <= last[:, None], weights[None, :], 0.0).sum(1)
        short = (reached < wanted).to(torch.float32).sum(0, keepdim=True)
        # Rounding may leave the sum of all below what is wanted.
        end = end + short.clamp(max=_WAYS - 1.0) * width
    return (key <= end) | (top_p >= 1.0)


def greedy(logits: Tensor) -> Tensor:
    """The likeliest token: fp32 [1, V] -> int64 [1, 1]; of equally likely ones the first.

    In two steps where the vocabulary can be cut into rows: one reduction to a single number is one block of a GPU.
    """
    width = next((width for width in _WIDTHS if logits.shape[-1] % width == 0), 1)
    if logits.shape[-1] <= _WIDTHS[0] or width == 1:
        return logits.argmax(-1, keepdim=True)
    best, where = logits.reshape(-1, width).max(-1)
    row = best.argmax(-1, keepdim=True)
    return (row * width + where[row])[None]


def sample(logits: Tensor, position: Tensor, temperature: Tensor, top_p: Tensor, seed: Tensor) -> Tensor:
    """The next token: the likeliest at temperature 0, else drawn from softmax(logits / temperature) within the nucleus.

    Args:
        logits: fp32 [1, V].
        position: int64 [1], where the token will stand.
        temperature: fp32 [1], 0 or above. top_p: fp32 [1] in (0, 1]. seed: int64 [1], 0 or above.

    Returns:
        int64 [1, 1]: may be fed back as it is.
    """
    row = logits[0]
    below = row.max() - row
    take_best = temperature <= 0.0
    scaled = -below / torch.where(take_best, 1.0, temperature)
    allowed = nucleus(below, torch.exp(scaled), top_p)
    noisy = torch.where(allowed, scaled + gumbel_noise(seed, position, row.shape[0]), -math.inf)
    return greedy(torch.where(take_best, row, noisy)[None])


def fresh_seed() -> int:
    """A seed from the system's random numbers, short enough to be typed again."""
    return secrets.randbelow(1 << 32)


@dataclass(frozen=True)
class Sampler:
    """How tokens are picked; checked when made.

    Attributes:
        temperature: 0 always takes the likeliest token.
        top_p: only the most likely tokens that together reach this probability are drawn from.
        seed: of the draw. The same seed gives the same text.
    """

    temperature: float = 0.0
    seed: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be 0 (always the likeliest token) or above: try 0.8")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1 (all tokens): try 0.95")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} must be a whole number between 0 and 2**63 - 1: choose another")

    def inputs(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """temperature, top_p, seed as `sample` and exported methods take them."""
        return (
            torch.tensor([self.temperature], dtype=torch.float32, device=device),
            torch.tensor([self.top_p], dtype=torch.float32, device=device),
            torch.tensor([self.seed], dtype=torch.int64, device=device),
        )

    def __call__(self, logits: Tensor, position: int = 0) -> int:
        """The token that an exported method would pick from fp32 [1, V], computed on the CPU."""
        at = torch.tensor([position])
        return int(sample(logits.float().cpu(), at, *self.inputs(torch.device("cpu"))))
