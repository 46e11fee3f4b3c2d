"""`rows_delta_rule`: each row gets what `gated_delta_net` gives its text alone, and no row touches another's slot."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from executorch_moe.kernels.delta_rule.arguments import DeltaRuleSizes, RowsDeltaRuleArguments
from executorch_moe.kernels.delta_rule.launches import run_rows_delta_rule
from executorch_moe.kernels.delta_rule.op import rows_delta_rule
from executorch_moe.kernels.delta_rule.reference import gated_delta_net_reference
from executorch_moe.kernels.gpus import MAX_DYNAMIC_SHARED, Gpu
from executorch_moe.kernels.launch import Launch
from executorch_moe.kernels.measure.compile import compile_kernel, compile_launch

from .delta_rule_cases import GATES, QWEN35, TINY, errors, make, on, relative_error
from .test_memory import same_bits_in_any_order

ONE_VALUE_HEAD_EACH = TINY._replace(key_heads=4)
FOUR_VALUE_HEADS_EACH = DeltaRuleSizes(1, 4, 32, 16, 3)
ROWS = {
    "one row": [5],
    "the start of a text": [0, 9, 0],
    "fewer positions than taps": [1, 2, 3],
    "empty rows": [-1, 7, -1, 4, 0],
    "nothing": [-1, -1],
}


def rows(
    sizes: DeltaRuleSizes, positions: list[int], dtype: torch.dtype = torch.float32, gates: str = "usual"
) -> RowsDeltaRuleArguments:
    """Row i has slot len(positions) - i. Slot 0 has no row. States that no row may read are NaN: of texts that start.

    Empty rows name the slot of another row, or slot 0.
    """
    count = len(positions)
    one = make(sizes, count, dtype=dtype, gates=gates)
    slots = list(range(count, 0, -1))
    conv, state = (torch.cat([part[None] + 0.01 * n for n in range(count + 1)]) for part in one[5:7])
    live = [slot for slot, position in zip(slots, positions, strict=True) if position >= 0]
    for index, position in enumerate(positions):
        if position == 0:
            conv[slots[index]], state[slots[index]] = torch.nan, torch.nan
        elif position < 0:
            slots[index] = live[0] if live else 0
    return RowsDeltaRuleArguments(
        *one[:5], conv.to(dtype), state, torch.tensor(positions), torch.tensor(slots), *one[8:]
    )  # fmt: skip


def reference(arguments: RowsDeltaRuleArguments) -> tuple[Tensor, Tensor, Tensor]:
    """Row by row, in the oracle for one text."""
    conv, state = arguments.conv_states.clone(), arguments.recurrent_states.clone()
    out = arguments.projected.new_zeros(arguments.projected.shape[0], state.shape[1] * state.shape[3])
    for row, (position, slot) in enumerate(zip(arguments.positions, arguments.slots, strict=True)):
        if position >= 0:
            mine, conv[slot], state[slot] = gated_delta_net_reference(
                arguments.projected[row : row + 1], *arguments[1:5], conv[slot].clone(), state[slot].clone(),
                position[None], *arguments[9:],
            )  # fmt: skip
            out[row] = mine[0]
    return out, conv, state


def check(found: tuple[Tensor, ...], arguments: RowsDeltaRuleArguments, bound: float) -> None:
    """Against the oracle; slots without a row must have their old bits, and empty rows zeros."""
    expected = reference(arguments)
    assert max(errors(found, expected)) < bound
    used = arguments.slots[arguments.positions >= 0].tolist()
    for slot in set(range(arguments.conv_states.shape[0])) - set(used):
        assert torch.equal(found[1][slot], arguments.conv_states[slot])
        assert torch.equal(found[2][slot], arguments.recurrent_states[slot])
    assert not found[0][arguments.positions < 0].any()


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("sizes", [TINY, ONE_VALUE_HEAD_EACH, FOUR_VALUE_HEADS_EACH], ids=str)
def test_the_cpu_kernel_is_the_reference(sizes: DeltaRuleSizes, name: str) -> None:
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 3e-3)):
        arguments = rows(sizes, ROWS[name], dtype)
        check(rows_delta_rule(*arguments), arguments, bound)


@pytest.mark.parametrize("gates", GATES)
def test_any_gates(gates: str) -> None:
    arguments = rows(TINY, [4, -1, 0], gates=gates)
    check(rows_delta_rule(*arguments), arguments, 1e-5)


def test_steps_of_several_texts_are_those_of_each_alone() -> None:
    """Texts of several lengths join and leave; slot 1 is used by a second text."""
    steps = [[0, -1, -1], [1, 0, -1], [2, 1, 0], [-1, 2, 1], [0, 3, 2], [1, -1, 3]]
    given = rows(TINY, [3, 3, 3])
    states = given.conv_states, given.recurrent_states
    found: dict[int, list[Tensor]] = {0: [], 1: [], 2: []}
    inputs: dict[int, list[Tensor]] = {0: [], 1: [], 2: []}
    for number, positions in enumerate(steps):
        projected = make(TINY, 3, seed=number).projected
        out, *states = rows_delta_rule(*given._replace(  # type: ignore[assignment]
            projected=projected, positions=torch.tensor(positions), conv_states=states[0], recurrent_states=states[1]
        ))  # fmt: skip
        for row, position in enumerate(positions):
            if position >= 0:
                found[row].append(out[row])
                inputs[row].append(projected[row])
    for row, cuts in ((0, (0, 3, 5)), (1, (0, 4)), (2, (0, 4))):
        for first, end in itertools.pairwise(cuts):
            one = make(TINY, end - first, position=0)._replace(projected=torch.stack(inputs[row][first:end]))
            expected, *_ = gated_delta_net_reference(*one._replace(**{
                name: getattr(given, name) for name in ("conv_weight", "dt_bias", "a_log", "norm_weight")
            }))  # fmt: skip
            assert relative_error(torch.stack(found[row][first:end]), expected) < 1e-5


def test_an_operator_as_torch_wants_it() -> None:
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    arguments = tuple(rows(TINY, [3, -1, 1]))
    torch.library.opcheck(torch.ops.executorch_moe.rows_delta_rule, arguments, test_utils=checks)


def test_no_gradient() -> None:
    arguments = rows(TINY, [2])
    arguments.projected.requires_grad_()
    with pytest.raises(NotImplementedError, match="rows_delta_rule is for inference only"):
        rows_delta_rule(*arguments)[0].sum().backward()


CHECKS: list[tuple[str, Callable[[Any], Any], str]] = [
    ("projected", lambda t: t[:, None], r"projected has shape \[2, 1, 328\], expected \[T, columns\] with T from 1 to"),
    ("projected", lambda t: t.repeat(33, 1), r"projected has shape \[66, 328\]"),
    ("projected", lambda t: t[:, :-1], r"expected \[T, 328\]"),
    ("conv_states", lambda t: t[0], r"conv_states has shape \[4, 192\], expected the state of each of S slots"),
    ("recurrent_states", lambda t: t[0], r"recurrent_states has shape \[4, 16, 32\], expected the state of each"),
    ("recurrent_states", lambda t: t[1:], "conv_states has 3 slots and recurrent_states has 2"),
    ("recurrent_states", lambda t: t.mT.contiguous().mT, "recurrent_states must be contiguous"),
    ("recurrent_states", lambda t: t.bfloat16(), "recurrent_state has dtype bfloat16, expected float32"),
    ("positions", lambda t: t.int(), "positions has dtype int32, expected int64"),
    ("slots", lambda t: t[1:], r"slots has shape \[1\], expected \[2\]: pass one number for each row"),
    ("slots", lambda t: t.to("meta"), "slots is on meta but projected is on cpu"),
    ("num_key_heads", lambda _: 3, "num_key_heads=3 must divide the 4 value heads"),
]


@pytest.mark.parametrize(("name", "change", "message"), CHECKS)
def test_operator_and_fake_refuse_the_same(name: str, change: Callable[[Any], Any], message: str) -> None:
    arguments = rows(TINY, [3, 5])
    wrong = arguments._replace(**{name: change(getattr(arguments, name))})
    with pytest.raises(ValueError, match=message):
        rows_delta_rule(*wrong)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = RowsDeltaRuleArguments(*(mode.from_tensor(t) if isinstance(t, Tensor) else t for t in wrong))
        with pytest.raises(ValueError, match=message):
            rows_delta_rule(*fake)


def test_slots_that_two_rows_share_are_refused_on_the_cpu() -> None:
    arguments = rows(TINY, [3, 5])
    for slots, message in (
        ([1, 1], r"slots \[1, 1\] has one of two rows"),
        ([0, 3], "numbers from 0 to 3, expected 0"),
    ):
        with pytest.raises(ValueError, match=message):
            rows_delta_rule(*arguments._replace(slots=torch.tensor(slots)))


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("sizes", [TINY, ONE_VALUE_HEAD_EACH, FOUR_VALUE_HEADS_EACH], ids=str)
def test_interpreted(sizes: DeltaRuleSizes, name: str) -> None:
    assert os.environ.get("TRITON_INTERPRET") == "1"
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 3e-3)):
        arguments = rows(sizes, ROWS[name], dtype)
        check(run_rows_delta_rule(arguments), arguments, bound)


@pytest.mark.interpreter
@pytest.mark.parametrize("gates", GATES)
def test_interpreted_with_any_gates(gates: str) -> None:
    arguments = rows(TINY, [4, -1, 0], gates=gates)
    check(run_rows_delta_rule(arguments), arguments, 1e-6)


@pytest.mark.interpreter
def test_rows_in_any_order_give_the_same_bits() -> None:
    arguments = rows(TINY, ROWS["empty rows"])
    same_bits_in_any_order(lambda: run_rows_delta_rule(arguments))


def launch_for(sizes: DeltaRuleSizes, dtype: torch.dtype, gpu: Gpu) -> Launch:
    launches: list[Launch] = []
    run_rows_delta_rule(on(rows(sizes, [3, -1, 0, 8], dtype), "meta"), gpu=gpu, submit=launches.append)
    (launch,) = launches
    assert launch.grid == (sizes.value_heads, 4)
    return launch


@pytest.mark.compiler
@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_qwen35_compiles_without_spills(capability: int) -> None:
    gpu = Gpu(capability, 132, MAX_DYNAMIC_SHARED[capability])
    report = compile_launch(launch_for(QWEN35, torch.bfloat16, gpu), capability)
    assert report.spill_bytes == 0 and report.shared <= gpu.max_shared, report


@pytest.mark.compiler
def test_a_row_reads_its_state_once_and_before_the_wait() -> None:
    """As for one text, in loads and stores of 16 bytes that empty rows skip."""
    launch = launch_for(QWEN35, torch.bfloat16, Gpu(90, 132, MAX_DYNAMIC_SHARED[90]))
    before, _, after = compile_kernel(launch, 90).asm["ptx"].partition("griddepcontrol.wait")
    loads = 128 * 128 * 4 // (16 * 32 * launch.num_warps)
    skipped = re.compile(r"@%p\d+ (ld|st)\.global\.v4\.b32")
    assert skipped.findall(before) == ["ld"] * loads and skipped.findall(after) == ["st"] * loads
    assert before.count("st.global") == 0 and "ld.global.v4.b32" not in after


@pytest.mark.gpu
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("sizes", [TINY, FOUR_VALUE_HEADS_EACH, QWEN35], ids=str)
def test_results_and_bits_on_a_gpu(sizes: DeltaRuleSizes, name: str) -> None:
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 1.5e-2)):
        arguments = on(rows(sizes, ROWS[name], dtype), "cuda")
        found = rows_delta_rule(*arguments)
        check(found, arguments, bound)
        assert all(torch.equal(one, other) for one, other in zip(rows_delta_rule(*arguments), found, strict=True))


@pytest.mark.gpu
def test_an_operator_as_torch_wants_it_on_a_gpu() -> None:
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    arguments = tuple(on(rows(TINY, [3, -1, 1]), "cuda"))
    torch.library.opcheck(torch.ops.executorch_moe.rows_delta_rule, arguments, test_utils=checks)


@pytest.mark.gpu
def test_launches_that_overlap_give_the_same_bits() -> None:
    """Several layers, each with the result of the one before as part of its input."""
    layers = [on(rows(QWEN35, [5, -1, 0, 9], torch.bfloat16), "cuda") for _ in range(4)]

    def through(wait: bool) -> Tensor:
        def submit(launch: Launch) -> None:
            launch.run_now()
            if wait:
                torch.cuda.synchronize()

        carried = torch.zeros(4, QWEN35.values, dtype=torch.bfloat16, device="cuda")
        for layer in layers:
            projected = layer.projected.clone()
            projected[:, : QWEN35.values] += carried
            carried, *_ = run_rows_delta_rule(layer._replace(projected=projected), submit=submit)
        return carried

    expected = through(True)
    for _ in range(50):
        assert torch.equal(through(False), expected)
