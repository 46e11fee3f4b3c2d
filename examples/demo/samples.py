"""Texts that the demonstration model writes, and a count of those that repeat themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .model import SEED

PROMPTS = (
    "Once upon a time there was a",
    "In the middle of the forest stood",
    "The little girl looked up at the stars and",
    '"Dear mother," said the young prince, "',
    "Far out in the sea",
    "The old king had three sons, and",
    "One winter evening, when the snow was falling,",
    "There was once a poor woman who",
    "The wind blew through the trees, and",
    '"Where are you going?" asked the',
    "Early in the morning the boy",
    "The princess opened the door and saw",
    "It was a beautiful summer day in the country, and",
    "A long time ago, in a small house by the river,",
    '"I will tell you a story," said the old man.',
    "The bird sat on the branch and",
    "When the clock struck twelve,",
    "He had not gone far when he met",
    "The children ran into the garden, where",
    "At last the ship came to",
)
"""What texts are written on from after training."""
WRITTEN_LENGTH = 100
"""Tokens that are written after a prompt."""


@torch.no_grad()
def write_on(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    temperature: float = 0.0,
    top_p: float = 0.9,
    length: int = WRITTEN_LENGTH,
    seed: int = SEED,
) -> list[list[int]]:
    """Up to `length` tokens after each prompt; temperature 0 takes the likeliest token.

    Args:
        tokenizer: of the package `tokenizers`.
        top_p: else, tokens are drawn from the likeliest that together have this probability.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    given = [tokenizer.encode(prompt).ids for prompt in prompts]
    starts = torch.tensor([len(tokens) for tokens in given], device=device)
    rows = torch.arange(len(prompts), device=device)
    # Tokens to the right of a token do not change its logits, so rows of several lengths need no mask.
    end = model.config.eos_token_id
    ids = torch.full((len(prompts), int(starts.max()) + length), end, device=device)
    for row, tokens in enumerate(given):
        ids[row, : len(tokens)] = torch.tensor(tokens)
    for step in range(length):
        width = int(starts.max()) + step
        logits = model(input_ids=ids[:, :width], use_cache=False).logits[rows, starts + step - 1].float()
        if temperature:
            probabilities, order = (logits / temperature).softmax(-1).sort(-1, descending=True)
            before = probabilities.cumsum(-1) - probabilities
            drawn = torch.multinomial(probabilities * (before < top_p), 1, generator=generator)
            token = order.gather(-1, drawn)[:, 0]
        else:
            token = logits.argmax(-1)
        ids[rows, starts + step] = token
    written = [ids[row, start : start + length].tolist() for row, start in enumerate(starts.tolist())]
    return [tokens[: tokens.index(end)] if end in tokens else tokens for tokens in written]


def repeats_itself(tokens: Sequence[int], longest: int = 8) -> bool:
    """Whether up to `longest` tokens follow themselves twice, or fewer than half of the sequences of 4 are distinct."""
    tokens = list(tokens)
    circles = any(
        tokens[at : at + n] == tokens[at + n : at + 2 * n] == tokens[at + 2 * n : at + 3 * n]
        for n in range(1, longest + 1)
        for at in range(len(tokens) - 3 * n + 1)
    )
    fours = list(zip(tokens, tokens[1:], tokens[2:], tokens[3:], strict=False))
    return circles or len(set(fours)) < 0.5 * len(fours)


def evaluate(model: nn.Module, tokenizer: Any, report: Callable[[str], None]) -> dict[str, int]:
    """Reports texts written on from `PROMPTS`, and counts those that repeat themselves."""
    facts = {"texts": len(PROMPTS), "tokens_a_text": WRITTEN_LENGTH}
    for temperature in (0.0, 0.7):
        written = write_on(model, tokenizer, PROMPTS, temperature)
        bad = [repeats_itself(tokens) for tokens in written]
        for prompt, tokens, repeats in zip(PROMPTS, written, bad, strict=True):
            mark = ", REPEATS" if repeats else ""
            text = tokenizer.decode(tokenizer.encode(prompt).ids + tokens)
            report(f"\n--- temperature {temperature}{mark}\n{text}")
        report(f"\ntemperature {temperature}: {sum(bad)} of {len(bad)} texts repeat themselves")
        facts[f"repeating_at_temperature_{temperature}"] = sum(bad)
    return facts
