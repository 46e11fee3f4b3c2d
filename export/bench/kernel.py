"""`bench kernel`: times implementations of an expert layer over token counts, and shows them as table and plot."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

import torch

from executorch_moe.backends.atomic_files import atomic_file
from executorch_moe.export.models.upstream_experts import operator
from executorch_moe.kernels.experts.plan import Options
from executorch_moe.kernels.measure.compile import CompileJob, compile_ahead
from executorch_moe.kernels.measure.timing import (
    H200_BYTES,
    H200_FLOPS,
    LayerInputs,
    floor_us,
    random_packed,
    time_graph,
    with_tokens,
    work,
)
from executorch_moe.kernels.packing.experts import PackedExperts
from executorch_moe.kernels.schemes import get_scheme
from executorch_moe.kernels.shapes import SHAPES, LayerShape
from executorch_moe.kernels.tuning.configs import GROUP_SIZES_M

from .humming import ACTIVATIONS, HummingExperts, check_humming
from .rivals import Step, torch_grouped_mm, upstream

OURS = {
    "ours": Options(),
    "ours-heuristic": Options(tables=False),
    "ours-grouped": Options(path="grouped"),
    "ours-tile": Options(path="grouped", persistent=False),
    **{f"ours-g{g}": Options(path="grouped", group_size_m=g) for g in GROUP_SIZES_M},
    **{f"ours-tile-g{g}": Options(path="grouped", persistent=False, group_size_m=g) for g in GROUP_SIZES_M},
}
"""Our kernels: by default, without tuned tables, with the grouped path for any number of tokens, and with one CTA for
each tile; the last two also with a fixed GROUP_SIZE_M, the row blocks in a group of the tile order."""

# Implementation -> schemes that it supports.
IMPLEMENTATIONS = {
    **dict.fromkeys(OURS, ("w4a16", "w4a8", "mxfp4", "bf16")),
    "upstream-dec": ("w4a16",),
    "upstream-a16": ("w4a16",),
    "upstream-a8": ("w4a8",),
    "torch-grouped-mm": ("bf16",),
    "humming": tuple(ACTIVATIONS),
}
UPSTREAM = {
    "upstream-dec": "fused_moe",
    "upstream-a16": "fused_moe_batched_gemm",
    "upstream-a8": "fused_moe_batched_gemm_int8",
}
WITH_OUR_WEIGHTS = (*OURS, "humming")
"""Implementations that run with the weights of a packed layer, so that their results are checked."""
ROUTINGS = ("uniform", "zipf", "hot")
FORMATS = ("md", "json")


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        floor: microseconds over those of the roofline (`floor_us`).
        vs_upstream: the best time of ExecuTorch's kernels for the same tokens over this one; None if not measured.
    """

    shape: str
    routing: str
    tokens: int
    scheme: str
    implementation: str
    microseconds: float
    tflops: float
    gbytes: float
    floor: float
    vs_upstream: float | None = None


@dataclass(frozen=True)
class KernelBenchmark:
    """What is to be measured; checked when made.

    Attributes:
        shape: a preset's name, or numbers: ExTOP_KxHxI or ExTOP_KxHxIxGROUP_SIZE, as 128x8x2048x768x128.
        tokens, implementations, schemes: each combination that exists is measured.
        routing: "uniform", "zipf" (1.2) or "hot" (all tokens to the same top_k experts).
        layers: with different weights and routing in one CUDA graph. None: `layers_beyond_l2`.
        replays: the median is over these.
    """

    shape: str = "qwen35"
    tokens: tuple[int, ...] = (1, 8, 64, 512, 1642, 4096)
    implementations: tuple[str, ...] = ("ours", "ours-tile")
    schemes: tuple[str, ...] = ("w4a16",)
    routing: str = "uniform"
    layers: int | None = None
    replays: int = 25

    def __post_init__(self) -> None:
        parse_shape(self.shape)
        for what, values, known in (
            ("implementation", self.implementations, IMPLEMENTATIONS),
            ("routing", (self.routing,), ROUTINGS),
        ):
            for value in values:
                if value not in known:
                    raise ValueError(f"{what}={value!r} is unknown: use one of {', '.join(known)}")
        for scheme in self.schemes:
            get_scheme(scheme)
        if not self.tokens or min(self.tokens) < 1:
            raise ValueError(f"tokens={list(self.tokens)} must be one or more positive numbers, as 1,64,512")
        if min(self.layers or 1, self.replays) < 1 or self.layers == 0:
            raise ValueError(f"layers={self.layers} and replays={self.replays} must be at least 1")
        if not self.pairs():
            raise ValueError(
                f"none of {', '.join(self.implementations)} has scheme {', '.join(self.schemes)}: "
                + "; ".join(f"{name} has {', '.join(has)}" for name, has in IMPLEMENTATIONS.items())
            )

    def pairs(self) -> list[tuple[str, str]]:
        """Implementation and scheme of each series to measure."""
        return [(i, s) for i in self.implementations for s in self.schemes if s in IMPLEMENTATIONS[i]]

    def layer_count(self) -> int:
        """`layers`, or what it stands for on the GPU of this machine."""
        if self.layers is not None:
            return self.layers
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return layers_beyond_l2(
            parse_shape(self.shape), self.schemes, properties.L2_cache_size, properties.total_memory
        )

    def run(self) -> Iterator[Row]:
        """Measures; yields each row as soon as it is known. The GPU holds the weights of one implementation at a time.

        Raises:
            ValueError: no GPU.
        """
        if not torch.cuda.is_available():
            raise ValueError(f"torch {torch.__version__} finds no GPU: run this on a machine with one")
        shape = parse_shape(self.shape)
        for implementation, _ in self.pairs():
            if implementation in UPSTREAM:
                operator(UPSTREAM[implementation])  # raises before anything is measured
            elif implementation == "humming":
                check_humming()
        compile_ahead(
            [CompileJob(shape, s, tokens, OURS[i]) for i, s in self.pairs() if i in OURS for tokens in self.tokens]
        )
        for implementation, scheme in self.pairs():
            generator = torch.Generator("cuda").manual_seed(0)
            steps, packed = [], []
            for _ in range(self.layer_count()):
                own = implementation not in WITH_OUR_WEIGHTS
                packed.append(None if own else random_packed(shape, scheme, "cuda", generator))
                steps.append(step_of(implementation, shape, generator, packed[-1], self.tokens))
            for tokens in self.tokens:
                # The same tokens and routing for every implementation.
                routing = torch.Generator("cuda").manual_seed(tokens)
                inputs = [with_tokens(p, shape, tokens, self.routing, routing) for p in packed]
                if implementation in WITH_OUR_WEIGHTS:
                    result = steps[0](inputs[0])
                    inputs[0].answer.check(result, f"{implementation} {scheme} at {tokens} tokens")
                us = time_graph(
                    [partial(step, layer) for step, layer in zip(steps, inputs, strict=True)],
                    self.replays,
                )
                flops, nbytes = work(shape, scheme, inputs)
                yield Row(
                    shape.label, self.routing, tokens, scheme, implementation, us,
                    flops / us / 1e6, nbytes / us / 1e3, us / floor_us(shape, scheme, inputs),
                )  # fmt: skip
            del steps, packed
            torch.cuda.empty_cache()


def layers_beyond_l2(shape: LayerShape, schemes: Sequence[str], l2: int, memory: int) -> int:
    """Number of layers whose weights leave L2 before they are read again: at least 3.

    The weights of top_k experts, which one token reads, are twice the L2 cache in sum, as far as all layers fit into
    0.4 of the memory.

    Args:
        l2, memory: bytes of the GPU.
    """
    bits = [get_scheme(scheme).weight_bits for scheme in schemes]
    expert = 3 * shape.hidden * shape.intermediate / 8  # bytes, for one bit a weight
    wanted = -(-2 * l2 // int(min(bits) * expert * shape.top_k))
    return max(3, min(wanted, int(0.4 * memory / (max(bits) * expert * shape.experts))))


def step_of(
    implementation: str,
    shape: LayerShape,
    generator: torch.Generator,
    packed: PackedExperts | None = None,
    tokens: Sequence[int] = (),
) -> Step:
    """A function that runs one layer of an implementation.

    Args:
        generator: for the weights of implementations that make their own.
        packed: weights for those of `WITH_OUR_WEIGHTS`.
        tokens: numbers of tokens that will be measured.
    """
    if implementation in OURS:
        options = OURS[implementation]

        def ours(layer: LayerInputs) -> torch.Tensor:
            return layer.run(options)

        return ours
    if implementation in UPSTREAM:
        return upstream(UPSTREAM[implementation], shape, generator)
    if implementation == "humming":
        assert packed is not None
        return HummingExperts(packed, tokens, shape.top_k)
    return torch_grouped_mm(shape, generator)


def parse_shape(text: str) -> LayerShape:
    """Parses a preset's name, or sizes as ExTOP_KxHxIxGROUP_SIZE.

    Raises:
        ValueError: neither; the message lists the presets.
    """
    if text in SHAPES:
        return SHAPES[text]
    try:
        numbers = [int(part) for part in text.split("x")]
        if len(numbers) not in (4, 5) or min(numbers) < 1 or numbers[1] > numbers[0]:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"shape={text!r} is unknown: use one of {', '.join(SHAPES)}, or numbers as ExTOP_KxHxIxGROUP_SIZE "
            "(128x8x2048x768x128) with TOP_K <= E"
        ) from None
    return LayerShape(*numbers)


def with_ratios(rows: Iterable[Row]) -> list[Row]:
    """Rows sorted by tokens, with `vs_upstream` filled in."""
    rows = list(rows)
    best: dict[int, float] = {}
    for row in rows:
        if row.implementation in UPSTREAM:
            best[row.tokens] = min(row.microseconds, best.get(row.tokens, row.microseconds))
    filled = [
        Row(**{**asdict(row), "vs_upstream": best[row.tokens] / row.microseconds if row.tokens in best else None})
        for row in rows
    ]
    return sorted(filled, key=lambda row: (row.tokens, row.scheme, row.implementation))


def header(benchmark: KernelBenchmark) -> str:
    """GPU, versions and method, as one paragraph."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "triton"))
    layers = benchmark.layer_count() if torch.cuda.is_available() else benchmark.layers
    return (
        f"{device}, {versions}. One expert layer, shape {benchmark.shape}, {benchmark.routing} routing: routing, "
        f"GEMMs, activation and sum over top_k. Median of {benchmark.replays} replays of a CUDA graph of "
        f"{layers} layers with different weights and routing. Floor: {H200_FLOPS / 1e12:.0f} TFLOP/s, "
        f"{H200_BYTES / 1e12:.1f} TB/s of touched weights (measured on an H200)."
    )


def markdown(benchmark: KernelBenchmark, rows: Sequence[Row]) -> str:
    """Header and table in Markdown."""
    lines = [
        header(benchmark),
        "",
        "| tokens | scheme | implementation | us | TFLOP/s | GB/s | times the floor | speed against upstream |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        ratio = "" if r.vs_upstream is None else f"{r.vs_upstream:.2f}x"
        lines.append(
            f"| {r.tokens} | {r.scheme} | {r.implementation} | {r.microseconds:.1f} | {r.tflops:.1f} | {r.gbytes:.0f} "
            f"| {r.floor:.2f} | {ratio} |"
        )
    return "\n".join(lines)


def as_json(benchmark: KernelBenchmark, rows: Sequence[Row]) -> str:
    """Header, settings and rows as JSON."""
    return json.dumps(
        {"method": header(benchmark), "benchmark": asdict(benchmark), "rows": [asdict(row) for row in rows]}, indent=2
    )


def plot(benchmark: KernelBenchmark, rows: Sequence[Row], path: Path) -> None:
    """Plots microseconds over tokens, a line for each implementation and scheme, with the floor; see `atomic_file`.

    Raises:
        ValueError: matplotlib is not installed, or does not support the file's suffix.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("a plot needs matplotlib: pip install 'executorch-moe[bench]'") from None
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, scheme in dict.fromkeys((r.implementation, r.scheme) for r in rows):
        line = [r for r in rows if (r.implementation, r.scheme) == (name, scheme)]
        axes.plot([r.tokens for r in line], [r.microseconds for r in line], marker="o", label=f"{name} {scheme}")
    tokens = sorted({r.tokens for r in rows})
    floors = [min(r.microseconds / r.floor for r in rows if r.tokens == t) for t in tokens]
    axes.plot(tokens, floors, color="gray", linestyle="--", label="floor")
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="microseconds a layer")
    axes.set_title(f"{benchmark.shape}, {benchmark.routing} routing")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    with atomic_file(path) as aside:
        figure.savefig(aside)
