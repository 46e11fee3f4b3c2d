"""Measures how fast several sequences are decoded at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from executorch_moe.export.generate.batch import BatchGenerator
from executorch_moe.export.generate.generator import WARMUP_DECODE_STEPS, TextGenerator


@dataclass
class BatchSpeed:
    """New tokens per second, of all sequences together, an entry for each repeat.

    Attributes:
        sequences: number of them. prompt_tokens: of each. new_tokens: of each after its first.
    """

    sequences: int
    prompt_tokens: int
    new_tokens: int
    decode: list[float] = field(default_factory=list)


def check_batch(generator: TextGenerator, sequences: Sequence[int]) -> None:
    """Check that an artifact can decode so many sequences at once.

    Raises:
        ValueError: it cannot.
    """
    if not sequences or min(sequences) < 1 or max(sequences) > generator.max_batch:
        raise ValueError(
            f"batch={','.join(map(str, sequences))} must be numbers of sequences from 1 to the {generator.max_batch} "
            f"of the artifact: export it with --max-batch {max([2, *sequences])}"
        )


def measure_batch(
    generator: TextGenerator,
    ids: list[int],
    sequences: int,
    new_tokens: int,
    repeats: int,
    on_repeat: Callable[[], Any] | None = None,
) -> BatchSpeed:
    """Decodes `sequences` copies of a prompt, each in a slot of its own and with keys and values of its own.

    The time is that of all steps in which every sequence gets a token, with the host waiting for the tokens of each
    step, as a server does. Copies of one prompt would choose the same experts, so each starts with a token of its own.

    Args:
        ids: the prompt. new_tokens: steps that are measured, after a warm-up. repeats: measurements.
        on_repeat: called after each.
    """
    speed = BatchSpeed(sequences, len(ids), new_tokens)
    batch = BatchGenerator(generator)
    steps = min(WARMUP_DECODE_STEPS + 1, new_tokens)
    for repeat in range(repeats + 1):  # the first one is a warm-up
        size = steps if repeat == 0 else new_tokens
        added = [
            batch.add([(ids[0] + index) % generator.vocabulary, *ids[1:]], size + 1, ignore_eos=True)
            for index in range(sequences)
        ]
        while any(sequence.computed < len(ids) for sequence in added):
            batch.fill()
        start = time.perf_counter()
        batch.run()
        seconds = time.perf_counter() - start
        assert all(len(sequence.tokens) == size + 1 for sequence in added)
        if repeat:
            speed.decode.append(sequences * new_tokens / seconds)
            if on_repeat is not None:
                on_repeat()
    return speed
