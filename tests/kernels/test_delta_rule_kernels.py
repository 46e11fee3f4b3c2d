"""The Triton kernels of `gated_delta_net`: against the reference in the interpreter and on a GPU, and as compiled."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from executorch_moe.kernels.delta_rule.arguments import DeltaRuleArguments, DeltaRuleSizes
from executorch_moe.kernels.delta_rule.launches import run_gated_delta_net
from executorch_moe.kernels.delta_rule.op import gated_delta_net
from executorch_moe.kernels.delta_rule.reference import gated_delta_net_reference
from executorch_moe.kernels.gpus import MAX_DYNAMIC_SHARED, Gpu
from executorch_moe.kernels.launch import Launch
from executorch_moe.kernels.measure.compile import compile_kernel, compile_launch, cuobjdump

from .delta_rule_cases import GATES, LENGTHS, QWEN35, TINY, errors, make, on
from .wgmma_registers import hazards, parse

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 3e-3}
"""Largest relative error of results and states. The operands of tensor cores have three decimals in bf16."""
ONE_VALUE_HEAD_EACH = TINY._replace(key_heads=4)
FOUR_VALUE_HEADS_EACH = DeltaRuleSizes(1, 4, 32, 16, 3)
HEADS_OF_32 = DeltaRuleSizes(2, 4, 32, 32, 4)
HEADS_OF_64 = DeltaRuleSizes(2, 4, 64, 64, 4)  # the smallest whose buffers are bf16


def alike(arguments: DeltaRuleArguments) -> DeltaRuleArguments:
    """All tokens the same, hardly any decay, beta near 1: the inverse of a chunk's triangle needs exact sums."""
    projected = arguments.projected[:1].repeat(arguments.projected.shape[0], 1)
    heads = arguments.dt_bias.shape[0]
    projected[:, -2 * heads : -heads], projected[:, -heads:] = 8.0, -12.0
    return arguments._replace(projected=projected)


@pytest.mark.interpreter
@pytest.mark.parametrize("position", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("sizes", [TINY, ONE_VALUE_HEAD_EACH, FOUR_VALUE_HEADS_EACH], ids=str)
def test_interpreted_token(sizes: DeltaRuleSizes, position: int) -> None:
    assert os.environ.get("TRITON_INTERPRET") == "1"
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 3e-3)):
        arguments = make(sizes, 1, position=position, dtype=dtype)
        assert max(errors(run_gated_delta_net(arguments), gated_delta_net_reference(*arguments))) < bound


@pytest.mark.interpreter
@pytest.mark.parametrize("gates", GATES)
def test_interpreted_token_with_any_gates(gates: str) -> None:
    arguments = make(TINY, 1, gates=gates)
    assert max(errors(run_gated_delta_net(arguments), gated_delta_net_reference(*arguments))) < 1e-6


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("sizes", "tokens", "position", "dtype"),
    [
        (TINY, 2, 0, torch.float32),
        (TINY, 2, 1, torch.bfloat16),  # a ring with rows of positions below 0
        (ONE_VALUE_HEAD_EACH, 63, 5, torch.float32),
        (FOUR_VALUE_HEADS_EACH, 64, 5, torch.bfloat16),
        (TINY, 65, 0, torch.float32),
        (FOUR_VALUE_HEADS_EACH, 130, 3, torch.float32),
        (TINY, 130, 0, torch.bfloat16),
    ],
    ids=str,
)
def test_interpreted_prompt(sizes: DeltaRuleSizes, tokens: int, position: int, dtype: torch.dtype) -> None:
    arguments = make(sizes, tokens, position=position, dtype=dtype)
    assert max(errors(run_gated_delta_net(arguments), gated_delta_net_reference(*arguments))) < BOUNDS[dtype]


@pytest.mark.interpreter
@pytest.mark.parametrize("gates", GATES)
def test_interpreted_prompt_with_any_gates(gates: str) -> None:
    arguments = make(TINY, 66, gates=gates)
    assert max(errors(run_gated_delta_net(arguments), gated_delta_net_reference(*arguments))) < 1e-5


@pytest.mark.interpreter
def test_interpreted_tokens_that_are_alike() -> None:
    arguments = alike(make(TINY, 65))
    assert max(errors(run_gated_delta_net(arguments), gated_delta_net_reference(*arguments))) < 1e-5


def in_pieces(arguments: DeltaRuleArguments, pieces: tuple[int, ...]) -> tuple[Tensor, ...]:
    """A text from its start, each piece with the states that the one before returned."""
    rows, states, first = [], (arguments.conv_state, arguments.recurrent_state), 0
    for piece in pieces:
        part = arguments._replace(
            projected=arguments.projected[first : first + piece],
            conv_state=states[0],
            recurrent_state=states[1],
            position=torch.full_like(arguments.position, first),
        )
        out, *states = run_gated_delta_net(part)
        rows.append(out)
        first += piece
    return torch.cat(rows), *states


@pytest.mark.interpreter
def test_interpreted_pieces_are_the_text_in_one() -> None:
    arguments = make(TINY, 77, position=0)
    expected = gated_delta_net_reference(*arguments)
    assert max(errors(in_pieces(arguments, (1, 2, 1, 66, 1, 6)), expected)) < 1e-5


def launches_for(sizes: DeltaRuleSizes, tokens: int, dtype: torch.dtype, gpu: Gpu) -> list[Launch]:
    """The launches of the operator, on meta tensors."""
    launches: list[Launch] = []
    run_gated_delta_net(on(make(sizes, tokens, dtype=dtype), "meta"), gpu=gpu, submit=launches.append)
    return launches


@pytest.mark.compiler
@pytest.mark.parametrize("capability", [80, 90, 120])
def test_qwen35_compiles_without_spills(capability: int) -> None:
    gpu = Gpu(capability, 132, MAX_DYNAMIC_SHARED[capability])
    for tokens, count in ((1, 1), (1642, 4)):
        launches = launches_for(QWEN35, tokens, torch.bfloat16, gpu)
        assert len(launches) == count
        for launch in launches:
            report = compile_launch(launch, capability)
            assert report.spill_bytes == 0 and report.shared <= gpu.max_shared, report


@pytest.mark.compiler
@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        (QWEN35, torch.float32),
        (TINY, torch.bfloat16),
        (HEADS_OF_64, torch.bfloat16),
        (FOUR_VALUE_HEADS_EACH, torch.float16),
    ],
    ids=str,
)
def test_other_sizes_and_dtypes_compile(sizes: DeltaRuleSizes, dtype: torch.dtype) -> None:
    """For the architecture with the least shared memory."""
    gpu = Gpu(86, 84, MAX_DYNAMIC_SHARED[86])
    for tokens in (1, 70):
        for launch in launches_for(sizes, tokens, dtype, gpu):
            report = compile_launch(launch, 86)
            assert report.shared <= gpu.max_shared, report


@pytest.mark.compiler
def test_a_token_reads_its_state_once_and_before_the_wait() -> None:
    """16 bytes for each load: 64 KB for the 256 threads of a program are 16 loads of a thread."""
    (launch,) = launches_for(QWEN35, 1, torch.bfloat16, Gpu(90, 132, MAX_DYNAMIC_SHARED[90]))
    before, _, after = compile_kernel(launch, 90).asm["ptx"].partition("griddepcontrol.wait")
    loads = 128 * 128 * 4 // (16 * 32 * launch.num_warps)
    assert before.count("ld.global.v4.b32") == loads and after.count("ld.global.v4.b32") == 0
    assert before.count("st.global") == 0 and after.count("st.global.v4.b32") == loads


@pytest.mark.compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_operand_is_written_over_while_it_is_read(dtype: torch.dtype) -> None:
    """As in test_compile.py: a wgmma may read its registers until a wait."""
    found = 0
    for launch in launches_for(QWEN35, 1642, dtype, Gpu(90, 132, MAX_DYNAMIC_SHARED[90])):
        code = parse(cuobjdump(compile_kernel(launch, 90).asm["cubin"], "-sass"))
        found += any(instruction.is_wgmma for instruction in code)
        assert not list(hazards(code)), launch.kernel.__name__
    assert found == 2  # the state and the output


GPU_CASES = [
    (sizes, tokens, dtype)
    for sizes in (TINY, ONE_VALUE_HEAD_EACH, FOUR_VALUE_HEADS_EACH, HEADS_OF_32, HEADS_OF_64, QWEN35)
    for tokens in (*LENGTHS, 1000)
    for dtype in ((torch.bfloat16, torch.float32) if tokens in (1, 65, 1000) else (torch.bfloat16,))
]


@pytest.mark.gpu
@pytest.mark.parametrize("position", [0, 6])
@pytest.mark.parametrize(("sizes", "tokens", "dtype"), GPU_CASES, ids=str)
def test_results_and_bits_on_a_gpu(sizes: DeltaRuleSizes, tokens: int, dtype: torch.dtype, position: int) -> None:
    arguments = on(make(sizes, tokens, position=position, dtype=dtype), "cuda")
    found = gated_delta_net(*arguments)
    bound = BOUNDS[dtype] if dtype != torch.float32 else 1e-4
    assert max(errors(found, gated_delta_net_reference(*arguments))) < bound
    for _ in range(3):
        again = gated_delta_net(*arguments)
        assert all(torch.equal(one, other) for one, other in zip(again, found, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 130])
@pytest.mark.parametrize("gates", GATES)
def test_any_gates_on_a_gpu(gates: str, tokens: int) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        arguments = on(make(QWEN35, tokens, gates=gates, dtype=dtype), "cuda")
        bound = BOUNDS[dtype] if dtype != torch.float32 else 1e-4
        assert max(errors(gated_delta_net(*arguments), gated_delta_net_reference(*arguments))) < bound


@pytest.mark.gpu
def test_tokens_that_are_alike_on_a_gpu() -> None:
    arguments = on(alike(make(QWEN35, 200)), "cuda")
    assert max(errors(gated_delta_net(*arguments), gated_delta_net_reference(*arguments))) < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("pieces", [(1,) * 100, (7,) * 14 + (2,), (64, 36), (99, 1)], ids=len)
def test_pieces_are_the_text_in_one_on_a_gpu(pieces: tuple[int, ...]) -> None:
    arguments = on(make(QWEN35, 100, position=0), "cuda")
    assert max(errors(in_pieces(arguments, pieces), gated_delta_net_reference(*arguments))) < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 70])
def test_an_operator_as_torch_wants_it_on_a_gpu(tokens: int) -> None:
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    arguments = tuple(on(make(TINY, tokens), "cuda"))
    torch.library.opcheck(torch.ops.executorch_moe.gated_delta_net, arguments, test_utils=checks)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 300])
def test_launches_that_overlap_give_the_same_bits(tokens: int) -> None:
    """Several layers, each with the result of the one before as part of its input."""
    layers = [on(make(QWEN35, tokens, seed=seed, dtype=torch.bfloat16), "cuda") for seed in range(4)]

    def through(wait: bool) -> Tensor:
        def submit(launch: Launch) -> None:
            launch.run_now()
            if wait:
                torch.cuda.synchronize()

        carried = torch.zeros(tokens, QWEN35.values, dtype=torch.bfloat16, device="cuda")
        for layer in layers:
            projected = layer.projected.clone()
            projected[:, : QWEN35.values] += carried
            carried, *_ = run_gated_delta_net(layer._replace(projected=projected), submit=submit)
        return carried

    expected = through(True)
    for _ in range(50):
        assert torch.equal(through(False), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 65])
def test_states_may_be_updated_in_place(tokens: int) -> None:
    """As AOTInductor does it: the kernels get the buffers as the old and as the new states."""
    arguments = on(make(QWEN35, tokens, dtype=torch.bfloat16), "cuda")
    expected = gated_delta_net(*arguments)
    outs = []

    def submit(launch: Launch) -> None:
        states = {"conv_ptr": arguments.conv_state, "new_conv_ptr": arguments.conv_state}
        states |= {"state_ptr": arguments.recurrent_state, "new_state_ptr": arguments.recurrent_state}
        used = {name: tensor for name, tensor in states.items() if name in launch.args}
        replace(launch, args={**launch.args, **used}).run_now()
        outs.append(launch.args.get("out_ptr"))

    run_gated_delta_net(arguments, submit=submit)
    found = outs[-1], arguments.conv_state, arguments.recurrent_state
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
