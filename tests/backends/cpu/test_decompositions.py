"""Decompositions for the CPU: attention, experts in every format, and what a decode step of the CPU program copies."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from executorch.exir import to_edge_transform_and_lower
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan_op
from torch.export import Dim, ExportedProgram, export
from torch.nn.functional import scaled_dot_product_attention as attention

from executorch_moe.backends.artifact.files import save
from executorch_moe.backends.cpu import MoECpuPartitioner
from executorch_moe.backends.cpu.decompositions import decompose
from executorch_moe.backends.lower import lower
from executorch_moe.backends.runtime.loader import LoadedProgram, load
from executorch_moe.kernels import FusedExperts, pack_experts
from executorch_moe.kernels.packing import PackedExperts


class Function(nn.Module):
    """A function as a module that can be exported."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(*args)


def lowered(program: ExportedProgram, folder: Path) -> LoadedProgram:
    return load(save(lower({"forward": program}, "cpu"), folder / "model").pte)


@dataclasses.dataclass(frozen=True)
class Heads:
    """Shapes of one attention; `why` is the reason for it."""

    why: str
    query: tuple[int, ...]
    key: tuple[int, ...]
    value_width: int = 16
    mask: str = "none"
    grouped: bool = False
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return self.why.replace(" ", "-")


ATTENTIONS = (
    Heads("one token and grouped heads", (1, 4, 1, 16), (1, 2, 40, 16), mask="bool", grouped=True),
    Heads("several tokens and grouped heads", (1, 4, 9, 16), (1, 2, 40, 16), mask="bool", grouped=True),
    Heads("batches", (3, 4, 5, 16), (3, 1, 7, 16), mask="float", grouped=True),
    Heads("values of another width", (1, 4, 1, 16), (1, 4, 12, 16), value_width=24, mask="bool"),
    Heads("rows that see no key", (1, 4, 6, 16), (1, 4, 6, 16), mask="empty rows"),
    Heads("causal", (1, 2, 6, 16), (1, 2, 6, 16), mask="causal"),
    Heads("no mask and no heads", (2, 3, 16), (2, 5, 16)),
    Heads("bf16", (1, 4, 3, 16), (1, 2, 8, 16), mask="bool", grouped=True, dtype=torch.bfloat16),
    Heads("keys that are broadcast", (2, 4, 3, 16), (1, 1, 8, 16), mask="bool"),
    Heads("grouped heads that are broadcast", (2, 4, 3, 16), (1, 2, 8, 16), mask="bool", grouped=True),
)


@pytest.mark.parametrize("case", ATTENTIONS, ids=str)
def test_attention_is_that_of_torch(case: Heads) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(case.query, dtype=case.dtype), torch.randn(case.key, dtype=case.dtype)
    value = torch.randn(*case.key[:-1], case.value_width, dtype=case.dtype)
    shape = case.query[-2], case.key[-2]
    masks = {"bool": torch.rand(shape) < 0.7, "empty rows": torch.rand(shape) < 0.2, "float": torch.randn(shape)}
    mask = masks.get(case.mask)
    if case.mask == "bool":
        mask[:, 0] = True
    if case.mask == "empty rows":
        mask[1] = False

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        causal = case.mask == "causal"
        return attention(query, key, value, mask, is_causal=causal, scale=0.3, enable_gqa=case.grouped)

    args = query, key, value
    program = decompose(export(Function(run), args))
    assert "scaled_dot_product" not in str(program.graph)
    expected = run(*args)
    tolerance = 1e-5 if case.dtype == torch.float32 else 2**-7
    torch.testing.assert_close(program.module()(*args), expected, rtol=tolerance, atol=tolerance)
    assert not expected.isnan().any()


@dataclasses.dataclass(frozen=True)
class Format:
    """A format of packed experts that the CPU target supports; `why` is the reason for it."""

    why: str
    scheme: str = "w4a16"
    group_size: int = 32
    hidden: int = 256
    intermediate: int = 256
    algorithm: str = "minmax"
    bias: bool = False
    activation: str = "silu"

    def __str__(self) -> str:
        return self.why.replace(" ", "-")


FORMATS = (
    Format("groups of 32 in two K blocks"),
    Format("zero points in groups of two K blocks", algorithm="hqq", group_size=256),
    Format("int8 activations and groups of 64", scheme="w4a8", group_size=64),
    Format("padding and biases", hidden=160, intermediate=96, bias=True, activation="swiglu_oai"),
)
EXPERTS, TOP_K = 6, 2


def packed(case: Format) -> PackedExperts:
    torch.manual_seed(3)
    gate_up = torch.randn(EXPERTS, 2 * case.intermediate, case.hidden) / case.hidden**0.5
    down = torch.randn(EXPERTS, case.hidden, case.intermediate) / case.intermediate**0.5
    biases = (torch.randn(EXPERTS, 2 * case.intermediate), torch.randn(EXPERTS, case.hidden)) if case.bias else ()
    names = dict(zip(("gate_up_bias", "down_bias"), biases, strict=False))
    options = {"scheme": case.scheme, "group_size": case.group_size, "algorithm": case.algorithm}
    return pack_experts(gate_up, down, **options, **names)


def routed(tokens: int, hidden: int) -> tuple[Tensor, Tensor, Tensor]:
    weights, ids = torch.randn(tokens, EXPERTS).softmax(-1).topk(TOP_K, -1)
    return torch.randn(tokens, hidden).bfloat16(), ids, weights


@pytest.mark.parametrize("case", FORMATS, ids=str)
def test_formats_in_the_runtime(case: Format, tmp_path: Path, executorch_runtime: None) -> None:
    module = FusedExperts(packed(case), activation=case.activation)
    one, some = routed(1, case.hidden), routed(5, case.hidden)
    assert (module.w13_zero is not None) == (case.algorithm == "hqq")
    tokens = Dim("T", min=2, max=16)
    programs = {"decode": export(module, one), "prefill": export(module, some, dynamic_shapes=({0: tokens},) * 3)}
    loaded = load(save(lower(programs, "cpu"), tmp_path / "model").pte)
    for name, args in (("decode", one), ("prefill", some), ("prefill", routed(16, case.hidden))):
        torch.testing.assert_close(loaded.run(name, *args)[0], module(*args), rtol=2**-7, atol=2**-7)


def test_linear_layers_in_the_runtime(tmp_path: Path, executorch_runtime: None) -> None:
    """They are kept whole next to experts, with bias and with a length that changes."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(64, 256), nn.Linear(256, 40, bias=False)
            self.experts = FusedExperts(packed(FORMATS[0]))

        def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            return self.second(self.experts(self.first(x), ids, weights)[None]).transpose(1, 2)

    module = Layer().eval()
    args = (torch.randn(5, 64), *routed(5, 64)[1:])
    program = export(module, args, dynamic_shapes=({0: Dim("T", min=2, max=16)},) * 3)
    loaded = lowered(program, tmp_path)
    for tokens in (2, 5, 16):
        args = (torch.randn(tokens, 64), *routed(tokens, 64)[1:])
        torch.testing.assert_close(loaded.run("forward", *args)[0], module(*args).detach(), rtol=1e-2, atol=1e-2)


def test_signed_nibbles_in_the_runtime(tmp_path: Path, executorch_runtime: None) -> None:
    """The experts' weights depend on it: a product of uint8 wraps, and so does its conversion to int8."""
    parts = Function(lambda x: torch.cat([(x * 16).to(torch.int8), (x & 0xF0).to(torch.int8)]).to(torch.float32))
    values = torch.arange(256).to(torch.uint8)
    low, high = lowered(export(parts, (values,)), tmp_path).run("forward", values)[0].chunk(2)
    signed = [nibble - 16 * (nibble > 7) for nibble in range(16)]
    assert low.tolist() == [16 * signed[byte % 16] for byte in range(256)]
    assert high.tolist() == [16 * signed[byte // 16] for byte in range(256)]


class Block(nn.Module):
    """One layer as in a model, for one token: projection, attention over a cache, experts."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(256, 256, bias=False), nn.Linear(256, 256, bias=False)
        self.experts = FusedExperts(packed(FORMATS[0]))
        for name in ("key", "value"):
            self.register_buffer(name, torch.randn(1, 2, 512, 64))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
        query = self.query(x).reshape(1, 1, 4, 64).transpose(1, 2)
        attended = attention(query, self.key, self.value, mask, enable_gqa=True)
        return self.experts(self.out(attended.transpose(1, 2).flatten(1)), ids, weights)


def test_a_decode_step_permutes_no_weights_and_no_cache() -> None:
    """ExecuTorch's `permute_copy` takes about 9 ns per element: nine tenths of a step that permuted all of these."""
    module, args = Block().eval(), (torch.randn(1, 256), *routed(1, 256)[1:], torch.ones(1, 512, dtype=torch.bool))
    edge = to_edge_transform_and_lower(export(module, args), partitioner=[MoECpuPartitioner()])
    graph = edge.exported_program().graph
    moved = [n for n in graph.nodes if "permute_copy" in str(n.target) or "expand_copy" in str(n.target)]
    elements = sum(math.prod(node.meta["val"].shape) for node in moved)
    chosen = TOP_K * 3 * 256 * 256
    # Scales (one for 32 weights), activations, and the scores of four heads.
    assert 0 < elements <= chosen // 32 + 8192 < chosen // 8
    assert sum("aten.linear.default" in str(node.target) for node in graph.nodes) == 2


def test_equal_nodes_are_merged_and_others_are_not() -> None:
    def function(x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        y = experts(x, ids, weights)
        whole, real = torch.full((2,), 1), torch.full((2,), 1.0)
        return y, ids * whole + (ids * whole), weights * real, weights.exp(), weights.exp()

    experts = FusedExperts(packed(FORMATS[0]))
    module, args = Function(function), routed(5, 256)
    module.experts = experts
    program = decompose(export(module, args))
    counts = {name: sum(name in str(n.target) for n in program.graph.nodes) for name in ("full", "aten.exp.default")}
    assert counts["full"] >= 2 and counts["aten.exp.default"] == 2  # an output each
    assert sum("mul" in str(node.target) and node.args[0].name == "args_1" for node in program.graph.nodes) == 1
    for got, expected in zip(program.module()(*args), module(*args), strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=2**-7, atol=2**-7)


def test_a_decomposed_program_is_decomposed_again_only_if_it_must_be() -> None:
    """ExecuTorch calls this twice for each method. Operators of nested programs, as those of a scan, count too."""
    x = torch.randn(5, 16, 8)
    program = decompose(export(Scanned(), (x,)))
    assert program.run_decompositions({}) is program
    table = {torch.ops.aten.sigmoid.default: torch.exp, torch.ops.aten.sym_size.int: torch.ops.aten.sym_size.int}
    again = program.run_decompositions(table)
    assert again is not program
    torch.testing.assert_close(again.module()(x), Scanned(torch.exp)(x))


class Scanned(nn.Module):
    """Attention, then a scan that sums what a function makes of rows."""

    def __init__(self, function: Callable[[Tensor], Tensor] = torch.sigmoid) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        def step(total: Tensor, row: Tensor) -> list[Tensor]:
            total = total + self.function(row)
            return [total, total * 1.0]

        y = attention(x, x, x)
        return scan_op(step, [torch.zeros(16, 8)], [y], ())[1]
