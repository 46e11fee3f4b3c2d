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
    prompts: Sequence[list[int]],
    new_tokens: int,
    repeats: int,
    on_repeat: Callable[[], Any] | None = None,
) -> BatchSpeed:
    """Decodes a sequence after each prompt, all at once.

    The time is that of the steps in which every sequence gets a token. The host waits for the tokens of each step, as a
    server does.

    Args:
        prompts: of one length, different ones: equal sequences would choose the same experts.
        new_tokens: steps that are measured. repeats: measurements, after a warm-up.
        on_repeat: called after each.
    """
    speed = BatchSpeed(len(prompts), len(prompts[0]), new_tokens)
    batch = BatchGenerator(generator)
    steps = min(WARMUP_DECODE_STEPS + 1, new_tokens)
    for repeat in range(repeats + 1):  # the first one is the warm-up
        size = steps if repeat == 0 else new_tokens
        added = [batch.add(ids, size + 1, ignore_eos=True) for ids in prompts]
        while any(not sequence.tokens for sequence in added):
            batch.fill()
        start = time.perf_counter()
        batch.run()
        seconds = time.perf_counter() - start
        assert all(len(sequence.tokens) == size + 1 for sequence in added)
        if repeat:
            speed.decode.append(len(prompts) * new_tokens / seconds)
            if on_repeat is not None:
                on_repeat()
    return speed
