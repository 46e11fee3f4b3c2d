"""Breaks the time of a prompt down by parts of the model and by kernels, with the bytes and FLOPs of each part."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from executorch_moe.export.generate.generator import TextGenerator

from .breakdown import Kernel, check_profile, group_of, measure_bandwidth, measure_flops, own_times, profile_kernels
from .prompt_work import (
    ATTENTION,
    CONVERSION,
    DELTA_IN,
    DELTA_RULE,
    GEMM1,
    GEMM2,
    HEAD,
    OUT,
    QKV,
    ROUTER,
    ROUTING,
    SHARED,
    Work,
    prompt_work,
)

_CONVERSION = re.compile(r"moe_weights_to_bf16|triton_poi_fused__to_copy_\d+$|triton_poi_\w*bitwise_and")
_ROUTING_WEIGHTS = re.compile(r"triton_\w*_softmax_\w*prepare_softmax_online(?!.*(where|floor))")
_EXPERTS_GEMM = re.compile(r"moe_\w*gemm(?![12])")


@dataclass
class Part:
    """One part of a prompt, all layers.

    Attributes:
        name: of the part. launches: number. microseconds: own time (see `breakdown.own_times`).
        nbytes, flops: the least that the part must move and compute; None if unknown. floor_us: their time at the
            measured rates.
    """

    name: str
    launches: int = 0
    microseconds: float = 0.0
    nbytes: float | None = None
    flops: float | None = None
    floor_us: float | None = None


@dataclass
class KernelTime:
    """One kernel in one part: launches, and own microseconds of all of them."""

    part: str
    kernel: str
    launches: int = 0
    microseconds: float = 0.0


@dataclass
class PromptBreakdown:
    """The time of a prompt.

    Attributes:
        tokens: of the prompt. chunk: largest number of tokens per call, or None.
        prompt_us: microseconds from the start of the first kernel to the end of the last, within the profile.
        gap_us: microseconds in which no kernel ran.
        bandwidth, flops: measured bytes/s of a large copy, and bf16 FLOP/s of a large matrix product.
        parts: longest first. kernels: longest first.
    """

    tokens: int
    chunk: int | None
    prompt_us: float
    gap_us: float
    bandwidth: float
    flops: float
    parts: list[Part] = field(default_factory=list)
    kernels: list[KernelTime] = field(default_factory=list)

    @property
    def floor_us(self) -> float:
        """Sum of the known floors: parts run one after the other."""
        return sum(part.floor_us or 0.0 for part in self.parts)

    def markdown(self) -> str:
        """Tables of the parts and of all kernels, in Markdown."""
        lines = [
            f"A prompt of {self.tokens} tokens: {self.prompt_us:.0f} us in the profile. Floor: the longer of the bytes "
            f"at {self.bandwidth / 1e12:.2f} TB/s and the FLOPs at {self.flops / 1e12:.0f} TFLOP/s.",
            "",
            "| part | launches | us | share | MB | GFLOP | floor us | us / floor |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for part in self.parts:
            cells = [""] * 4
            if part.nbytes is not None and part.flops is not None and part.floor_us:
                ratio = part.microseconds / part.floor_us
                cells = [
                    f"{part.nbytes / 1e6:,.1f}",
                    f"{part.flops / 1e9:,.1f}",
                    f"{part.floor_us:.1f}",
                    f"{ratio:.2f}",
                ]
            share = part.microseconds / self.prompt_us
            lines.append(
                f"| {part.name} | {part.launches} | {part.microseconds:.1f} | {share:.1%} | {' | '.join(cells)} |"
            )
        lines += [
            f"| gaps | | {self.gap_us:.1f} | {self.gap_us / self.prompt_us:.1%} | | | | |",
            f"| all | {sum(part.launches for part in self.parts)} | {self.prompt_us:.1f} | | | | {self.floor_us:.1f} | "
            f"{self.prompt_us / self.floor_us if self.floor_us else float('nan'):.2f} |",
            "",
            "| part | kernel | launches | us | us each |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {k.part} | `{k.kernel}` | {k.launches} | {k.microseconds:.1f} | {k.microseconds / k.launches:.2f} |"
            for k in self.kernels
        ]
        return "\n".join(lines)


def parts_of(kernels: Sequence[Kernel], *, shared_expert: bool = False) -> list[str]:
    """The part of each kernel of a prompt, by its name and by what runs before and after it.

    The name of a matrix product does not tell which one it is. The first after attention or the delta rule is the
    output projection, the next one the router, then the two of a shared expert; others are the projections before
    attention or the delta rule. Between routing and the sum, the first half of the launches of our grouped GEMM are
    GEMM1: each GEMM has one launch per variant of tile height.

    Args:
        kernels: sorted by start.
        shared_expert: every layer has one.
    """
    parts = ["" if _EXPERTS_GEMM.search(kernel.name) else _plain_part(kernel) for kernel in kernels]
    for first, end in _runs(kernels):
        gemms = [index for index in range(first, end) if not parts[index]]
        for place, index in enumerate(gemms):
            parts[index] = GEMM1 if place < len(gemms) / 2 else GEMM2
    mixers = (ATTENTION, DELTA_RULE)
    last_mixer = max((index for index, part in enumerate(parts) if part in mixers), default=-1)
    after = (OUT, ROUTER, SHARED, SHARED) if shared_expert else (OUT, ROUTER)
    since = len(after)  # matrix products since attention or the delta rule
    before: list[int] = []  # those before the next one
    for index, part in enumerate(parts):
        if part in mixers:
            for place in before:
                parts[place] = QKV if part == ATTENTION else DELTA_IN
            since, before = 0, []
        elif part in (GEMM1, GEMM2):
            since = max(since, 2)
        elif part == "dense" and since < len(after):
            parts[index] = after[since]
            since += 1
        elif part == "dense":
            parts[index] = HEAD
            if index < last_mixer:
                before.append(index)
    return parts


def _plain_part(kernel: Kernel) -> str:
    if _CONVERSION.search(kernel.name) and kernel.blocks > 1:
        return CONVERSION
    return ROUTING if _ROUTING_WEIGHTS.search(kernel.name) else group_of(kernel)


def _runs(kernels: Sequence[Kernel]) -> list[tuple[int, int]]:
    """Ranges of indices from the first grouped GEMM of a layer to its last; only quantization may be between."""
    runs: list[tuple[int, int]] = []
    inside = False
    for index, kernel in enumerate(kernels):
        gemm = _EXPERTS_GEMM.search(kernel.name) is not None
        if gemm and not inside:
            runs.append((index, index + 1))
        elif gemm:
            runs[-1] = (runs[-1][0], index + 1)
        inside = gemm or (inside and "quantize" in kernel.name)
    return runs


def break_down_prompt(
    kernels: Sequence[Kernel],
    tokens: int,
    work: Mapping[str, Work],
    bandwidth: float,
    flops: float,
    chunk: int | None = None,
) -> PromptBreakdown:
    """Groups the kernels of one prompt.

    Args:
        kernels: sorted by start.
        tokens: of the prompt.
        work: of `prompt_work`; without it, no bytes, FLOPs and floors.
        bandwidth: bytes/s. flops: FLOP/s.
        chunk: largest number of tokens per call.
    """
    span = max(kernel.start + kernel.duration for kernel in kernels) - kernels[0].start
    own = own_times(kernels)
    parts: dict[str, Part] = {}
    times: dict[tuple[str, str], KernelTime] = {}
    for kernel, name, microseconds in zip(kernels, parts_of(kernels, shared_expert=SHARED in work), own, strict=True):
        part = parts.setdefault(name, Part(name))
        time = times.setdefault((name, kernel.name), KernelTime(name, kernel.name))
        for row in (part, time):
            row.launches += 1
            row.microseconds += microseconds
    for name, part in parts.items():
        if name in work:
            part.nbytes, part.flops = work[name]
            part.floor_us = work[name].floor_us(bandwidth, flops)
    return PromptBreakdown(
        tokens=tokens,
        chunk=chunk,
        prompt_us=span,
        gap_us=span - sum(own),
        bandwidth=bandwidth,
        flops=flops,
        parts=sorted(parts.values(), key=lambda part: -part.microseconds),
        kernels=sorted(times.values(), key=lambda time: -time.microseconds),
    )


def profile_prompt(generator: TextGenerator, prompt_ids: list[int], record: Mapping[str, Any]) -> PromptBreakdown:
    """Profiles a prompt up to its first new token, after a warm-up of the same length.

    Args:
        generator: the loaded artifact. prompt_ids: token ids. record: the export's record, for `prompt_work`.

    Raises:
        ValueError: no GPU, or a prompt that does not fit into the cache.
    """
    device: torch.device = generator.program.device
    check_profile(device)
    generator.check_length(len(prompt_ids), 1)
    next(generator.stream(prompt_ids))
    tokens = generator.stream(prompt_ids)
    kernels = profile_kernels(lambda: next(tokens), device)
    work = prompt_work(record, len(prompt_ids), generator.prefill_chunk)
    rates = measure_bandwidth(device), measure_flops(device)
    return break_down_prompt(kernels, len(prompt_ids), work, *rates, generator.prefill_chunk)
