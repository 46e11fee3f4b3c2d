"""CUDA graphs of delegates: capture and replay with a fake graph that follows the rules of a real one, and on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from emulated_cuda import WIDTH, open_cpu_container, stateful_programs
from torch import Tensor

from executorch_moe.backends.artifact.files import Artifact, open_artifact
from executorch_moe.backends.runtime.cuda_graph import (
    WARM_UP_CALLS,
    GraphedDelegate,
    check_graph_methods,
    graph_methods,
)
from executorch_moe.backends.runtime.delegate_host import DelegateHost

CPU = torch.device("cpu")


class RecordedGraph:
    """Follows the rules of a CUDA graph on the CPU: a capture changes no memory, a replay writes to fixed addresses."""

    def __init__(self, call: Callable[[], list[Tensor]], state: Callable[[], list[Tensor]]) -> None:
        self.call, self.replays = call, 0
        before = [tensor.clone() for tensor in state()]
        self.outputs = [torch.full_like(output, -7) for output in call()]
        for tensor, old in zip(state(), before, strict=True):
            tensor.copy_(old)

    def replay(self) -> None:
        self.replays += 1
        for output, new in zip(self.outputs, self.call(), strict=True):
            output.copy_(new)


class Recorder:
    """The `capture` function of these tests; records its graphs."""

    def __init__(self) -> None:
        self.graphs: list[RecordedGraph] = []
        self.state: Callable[[], list[Tensor]] = list

    def __call__(self, call: Callable[[], list[Tensor]]) -> tuple[RecordedGraph, list[Tensor]]:
        self.graphs.append(RecordedGraph(call, self.state))
        return self.graphs[-1], self.graphs[-1].outputs


def test_three_calls_then_a_capture_then_replays() -> None:
    total = torch.zeros(1)
    seen: list[int] = []

    def run(inputs: list[Tensor]) -> list[Tensor]:
        seen.append(inputs[0].data_ptr())
        total.add_(inputs[0])
        inputs.clear()  # the runtime takes ownership of the tensors
        return [total * 10]

    recorder = Recorder()
    recorder.state = lambda: [total]
    delegate = GraphedDelegate("decode", run, recorder)
    outputs = []
    for number in range(1, 8):
        outputs.append(delegate([torch.tensor([float(number)])])[0])
        assert delegate.captured == (number > WARM_UP_CALLS)
    # Each call ran exactly once, including that of the capture, and later calls overwrote no output.
    assert [float(output) for output in outputs] == [10.0, 30.0, 60.0, 100.0, 150.0, 210.0, 280.0]
    assert len(recorder.graphs) == 1 and recorder.graphs[0].replays == 4
    assert len(set(seen[WARM_UP_CALLS:])) == 1  # one fixed input since the capture


def test_the_callers_tensors_are_not_needed_later() -> None:
    delegate = GraphedDelegate("decode", lambda inputs: [inputs[0] + 1], Recorder(), warm_up_calls=0)
    given = torch.tensor([1.0])
    (first,) = delegate([given])
    given.fill_(99.0)
    assert float(delegate([torch.tensor([5.0])])[0]) == 6.0
    assert float(first) == 2.0


@pytest.mark.parametrize("other", [torch.zeros(2), torch.zeros(1, dtype=torch.int64)])
def test_other_inputs_than_captured_are_refused(other: Tensor) -> None:
    delegate = GraphedDelegate("decode", lambda inputs: [inputs[0] + 1], Recorder(), warm_up_calls=0)
    delegate([torch.zeros(1)])
    with pytest.raises(ValueError, match="method decode was captured as a CUDA graph for inputs"):
        delegate([other])


def test_state_of_a_program_is_right_through_capture_replay_and_reset(emulated: Artifact) -> None:
    """A real AOTInductor delegate that changes a cache and a counter in place, beside a method without a graph."""
    program, data = open_artifact(emulated.pte)
    recorder = Recorder()
    host = DelegateHost(
        program, data, CPU, open_container=open_cpu_container, wrap_delegate=graph_methods({"decode"}, recorder)
    )
    recorder.state = lambda: [host.storage(f"cuda_fqn_weight:cpu:{key}") for key in ("cache", "count")]
    for text in range(2):
        module, _ = stateful_programs()
        x, position = torch.randn(6, WIDTH), torch.arange(6)
        torch.testing.assert_close(host.run("prefill", (x[:2], position[:2]))[0], module(x[:2], position[:2]))
        for at in range(2, 6):
            inputs = x[at : at + 1], position[at : at + 1]
            got, expected = host.run("decode", inputs)[0], module(*inputs)
            torch.testing.assert_close(got, expected)
        torch.testing.assert_close(host.run("peek", (torch.ones(WIDTH),))[0], module.cache.sum(0))
        assert len(recorder.graphs) == 1, f"text {text}"
        host.reset()
    assert recorder.graphs[0].replays == 5


def test_methods_that_cannot_be_captured(emulated: Artifact) -> None:
    program, _ = open_artifact(emulated.pte)
    check_graph_methods(program, ("decode",))
    with pytest.raises(ValueError, match=r"method 'prefill' cannot be a CUDA graph: its input 0, .*changes its size"):
        check_graph_methods(program, ("prefill",))
    with pytest.raises(
        ValueError, match=r"no method 'encode' .* to make a CUDA graph of: it has decode, peek, prefill"
    ):
        check_graph_methods(program, ("encode",))


@pytest.mark.gpu
def test_a_graph_on_the_gpu_equals_ordinary_calls() -> None:
    cache = torch.zeros(64, 32, device="cuda")
    weight = torch.randn(32, 32, device="cuda")

    def run(inputs: list[Tensor]) -> list[Tensor]:
        x, position = inputs
        cache[position] = x @ weight
        return [cache.sum(0)]

    delegate = GraphedDelegate("decode", run)
    got, calls = [], [torch.randn(1, 32, device="cuda") for _ in range(12)]
    for at, x in enumerate(calls):
        got.append(delegate([x, torch.tensor([at], device="cuda")])[0])
    assert delegate.captured
    cache.zero_()
    for at, x in enumerate(calls):
        assert torch.equal(run([x, torch.tensor([at], device="cuda")])[0], got[at])
