"""Launches that overlap with the previous one give the same bits as launches with a synchronization after each."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from executorch_moe.kernels._device import launches_before
from executorch_moe.kernels.decode import op as ops
from executorch_moe.kernels.decode.launches import (
    run_one_token_attention,
    run_one_token_router,
    run_one_token_shared_router,
)
from executorch_moe.kernels.delta_rule.launches import run_gated_delta_net, run_rows_delta_rule
from executorch_moe.kernels.experts.plan import Options, run_fused_experts
from executorch_moe.kernels.gpus import MAX_DYNAMIC_SHARED, Gpu, find_model
from executorch_moe.kernels.launch import Launch
from executorch_moe.kernels.measure.compile import compile_kernel, record_launches
from executorch_moe.kernels.measure.timing import LayerInputs, make_layers, random_packed
from executorch_moe.kernels.prefill.linear import run_prompt_linear
from executorch_moe.kernels.routed.op import TokenExpertArguments, run_one_token_experts
from executorch_moe.kernels.shapes import SHAPES, LayerShape

from .batch_launches import launches_of_rows
from .delta_rule_cases import QWEN35, make, on
from .test_rows_delta_rule import rows as make_rows
from .wait_dependence import unordered_stores

H, HEADS, KV_HEADS, HEAD_DIM, CONTEXT = 2048, 32, 4, 128, 640


def launches_of_a_layer(capability: int) -> list[Launch]:
    """Kernels of a layer for one token, for rows, and for several tokens (not all), on meta tensors."""
    gpu = Gpu(capability, 132, MAX_DYNAMIC_SHARED[capability])
    launches: list[Launch] = []
    with torch.device("meta"):
        attention, route = token_arguments(torch.empty(1, 1, H, dtype=torch.bfloat16), None)
        run_one_token_attention(attention, gpu=gpu, submit=launches.append)
        run_one_token_router(route, gpu=gpu, submit=launches.append)
        gate_up = torch.empty(1040, H, dtype=torch.int8), torch.empty(1040)
        packed = random_packed(SHAPES["qwen3"], "w4a16", "meta", torch.Generator())
        kind = packed.scheme, "silu", packed.group_size
        joined = TokenExpertArguments(*route, *packed.tensors().values(), *kind)
        run_one_token_experts(joined, gpu=gpu, submit=launches.append)
        # The shared expert's launch without a choice.
        shared_half = *gate_up, 512, torch.empty(H, 512, dtype=torch.int8), torch.empty(H)
        with_shared = TokenExpertArguments(*joined[:19], *shared_half)
        run_one_token_experts(with_shared, gpu=gpu, submit=launches.append)
        run_one_token_shared_router(ops.SharedRouteArguments(*route, *gate_up, 512), gpu=gpu, submit=launches.append)
        launches += launches_of_rows(gpu, 64, HEAD_DIM, torch.int8)
        for tokens in (1, 70):
            arguments = on(make(QWEN35, tokens, dtype=torch.bfloat16), "meta")
            run_gated_delta_net(arguments, gpu=gpu, submit=launches.append)
        prompt = torch.empty(1, 700, H, dtype=torch.bfloat16)
        run_prompt_linear(prompt, gate_up[0], gate_up[1], gpu=gpu, submit=launches.append)
        rows = make_rows(QWEN35, [3, -1, 0], torch.bfloat16)
        run_rows_delta_rule(on(rows, "meta"), gpu=gpu, submit=launches.append)
    for tokens, scheme in ((1, "w4a16"), (600, "w4a8")):
        launches += record_launches(gpu, scheme, tokens, LayerShape(16, 8, H, 512), Options())
    return launches


def token_arguments(
    row: Tensor, update: Tensor | None, seed: int = 0
) -> tuple[ops.AttentionArguments, ops.RouteArguments]:
    """Random arguments of `one_token_attention` and `one_token_router`, on the row's device."""
    device = row.device.type
    generator = torch.Generator("cpu" if device == "meta" else device).manual_seed(seed)

    def random(*shape: int, deviation: float = 1.0) -> Tensor:
        if device == "meta":
            return torch.empty(*shape, dtype=torch.bfloat16)
        return (torch.randn(*shape, device=device, generator=generator) * deviation).bfloat16()

    def codes(rows: int, columns: int) -> tuple[Tensor, Tensor]:
        weight = torch.empty(rows, columns, dtype=torch.int8, device=device)
        if device != "meta":
            weight.random_(-127, 128, generator=generator)
        return weight, torch.full((rows,), 1 / (73 * columns**0.5), device=device)

    wave = random(1, 1, HEAD_DIM // 2)
    attention = ops.AttentionArguments(
        row, update, random(H), *codes((HEADS + 2 * KV_HEADS) * HEAD_DIM, H), random(HEAD_DIM), random(HEAD_DIM),
        wave, wave, torch.full((1,), CONTEXT - 5, dtype=torch.int64, device=device),
        random(1, KV_HEADS, CONTEXT, HEAD_DIM), random(1, KV_HEADS, CONTEXT, HEAD_DIM), HEAD_DIM**-0.5, 1e-6,
    )  # fmt: skip
    weight, scale = codes(H, HEADS * HEAD_DIM)
    router = random(SHAPES["qwen3"].experts, H, deviation=H**-0.5)
    return attention, ops.RouteArguments(random(1, 1, HEADS * HEAD_DIM), weight, scale, row, random(H), router, 8, 1e-6)


@pytest.mark.compiler
@pytest.mark.parametrize("capability", [80, 90])
def test_all_kernels_wait_where_launches_can_overlap(capability: int) -> None:
    seen = set()
    for launch in launches_of_a_layer(capability):
        if launch.kernel.__name__ in seen and "gemm" not in launch.kernel.__name__:
            continue
        seen.add(launch.kernel.__name__)
        ptx = compile_kernel(launch, capability).asm["ptx"]
        waits = ptx.count("griddepcontrol.wait")
        assert waits == (1 if capability >= 90 else 0), launch.kernel.__name__
        # Nothing is written before the wait.
        assert "st.global" not in ptx.partition("griddepcontrol.wait")[0] or not waits, launch.kernel.__name__
        assert launch.options.get("launch_pdl", False) == (capability >= 90)
    assert len(seen) == 22, seen


@triton.jit
def store_a_constant(out_ptr, late_ptr, SIZE: tl.constexpr, ORDERED: tl.constexpr, PTX: tl.constexpr):
    """Only the address, with ORDERED, keeps the store after the wait: the loop that computes its value may be empty."""
    zero = launches_before(False, PTX)
    if ORDERED:
        out_ptr += zero
    offs = tl.arange(0, SIZE)
    total = tl.zeros((SIZE,), dtype=tl.float32)
    for _ in tl.range(0, tl.program_id(0)):
        total += tl.load(late_ptr + zero + offs)
    if tl.program_id(1) == 0:
        tl.store(out_ptr + offs, total)


@pytest.mark.compiler
def test_no_store_can_be_moved_before_the_wait() -> None:
    """In the IR of every kernel, each store needs something that is computed from the wait's result."""
    seen = set()
    for launch in launches_of_a_layer(90):
        key = str((launch.kernel.__name__, sorted(launch.constexprs.items())))
        if key not in seen:
            seen.add(key)
            ttir = compile_kernel(launch, 90).asm["ttir"]
            assert unordered_stores(ttir) == [], launch.kernel.__name__
    out = torch.empty(64, device="meta")
    for ordered in (True, False):
        constants = {"SIZE": 64, "ORDERED": ordered, "PTX": 90}
        launch = Launch(store_a_constant, (4, 4), {"out_ptr": out, "late_ptr": out}, constants)
        assert len(unordered_stores(compile_kernel(launch, 90).asm["ttir"])) == (0 if ordered else 1)


def token_through(layers: list[LayerInputs], row: Tensor, submit: Callable[[Launch], None]) -> Tensor:
    """Runs one token through decoder layers: each operator's result is the next one's input.

    In every second layer, the experts' kernels rank the router's logits.
    """
    update = None
    for seed, layer in enumerate(layers):
        attention, route = weights_of_layer(seed)  # cached, so that a graph does not record how they are made
        attention = attention._replace(hidden=row, update=update)
        summed, out, _ = run_one_token_attention(attention, submit=submit)
        route, packed = route._replace(x=out, residual=summed), layer.packed
        assert packed is not None
        if seed % 2:
            kind = packed.scheme, "silu", packed.group_size
            row, experts = run_one_token_experts(
                TokenExpertArguments(*route, *packed.tensors().values(), *kind), submit=submit
            )
        else:
            row, normed, weights, ids = run_one_token_router(route, submit=submit)
            experts = run_fused_experts(packed.arguments(normed, ids, weights, "silu"), submit=submit)
        update = experts[None]
    assert update is not None
    return row + update


def run_and_wait(launch: Launch) -> None:
    launch.run_now()
    torch.cuda.synchronize()


@functools.cache
def weights_of_layer(seed: int) -> tuple[ops.AttentionArguments, ops.RouteArguments]:
    return token_arguments(torch.empty(1, 1, H, dtype=torch.bfloat16, device="cuda"), None, seed)


@pytest.mark.gpu
def test_a_token_through_many_layers_is_the_same_in_a_graph() -> None:
    layers = make_layers(SHAPES["qwen3"], "w4a16", 1, 6)
    row = torch.randn(1, 1, H, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).bfloat16()
    expected = token_through(layers, row, run_and_wait)
    assert expected.isfinite().all()
    graph = torch.cuda.CUDAGraph()
    token_through(layers, row, Launch.run_now)
    with torch.cuda.graph(graph):
        found = token_through(layers, row, Launch.run_now)
    for _ in range(50):
        graph.replay()
        assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["w4a16", "w4a8", "mxfp4", "bf16"])
@pytest.mark.parametrize("tokens", [1, 5, 64, 700])
def test_layers_in_a_row_are_the_same(scheme: str, tokens: int) -> None:
    layers = make_layers(SHAPES["qwen3"], scheme, tokens, 4 if scheme != "bf16" else 2)

    def through(submit: Callable[[Launch], None]) -> Tensor:
        x = layers[0].hidden_states
        for layer in layers:
            assert layer.packed is not None
            arguments = layer.packed.arguments(x, layer.topk_ids, layer.topk_weights, "silu")
            x = run_fused_experts(arguments, submit=submit)
        return x

    expected = through(run_and_wait)
    for _ in range(100):
        assert torch.equal(through(Launch.run_now), expected)


def test_a_gpu_that_cannot_overlap_is_not_asked_to() -> None:
    launches: list[Launch] = []
    with torch.device("meta"):
        attention, _ = token_arguments(torch.empty(1, 1, H, dtype=torch.bfloat16), None)
        run_one_token_attention(attention, gpu=find_model("a100").gpu, submit=launches.append)
    assert all(launch.options == {"num_warps": launch.num_warps} for launch in launches)
