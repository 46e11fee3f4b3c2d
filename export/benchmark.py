"""Prefill and decode speed of an exported model."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .generation import TextGenerator

FORMATS = ("md", "json")


@dataclass
class Speed:
    """Tokens a second of one prompt length, one entry a repeat."""

    prompt_tokens: int
    new_tokens: int
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


@dataclass
class ModelBenchmark:
    """What was measured, on what."""

    artifact: str
    runtime: str
    device: str
    versions: dict[str, str]
    method: str
    speeds: list[Speed]

    def markdown(self) -> str:
        """A header that names the device and versions, and a table of mean and spread."""
        lines = [
            f"`{self.artifact}` on {self.device}, runtime: {self.runtime}; "
            + ", ".join(f"{name} {version}" for name, version in self.versions.items()),
            "",
            self.method,
            "",
            "| prompt tokens | new tokens | prefill tok/s | decode tok/s |",
            "|---|---|---|---|",
        ]
        for speed in self.speeds:
            lines.append(
                f"| {speed.prompt_tokens} | {speed.new_tokens} | {spread(speed.prefill)} | {spread(speed.decode)} |"
            )
        return "\n".join(lines)

    def json(self) -> str:
        """Everything, with each repeat."""
        return json.dumps(asdict(self), indent=2)


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation: 123.4 (+- 1.2)."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):,.1f} (+- {deviation:,.1f})"


def device_name(device: torch.device) -> str:
    """What a reader of a benchmark wants to know about the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def versions(distributions: Sequence[str] = ("torch", "triton", "executorch", "executorch-moe")) -> dict[str, str]:
    """Installed versions by distribution name."""
    found = {}
    for name in distributions:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def benchmark_model(
    artifact: Path,
    prompt_lengths: Sequence[int],
    new_tokens: int = 64,
    repeats: int = 5,
    runtime: str = "auto",
    on_repeat: Callable[[Speed], Any] | None = None,
) -> ModelBenchmark:
    """Measures an artifact for each prompt length, after a warm-up of the same size.

    Args:
        artifact: the `.pte`.
        prompt_lengths: tokens in the prompt, each at least 1; random ids, the same in each run.
        new_tokens: tokens generated after each prompt, at least 2; an end-of-text token does not stop it.
        repeats: runs of each length.
        runtime: as for `executorch_moe.backends.runtime.load`.
        on_repeat: called after each run.

    Raises:
        ValueError: sizes that are not positive or do not fit into the exported cache.
    """
    for name, value, least in (("repeats", repeats, 1), ("new_tokens", new_tokens, 2)):
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
    if not prompt_lengths or min(prompt_lengths) < 1:
        raise ValueError(f"prompt_lengths={list(prompt_lengths)} must be positive: give for example 32,128")
    generator = TextGenerator.load(artifact, runtime=runtime)
    for length in prompt_lengths:
        generator.check_length(length, new_tokens)
    random = torch.Generator().manual_seed(0)
    speeds = []
    for length in prompt_lengths:
        ids = torch.randint(0, min(generator.vocabulary, 256), (length,), generator=random).tolist()
        speed = Speed(length, new_tokens)
        speeds.append(speed)
        generator.warm_up(length)
        for _ in range(repeats):
            run = generator.generate(ids, new_tokens, ignore_eos=True)
            speed.prefill.append(run.prefill_rate)
            speed.decode.append(run.decode_rate)
            if on_repeat is not None:
                on_repeat(speed)
    return ModelBenchmark(
        artifact=artifact.name,
        runtime=generator.program.runtime,
        device=device_name(generator.program.device),
        versions=versions(),
        method=(
            f"Batch 1, greedy, mean (+- standard deviation) of {repeats} runs after a warm-up of the same length. "
            "Prefill: from token ids to the first new token. Decode: each further token, picking it included."
        ),
        speeds=speeds,
    )
