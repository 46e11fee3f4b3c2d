"""Sampling: greedy, draws against softmax, the nucleus against a sort, and seeds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from executorch_moe.export.models import sampling
from executorch_moe.export.models.sampling import Sampler, gumbel_noise, hash32, nucleus, sample, sorted_nucleus

VOCABULARY = 50


def draws(logits: Tensor, count: int, temperature: float = 1.0, top_p: float = 1.0, seed: int = 0) -> Tensor:
    """How often each token is drawn at positions 0 to count - 1."""
    inputs = Sampler(temperature, seed, top_p).inputs(torch.device("cpu"))
    counts = torch.zeros(logits.shape[-1])
    for position in range(count):
        counts[sample(logits, torch.tensor([position]), *inputs).item()] += 1
    return counts


def by_sort(logits: Tensor, temperature: float, top_p: float) -> set[int]:
    """The nucleus in its textbook form: tokens sorted, up to the one that reaches top_p, with ties."""
    values, order = logits[0].double().sort(descending=True)
    probabilities = (values / temperature).softmax(-1)
    if top_p == 1.0:
        return set(order.tolist())
    before = probabilities.cumsum(-1) - probabilities
    last = values[before < top_p - 1e-6].min()
    return {int(token) for token, value in zip(order, values, strict=True) if value >= last}


@pytest.mark.parametrize("vocabulary", [2, 264, 151_936])
def test_greedy_is_argmax_whatever_the_other_inputs(vocabulary: int) -> None:
    for position in range(5):
        logits = torch.randn(1, vocabulary) * 4
        token = sample(
            logits, torch.tensor([position]), torch.tensor([0.0]), torch.tensor([0.3]), torch.tensor([position])
        )
        assert token.shape == (1, 1) and token.dtype == torch.int64
        assert token.item() == logits.argmax().item() == Sampler()(logits)


def test_the_first_of_equals_is_greedys_choice() -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0, 0.0]])
    assert Sampler()(logits) == 1


def chi_square(counts: Tensor, expected: Tensor) -> tuple[float, float]:
    """The chi-square statistic, and its 99.9% quantile for a fair sampler (Wilson and Hilferty's approximation)."""
    freedom = len(counts) - 1
    bound = freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3
    return float(((counts - expected) ** 2 / expected.clamp(min=1e-9))[expected > 0].sum()), bound


def winners(seeds: Tensor, positions: Tensor, vocabulary: int) -> Tensor:
    """The token with the largest noise for each seed and position: the draw among equally likely tokens."""
    return gumbel_noise(seeds[:, None], positions[:, None], vocabulary).argmax(-1)


FEW = 8
# 0 and small seeds, and those whose hash may be 0
SEEDS = (0, 1, 2, 7, *sampling._STARTS, 2**32, (1 << 32) + 1, 2**63 - 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_draws_of_consecutive_positions_are_uniform_and_independent(seed: int) -> None:
    count = 4096
    positions = torch.arange(count)
    drawn = winners(torch.full((count,), seed), positions, FEW)
    pairs = drawn[:-1] * FEW + drawn[1:]
    # The difference of token and position shows whether a position prefers the token of its own number.
    for values, classes in ((drawn, FEW), (pairs, FEW**2), ((drawn - positions) % FEW, FEW)):
        counts = torch.bincount(values, minlength=classes).double()
        statistic, bound = chi_square(counts, torch.full((classes,), len(values) / classes))
        assert statistic < bound


@pytest.mark.parametrize("position", [0, 1, 5000])
def test_draws_of_consecutive_seeds_are_uniform_and_independent(position: int) -> None:
    count = 4096
    seeds = torch.arange(count)
    drawn = winners(seeds, torch.full((count,), position), FEW)
    pairs = drawn[:-1] * FEW + drawn[1:]
    for values, classes in ((drawn, FEW), (pairs, FEW**2), ((drawn - seeds) % FEW, FEW)):
        counts = torch.bincount(values, minlength=classes).double()
        statistic, bound = chi_square(counts, torch.full((classes,), len(values) / classes))
        assert statistic < bound


@pytest.mark.parametrize("seed", SEEDS)
def test_no_token_is_preferred_by_the_position_of_its_number(seed: int) -> None:
    vocabulary, positions = 5000, torch.arange(0, 5000, 50)
    drawn = winners(torch.full_like(positions, seed), positions, vocabulary)
    assert (drawn == positions).sum() <= 2  # 0.02 are expected
    # The largest of 5000 Gumbel variables is 9.1 on average; the largest possible one, 22.9, is a word of 0.
    largest = gumbel_noise(torch.tensor([seed]), positions[:, None], vocabulary).max(-1).values
    assert float(largest.mean()) == pytest.approx(9.09, abs=0.65)


def test_noise_of_two_seeds_is_not_the_same_at_shifted_positions() -> None:
    """With one 32-bit key, two seeds would share all of their noise if their hashes are close."""
    seeds = torch.arange(1 << 15)
    hashed = hash32(hash32(seeds))
    near = (hashed[:, None] ^ hashed[None, :256]) < 1 << 14
    near[range(256), range(256)] = False
    first, second = (int(index) for index in near.nonzero()[0])
    shift = int(hashed[first] ^ hashed[second])
    positions = torch.arange(64)[:, None]
    noise = gumbel_noise(torch.tensor([first]), positions, FEW)
    other = gumbel_noise(torch.tensor([second]), positions ^ shift, FEW)
    assert not (noise == other).all(-1).any()


def test_noise_is_finite_for_every_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 rounds the largest words to 2**32; a nucleus of one token must keep that token."""
    words = torch.tensor([0, 1, (1 << 32) - 129, (1 << 32) - 128, (1 << 32) - 1])
    monkeypatch.setattr(sampling, "_token_words", lambda *_: words)
    noise = gumbel_noise(torch.tensor([0]), torch.tensor([0]), len(words))
    assert noise.isfinite().all() and noise.diff().le(0).all()
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0, 9.0]])
    assert sample(logits, torch.tensor([3]), *Sampler(1.0, 0, 0.1).inputs(torch.device("cpu"))).item() == 4


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_softmax(temperature: float) -> None:
    """Chi-square over the tokens that are expected at least five times."""
    logits, count = torch.randn(1, VOCABULARY) * 1.5, 3000
    expected = (logits[0] / temperature).softmax(-1) * count
    counts = draws(logits, count, temperature, seed=3)
    often = expected >= 5
    # Rare tokens form one class.
    got = torch.cat((counts[often], counts[~often].sum()[None]))
    wanted = torch.cat((expected[often], expected[~often].sum()[None]))
    statistic, bound = chi_square(got, wanted)
    assert statistic < bound
    # The test can fail: it refuses the same draws for a slightly different temperature.
    other = (logits[0] / (temperature * 1.5)).softmax(-1) * count
    assert ((counts - other) ** 2 / other).sum() > bound


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
def test_nucleus_equals_that_of_a_sort(top_p: float, temperature: float) -> None:
    # bf16 values, as of a model.
    logits = (torch.randn(1, 1000) * 3).bfloat16().float()
    logits = torch.where(logits.abs() < 0.5, 0.5, logits)
    below = logits[0].max() - logits[0]
    allowed = nucleus(below, torch.exp(-below / temperature), torch.tensor([top_p]))
    assert set(allowed.nonzero().flatten().tolist()) == by_sort(logits, temperature, top_p)


@pytest.mark.parametrize("vocabulary", [2, 50, 4096])
@pytest.mark.parametrize("spread", [0.0, 0.1, 3.0, 200.0])
def test_the_cpu_finds_the_same_nucleus(spread: float, vocabulary: int) -> None:
    for top_p in (1e-6, 0.1, 0.5, 0.9, 0.999, 1.0):
        for logits in (torch.randn(vocabulary) * spread, (torch.randn(vocabulary) * spread).bfloat16().float().round()):
            below = logits.max() - logits
            # Multiples of 2**-12, whose sums are exact in any order.
            arguments = below, (torch.exp(-below) * 4096.0).round() / 4096.0, torch.tensor([top_p])
            assert torch.equal(sorted_nucleus(*arguments), nucleus(*arguments))


@pytest.mark.parametrize(("top_k", "top_p"), [(1, 1.0), (3, 1.0), (3, 0.6), (8, 0.9), (VOCABULARY, 1.0), (999, 1.0)])
def test_top_k_draws_from_the_most_likely_tokens(top_k: int, top_p: float) -> None:
    """Within them the chances are those of a softmax over them alone, of which top-p takes its part."""
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(top_k)) * 2
    kept = logits[0].topk(min(top_k, VOCABULARY)).indices
    among = torch.full_like(logits, -1e9).index_copy(1, kept, logits[:, kept])
    allowed = sorted(by_sort(among, 0.8, top_p) & set(kept.tolist()))
    counts = torch.zeros(VOCABULARY)
    for position in range(800):
        counts[Sampler(0.8, 5, top_p, top_k)(logits, position)] += 1
    assert set(counts.nonzero().flatten().tolist()) <= set(allowed)
    if top_k == 1:
        assert counts[logits.argmax()] == 800
        return
    expected = (logits[0, allowed] / 0.8).softmax(-1) * 800
    likely = expected >= 5
    statistic, bound = chi_square(counts[allowed][likely], expected[likely])
    assert statistic < bound


def test_top_k_keeps_the_ties_of_its_last_token() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, 0.0]])
    assert {Sampler(5.0, 1, 1.0, 2)(logits, position) for position in range(200)} == {0, 2, 3}


def test_top_k_of_one_is_greedy_in_every_method() -> None:
    temperature, _, _ = Sampler(0.7, 1, 1.0, 1).inputs(torch.device("cpu"))
    assert temperature.item() == 0.0
    for top_k in (-1, 2.5):
        with pytest.raises(ValueError, match=rf"top_k={top_k} must be a whole number, 0 \(all tokens\) or above"):
            Sampler(top_k=top_k)  # type: ignore[arg-type]


def test_the_nucleus_is_never_empty() -> None:
    below = torch.full((7,), 93.0)
    below[4] = 0.0
    assert nucleus(below, torch.exp(-below), torch.tensor([1e-7])).nonzero().flatten().tolist() == [4]
    assert nucleus(torch.zeros(5), torch.ones(5), torch.tensor([0.1])).all()  # all tokens are equally likely


@pytest.mark.parametrize("top_p", [0.2, 0.6, 0.95])
def test_draws_stay_in_the_nucleus_and_keep_its_proportions(top_p: float) -> None:
    logits = (torch.randn(1, VOCABULARY) * 2).bfloat16().float()
    inside = sorted(by_sort(logits, 1.0, top_p))
    counts = draws(logits, 1500, top_p=top_p)
    assert set(counts.nonzero().flatten().tolist()) <= set(inside)
    wanted = logits[0, inside].softmax(-1) * 1500
    assert ((counts[inside] - wanted).abs() < 5 * wanted.sqrt() + 1).all()


def test_a_seed_gives_its_own_draws_again() -> None:
    logits = torch.zeros(1, 1000)
    texts = [[Sampler(1.0, seed)(logits, position) for position in range(20)] for seed in (0, 0, 1, 2**32, 2**62)]
    assert texts[0] == texts[1]
    assert len({tuple(text) for text in texts}) == 4
    assert len(set(texts[0])) > 15  # positions differ


def test_noise_is_that_of_a_gumbel_variable() -> None:
    noise = gumbel_noise(torch.tensor([5]), torch.tensor([17]), 200_000)
    other = gumbel_noise(torch.tensor([5]), torch.tensor([18]), 200_000)
    assert noise.isfinite().all()
    assert noise.mean() == pytest.approx(0.5772, abs=0.01) and noise.var() == pytest.approx(1.6449, abs=0.03)
    assert torch.corrcoef(torch.stack((noise, other)))[0, 1].abs() < 0.01
    assert torch.corrcoef(torch.stack((noise[1:], noise[:-1])))[0, 1].abs() < 0.01


def test_the_hash_is_a_bijection_of_32_bit_words() -> None:
    words = torch.cat((torch.arange(1 << 16), torch.arange((1 << 32) - (1 << 16), 1 << 32)))
    hashed = hash32(words)
    assert hashed.min() >= 0 and hashed.max() < 1 << 32 and len(hashed.unique()) == len(words)
    assert hash32(torch.tensor([0])).item() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1.0,), "temperature=-1.0 must be 0"),
        ((float("nan"),), "temperature=nan"),
        ((float("inf"),), "temperature=inf"),
        ((1.0, 0, 0.0), "top_p=0.0 must be above 0"),
        ((1.0, 0, 1.5), "top_p=1.5"),
        ((1.0, -1), "seed=-1 must be a whole number between 0"),
        ((1.0, 2.5), "seed=2.5 must be a whole number"),
    ],
)
def test_settings_out_of_range(arguments: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampler(*arguments)  # type: ignore[arg-type]
