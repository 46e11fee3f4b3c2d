"""`bench chain`: times each launch of a decode step where it runs, in the chain of all launches of several layers.

Method: one CUDA graph holds the decode step of a few layers with different weights, so that weights are never in L2
(`decode_chain`). The time of a layer is the difference between graphs of three passes over the layers and of one pass,
by CUDA events, which excludes the start of the graph. The times of single launches come from a profile of replays;
profiling makes everything a little slower.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch

from executorch_moe.kernels.experts.plan import Options
from executorch_moe.kernels.measure.timing import capture, replay_us
from executorch_moe.kernels.op import forced
from executorch_moe.kernels.schemes import get_scheme

from .breakdown import measure_bandwidth, measure_launch, profile_kernels
from .decode_chain import DecodeChain, check_first_layer, check_same_bits, check_sizes, find_shape
from .launch_times import LaunchTime, mean_time, of_replays
from .model import versions

PASSES = 3
"""Passes over the layers in the longer graph."""
PROFILED_REPLAYS = 20


@dataclass(frozen=True)
class LaunchRow:
    """One launch of the chain, or the mean of the launches at the same place of several layers.

    Attributes:
        operator: as in `DecodeChain.step`. layer: index; -1 after the last layer, and None for a mean.
        time: microseconds. nbytes: bytes that it must read from memory; None if unknown.
        floor_us: time of these bytes at the measured bandwidth.
    """

    operator: str
    layer: int | None
    time: LaunchTime
    nbytes: int | None
    floor_us: float | None


@dataclass
class ChainResult:
    """Times of a chain.

    Attributes:
        settings: option -> value. device: name of the GPU. versions: package -> version.
        layer_us: microseconds of a layer, by events. chain_us: of one pass, with the launches after the last layer.
        profiled_layer_us: of a layer within the profile.
        model_layers: of the whole model. model_us: its decode step, chain_us plus the layers that the chain lacks.
        l2_bytes: size of the GPU's L2 cache; the chain must read more, so that each layer reads from memory.
        bandwidth: measured bytes/s of a large copy. launch_us: measured microseconds of an empty kernel in a graph.
        errors: name of a result of the first layer -> relative L2 error.
        kinds: one row per launch of a layer, the mean over all layers but the first and the last (the last layer alone
            if there are one or two), and the launches after the last layer.
        launches: all launches of the chain, medians over the replays.
    """

    settings: dict[str, Any]
    device: str
    versions: dict[str, str]
    layer_us: float
    chain_us: float
    profiled_layer_us: float
    model_layers: int
    model_us: float
    l2_bytes: int
    bandwidth: float
    launch_us: float
    errors: dict[str, float]
    kinds: list[LaunchRow] = field(default_factory=list)
    launches: list[LaunchRow] = field(default_factory=list)

    @property
    def layer_bytes(self) -> int:
        """Bytes that a layer must read, as far as they are known."""
        return sum(row.nbytes or 0 for row in self.kinds if row.layer is None)

    def markdown(self) -> str:
        """Settings and tables in Markdown."""
        s = self.settings
        floor = 1e6 * self.layer_bytes / self.bandwidth
        groups = f" in groups of {s['group_size']}" if get_scheme(s["scheme"]).packed else ""
        lines = [
            f"{self.device}, {', '.join(f'{name} {version}' for name, version in self.versions.items())}. Decode step "
            f"of {s['layers']} layers with different weights in one CUDA graph: shape {s['shape']}, {s['context']} "
            f"positions in the cache, dense {s['dense']}, experts {s['scheme']}{groups}. Median of {s['repeats']} "
            f"replays. The layers read {s['layers'] * self.layer_bytes / 1e6:.0f} MB in a pass, and the L2 cache has "
            f"{self.l2_bytes / 1e6:.0f} MB.",
            "",
            "| | us | tokens/s |",
            "|---|---|---|",
            f"| one layer, by events | {self.layer_us:.2f} | |",
            f"| one layer, in the profile | {self.profiled_layer_us:.2f} | |",
            f"| one layer, {self.layer_bytes / 1e6:.1f} MB at {self.bandwidth / 1e12:.2f} TB/s | {floor:.2f} | |",
            f"| {s['layers']} layers and the vocabulary, by events | {self.chain_us:.1f} | |",
            f"| {self.model_layers} layers and the vocabulary, from these | {self.model_us:.0f} | "
            f"{1e6 / self.model_us:.1f} |",
            "",
            "| operator | kernel | in chain us | own us | start us | MB | floor us | in chain / floor |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in self.kinds:
            size = floor_text = ratio = ""
            if row.nbytes and row.floor_us:
                size, floor_text = f"{row.nbytes / 1e6:.2f}", f"{row.floor_us:.2f}"
                ratio = f"{row.time.in_chain / row.floor_us:.2f}"
            lines.append(
                f"| {row.operator} | `{row.time.kernel[:60]}` | {row.time.in_chain:.2f} | {row.time.duration:.2f} | "
                f"{row.time.start:+.2f} | {size} | {floor_text} | {ratio} |"
            )
        lines += [
            "",
            "In chain: from the end of all launches before to its own end. Start: after the end of all launches "
            "before, negative if it overlaps with them. Floor: its bytes at the bandwidth of a large copy. "
            f"An empty kernel takes {self.launch_us:.2f} us. Largest relative errors of the first layer: "
            + ", ".join(f"{name} {error:.1e}" for name, error in self.errors.items())
            + ".",
        ]
        return "\n".join(lines)


def as_json(results: Sequence[ChainResult]) -> str:
    """All fields of all results, as a JSON list."""
    return json.dumps([asdict(result) for result in results], indent=2)


def chain(
    shape: str = "qwen3",
    layers: int = 8,
    context: int = 1642,
    dense: str = "int8",
    scheme: str = "w4a16",
    group_size: int = 128,
    repeats: int = 50,
    options: Options = Options(),
) -> ChainResult:
    """Makes a chain and measures it; see `DecodeChain` and `measure`.

    Args:
        shape: as for `find_shape`.
        repeats: replays; times are medians.
        options: forced choices of the experts.

    Raises:
        ValueError: no GPU, or an invalid argument.
        RuntimeError: see `measure`.
    """
    check_arguments(shape, layers, dense, scheme, group_size, repeats)
    made = DecodeChain(find_shape(shape), layers, context, dense, scheme, group_size)
    return measure(made, shape, repeats, options)


def check_arguments(shape: str, layers: int, dense: str, scheme: str, group_size: int, repeats: int) -> None:
    """Checks the arguments of `chain`, and then that there is a GPU.

    Raises:
        ValueError: an invalid argument, or no GPU.
    """
    check_sizes(find_shape(shape), layers, dense, scheme, group_size)
    if repeats < 1:
        raise ValueError(f"repeats={repeats} must be at least 1")
    if not torch.cuda.is_available():
        raise ValueError(f"torch {torch.__version__} finds no GPU: run this on a machine with one")


class Timed(NamedTuple):
    """A chain that was captured, timed and checked.

    Attributes:
        layer_us, chain_us: as in `ChainResult`. errors: of `check_first_layer`. graph: of one pass.
    """

    layer_us: float
    chain_us: float
    errors: dict[str, float]
    graph: torch.cuda.CUDAGraph


def time_chain(made: DecodeChain, repeats: int = 50, options: Options = Options()) -> Timed:
    """Times a chain by events and checks its results, without a profile. Takes seconds, to compare many kernels.

    Args:
        made, repeats, options: as for `measure`.

    Raises:
        RuntimeError: the results are wrong.
    """
    with forced(options):
        graph, captured = capture([made.step])
        step: Any = captured[0]
        logits, results = step
        one_us = replay_us(graph, repeats)
        errors = check_first_layer(made, results[0])
        check_same_bits(made, logits)
        longer, _ = capture([partial(made.step, PASSES)])
        layer_us = (replay_us(longer, repeats) - one_us) / ((PASSES - 1) * len(made.layers))
    return Timed(layer_us, one_us, errors, graph)


def measure(made: DecodeChain, shape: str, repeats: int = 50, options: Options = Options()) -> ChainResult:
    """Measures a chain; call it again to compare kernels on the same weights.

    Args:
        made: the weights.
        shape: its name, for the result.
        repeats: replays; times are medians.
        options: forced choices of the experts.

    Raises:
        RuntimeError: the results are wrong, or the profile does not have the launches of the chain.
    """
    device, layers = torch.device(made.device), len(made.layers)
    timed = time_chain(made, repeats, options)

    def replays() -> None:
        for _ in range(PROFILED_REPLAYS):
            timed.graph.replay()

    with forced(options):
        names = launch_names(made, device)
    times = of_replays(profile_kernels(replays, device), [name for *_, name in names])
    bandwidth = measure_bandwidth(device)
    rows = launch_rows(made, names, times, bandwidth)
    kinds = rows_of_kinds(rows, layers)
    return ChainResult(
        settings={
            "shape": shape,
            "layers": layers,
            "context": made.context,
            "dense": made.dense,
            "scheme": made.scheme,
            "group_size": made.shape.group_size,
            "repeats": repeats,
        },
        device=torch.cuda.get_device_name(device),
        versions=versions(("torch", "triton", "executorch-moe")),
        layer_us=timed.layer_us,
        chain_us=timed.chain_us,
        profiled_layer_us=sum(row.time.in_chain for row in kinds if row.layer is None),
        model_layers=made.model.layers,
        model_us=timed.chain_us + (made.model.layers - layers) * timed.layer_us,
        l2_bytes=l2_bytes(device),
        bandwidth=bandwidth,
        launch_us=measure_launch(device),
        errors=timed.errors,
        kinds=kinds,
        launches=rows,
    )


def l2_bytes(device: torch.device) -> int:
    """Bytes of the L2 cache of a GPU."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def launch_names(made: DecodeChain, device: torch.device) -> list[tuple[str, int, str]]:
    """Operator, layer and kernel of each launch of one pass, in order, found by profiling each operator by itself.

    Raises:
        RuntimeError: two calls of an operator start different kernels.
    """
    found: list[tuple[str, int, str]] = []
    known: dict[tuple[str, bool], list[str]] = {}

    def profiled(operator: str, layer: int, call: Callable[[], Any]) -> Any:
        key = (operator, layer == 0)
        if key not in known:

            def twice() -> None:
                call()
                torch.cuda.synchronize(device)
                call()

            names = [kernel.name for kernel in profile_kernels(twice, device)]
            known[key] = names[: len(names) // 2]
            if known[key] * 2 != names:
                raise RuntimeError(f"two calls of {operator} start different kernels, {names}: report this")
        found.extend((operator, layer, name) for name in known[key])
        return call()

    made.step(run=profiled)
    return found


def launch_rows(
    made: DecodeChain, names: Sequence[tuple[str, int, str]], times: Sequence[LaunchTime], bandwidth: float
) -> list[LaunchRow]:
    """Joins launches with their times and bytes.

    Args:
        names: operator, layer and kernel of each launch. times: of the same launches.
        bandwidth: bytes/s.
    """
    rows = []
    calls: dict[tuple[str, int], int] = {}
    for operator, layer, _ in names:
        calls[operator, layer] = calls.get((operator, layer), 0) + 1
    place: dict[tuple[str, int], int] = {}
    for (operator, layer, _), time in zip(names, times, strict=True):
        index = place.get((operator, layer), 0)
        place[operator, layer] = index + 1
        nbytes = bytes_of_launch(made.bytes_of(operator), index, calls[operator, layer])
        rows.append(LaunchRow(operator, layer, time, nbytes, None if nbytes is None else 1e6 * nbytes / bandwidth))
    return rows


def bytes_of_launch(sizes: Sequence[int], index: int, launches: int) -> int | None:
    """Bytes of launch `index` of an operator with `launches` launches; `sizes` has the bytes of each expected launch.

    A single launch reads everything. None if the operator has another number of launches than expected.
    """
    if launches == 1:
        return sum(sizes)
    if not any(sizes):
        return 0
    return sizes[index] if launches == len(sizes) else None


def rows_of_kinds(rows: Sequence[LaunchRow], layers: int) -> list[LaunchRow]:
    """Means over the layers of the launches at the same place; launches after the last layer are kept.

    The first layer has nothing before it, and the cache update follows the last: both are left out if others remain.
    """
    inner = range(1, layers - 1) if layers > 2 else range(layers - 1, layers)
    by_layer = [[row for row in rows if row.layer == index] for index in inner]
    means = [
        LaunchRow(same[0].operator, None, mean_time([row.time for row in same]), same[0].nbytes, same[0].floor_us)
        for same in zip(*by_layer, strict=True)
    ]
    return means + [row for row in rows if row.layer == -1]
