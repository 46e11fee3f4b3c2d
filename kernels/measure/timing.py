"""Times one expert layer on a GPU, and computes the lower bound to compare with.

Method: a CUDA graph runs several layers that differ in weights and routing, so that weights are never in L2. After a
warm-up, the graph is replayed and timed with events. The result is the median over the replays, divided by the number
of layers.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from executorch_moe.kernels.arguments import ExpertArguments
from executorch_moe.kernels.experts.plan import Options, run_fused_experts
from executorch_moe.kernels.launch import Launch
from executorch_moe.kernels.packing.experts import PackedExperts
from executorch_moe.kernels.packing.fragments import (
    deinterleave_gate_up,
    dequantize,
    fragment_order,
    interleave_gate_up,
    nibble_order,
)
from executorch_moe.kernels.packing.mxfp4 import E8M0_BIAS, pack_e8m0
from executorch_moe.kernels.reference import reference_experts
from executorch_moe.kernels.schemes import MX_GROUP, get_scheme
from executorch_moe.kernels.shapes import LayerShape

H200_FLOPS = 790e12
"""bf16 FLOP/s of an 8192^3 matrix product on random data, measured on an H200."""
H200_BYTES = 4.3e12
"""Bytes/s, read plus written, of a large device-to-device copy, measured on an H200."""


def random_packed(shape: LayerShape, scheme: str, device: str, generator: torch.Generator) -> PackedExperts:
    """A packed layer of random codes, made on the device without the weights in bf16.

    Padding dequantizes to zero, as after `pack_experts`; the kernels rely on it.

    Args:
        shape: sizes of the layer, not padded; scheme mxfp4 has groups of 32 for any. scheme: name of the scheme.
        device: also "meta". generator: on that device.
    """
    kind = get_scheme(scheme)
    padded, g = shape.padded(), MX_GROUP if kind.microscaled else shape.group_size
    e = shape.experts

    def matrix(gemm: int) -> tuple[Tensor, Tensor | None]:
        n, k = padded.rows_and_k(gemm)
        rows, columns = padding_of(shape, gemm, device)
        if not kind.packed:
            w = torch.empty(e, n, k, dtype=torch.bfloat16, device=device)
            return w.normal_(0, k**-0.5, generator=generator).masked_fill_(rows[:, None] | columns, 0), None
        # Whole words: on a CPU eight times as fast as single bytes.
        words = torch.empty(e, k // 128, n, 8, dtype=torch.int64, device=device)
        w = words.random_(-(2**63), None, generator=generator).view(torch.uint8)
        if kind.microscaled:
            low, high = ~columns[::g].reshape(-1, 4)[:, nibble_order("mxfp4", w.device) // g].transpose(0, 1)
            w &= (low * 0x0F | high * 0xF0).to(torch.uint8)[:, None]
            # Random e2m1 codes have a standard deviation of 2.9.
            exponent = E8M0_BIAS + round(math.log2(k**-0.5 / 2.9))
            steps = torch.randint(-1, 2, (e, n, k // g), device=device, generator=generator)
            return w.masked_fill_(rows[:, None], 0), pack_e8m0(exponent + steps, n, k)
        scale = torch.rand(e, k // g, n, device=device, generator=generator) * 0.5 + 0.75
        # Rows r and r + 8 of 16 are adjacent in the scales. A group is all padding or none.
        pairs = rows.reshape(n // 16, 2, 8).transpose(1, 2).reshape(n)
        scale.masked_fill_(columns[::g, None] | pairs, 0)
        # A uniform signed nibble has a standard deviation of 4.6.
        unit = k**-0.5 / 4.6
        if kind.row_scaled(gemm):
            return w, torch.cat(((12 * scale).round(), torch.full_like(scale[:, :1], unit / 12)), dim=1).bfloat16()
        return w, (scale * unit).bfloat16()

    (w13, s13), (w2, s2) = matrix(1), matrix(2)
    return PackedExperts(
        w13, w2, s13, s2, None, None, None, None, scheme, g if s13 is not None else 0, shape.hidden, shape.intermediate
    )


def padding_of(shape: LayerShape, gemm: int, device: str) -> tuple[Tensor, Tensor]:
    """Padding of a GEMM's weights: bool [N] for the rows, in packed order, and bool [K] for the columns."""
    padded = shape.padded()
    h = torch.arange(padded.hidden, device=device) >= shape.hidden
    i = torch.arange(padded.intermediate, device=device) >= shape.intermediate
    return (interleave_gate_up(i.repeat(2)[None])[0], h) if gemm == 1 else (h, i)


def random_routing(
    tokens: int, shape: LayerShape, routing: str, device: str, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Distinct experts for each token, int64 [T, top_k], and softmax weights, fp32 [T, top_k].

    Args:
        routing: "uniform"; "zipf" (expert r in proportion to 1 / (r + 1)^1.2); "hot" (all tokens to the same top_k).

    Raises:
        ValueError: unknown routing.
    """
    rank = torch.arange(1, shape.experts + 1, device=device, dtype=torch.float32)
    if routing == "uniform":
        score = torch.zeros_like(rank)
    elif routing == "zipf":
        score = -1.2 * rank.log()
    elif routing == "hot":
        score = torch.where(rank <= shape.top_k, 1e4, 0.0)
    else:
        raise ValueError(f"routing={routing!r} is unknown: use uniform, zipf or hot")
    # Gumbel top-k draws without replacement in proportion to exp(score).
    uniform = torch.rand(tokens, shape.experts, device=device, generator=generator).clamp_(1e-9, 1 - 1e-7)
    ids = (score - (-uniform.log()).log()).topk(shape.top_k, dim=1).indices
    weights = torch.randn(tokens, shape.top_k, device=device, generator=generator).softmax(-1)
    return ids, weights


@dataclass
class LayerInputs:
    """Weights, tokens and routing of one layer. `packed` is None for a layer with weights of another implementation."""

    packed: PackedExperts | None
    hidden_states: Tensor
    topk_ids: Tensor
    topk_weights: Tensor

    def args(self) -> ExpertArguments:
        p = self.packed
        assert p is not None, "this layer has no packed weights"
        return p.arguments(self.hidden_states, self.topk_ids, self.topk_weights)

    def run(self, options: Options = Options(), submit: Callable[[Launch], None] = Launch.run_now) -> Tensor:
        return run_fused_experts(self.args(), options=options, submit=submit)

    @functools.cached_property
    def answer(self) -> Answer:
        """The expected results, computed once."""
        return Answer(self)

    def dequantized(self, expert: int) -> tuple[Tensor, Tensor]:
        """fp32 gate_up [2I, H] and down [H, I] of one expert."""
        p, at = self.packed, slice(expert, expert + 1)
        assert p is not None
        s13 = None if p.w13_scale is None else p.w13_scale[at]
        s2 = None if p.w2_scale is None else p.w2_scale[at]
        w13 = deinterleave_gate_up(dequantize(p.w13[at], s13, None, fragment_order(p.scheme, 1)))[0]
        w2 = dequantize(p.w2[at], s2, None, fragment_order(p.scheme, 2))[0]
        i_pad, h, i = w2.shape[1], p.hidden_size, p.intermediate_size
        return torch.cat((w13[:i, :h], w13[i_pad : i_pad + i, :h])), w2[:h, :i]


class Answer:
    """Expected results of the first and the last token of a layer, to check kernels that are timed.

    Attributes:
        rows: indices of the tokens. expected: fp32 [len(rows), H], computed in fp32 from the dequantized weights.
    """

    LARGEST_ERROR = 0.03
    """Relative L2 error: above the rounding errors of all schemes, and far below any wrong result."""

    def __init__(self, layer: LayerInputs) -> None:
        self.rows = sorted({0, len(layer.hidden_states) - 1})
        ids = layer.topk_ids[self.rows]
        chosen = ids.unique().tolist()
        matrices = [layer.dequantized(expert) for expert in chosen]
        self.expected = reference_experts(
            layer.hidden_states[self.rows],
            torch.searchsorted(torch.tensor(chosen, device=ids.device), ids),
            layer.topk_weights[self.rows],
            torch.stack([gate_up for gate_up, _ in matrices]),
            torch.stack([down for _, down in matrices]),
        )

    def check(self, out: Tensor, what: str) -> None:
        """Check the layer's result.

        Args:
            out: [T, H]. what: name of what was run, for the error.

        Raises:
            RuntimeError: the result is wrong.
        """
        error = float((out[self.rows].float() - self.expected).norm() / self.expected.norm())
        if not error <= self.LARGEST_ERROR:
            raise RuntimeError(
                f"{what} gives wrong results (relative error {error:.2g}), so its time means nothing: report this"
            )


def make_layers(
    shape: LayerShape,
    scheme: str,
    tokens: int,
    count: int,
    routing: str = "uniform",
    device: str = "cuda",
    seed: int = 0,
) -> list[LayerInputs]:
    """`count` layers with different random weights, tokens and routing."""
    g = torch.Generator(device).manual_seed(seed)
    layers = []
    for _ in range(count):
        packed = random_packed(shape, scheme, device, g)
        layers.append(with_tokens(packed, shape, tokens, routing, g))
    return layers


def with_tokens(
    packed: PackedExperts | None, shape: LayerShape, tokens: int, routing: str, generator: torch.Generator
) -> LayerInputs:
    """New tokens and routing on the generator's device for existing weights (None: of another implementation)."""
    device = generator.device.type
    x = torch.randn(tokens, shape.hidden, device=device, generator=generator).bfloat16()
    return LayerInputs(packed, x, *random_routing(tokens, shape, routing, device, generator))


def work(shape: LayerShape, scheme: str, layers: list[LayerInputs]) -> tuple[float, float]:
    """FLOPs of a layer, and bytes of the weights that its tokens need: the mean over the layers."""
    tokens = layers[0].hidden_states.shape[0]
    touched = statistics.mean(int(layer.topk_ids.unique().numel()) for layer in layers)
    flops = 2.0 * tokens * shape.top_k * 3 * shape.hidden * shape.intermediate
    kind = get_scheme(scheme)
    scale_bits = 8 / MX_GROUP if kind.microscaled else 16 / shape.group_size
    bits = kind.weight_bits + (scale_bits if kind.packed else 0)
    return flops, touched * 3 * shape.hidden * shape.intermediate * bits / 8


def floor_us(shape: LayerShape, scheme: str, layers: list[LayerInputs]) -> float:
    """Lower bound of a layer's time in microseconds: from its FLOPs and weight bytes, and the rates of an H200."""
    flops, nbytes = work(shape, scheme, layers)
    return 1e6 * max(flops / H200_FLOPS, nbytes / H200_BYTES)


def capture(steps: list[Callable[[], object]]) -> tuple[torch.cuda.CUDAGraph, list[object]]:
    """One CUDA graph of all steps, captured after a warm-up, and their results, which each replay writes again."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            for step in steps:
                step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [step() for step in steps]
    return graph, results


def replay_us(graph: torch.cuda.CUDAGraph, replays: int = 25) -> float:
    """Microseconds of a replay of the graph: the median over replays, after three that are not counted."""
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return 1e3 * statistics.median(times)


def time_graph(steps: list[Callable[[], object]], replays: int = 25) -> float:
    """Microseconds of a step: the median over replays of one CUDA graph of all steps, divided by their number."""
    graph, _results = capture(steps)
    return replay_us(graph, replays) / len(steps)
