"""CUDA graphs for delegates: one launch instead of the hundreds of a decode step.

The behavior is that of ExecuTorch's runtime with its backend option `enable_cuda_graph_for_method`: three ordinary
calls, a capture in the fourth, replays after that. Each call runs exactly once, so mutated buffers (the KV cache) get
the same values as without graphs. Capturing itself runs nothing; the fourth call runs in the replay that follows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import torch
from torch import Tensor

from executorch_moe.backends.artifact.method_targets import split_method
from executorch_moe.backends.artifact.pte import PteFile

from .delegate_host import RunDelegate

WARM_UP_CALLS = 3


class Graph(Protocol):
    """A captured call: `replay` runs it again on the same tensors."""

    def replay(self) -> None: ...


Capture = Callable[[Callable[[], list[Tensor]]], tuple[Graph, list[Tensor]]]


def capture_cuda_graph(call: Callable[[], list[Tensor]]) -> tuple[Graph, list[Tensor]]:
    """Capture `call` on a side stream of the current device; returns the graph and its output tensors."""
    graph = torch.cuda.CUDAGraph()
    # Before each call AOTInductor queries whether its last call is done (cudaEventQuery). It is done, because entering
    # the context synchronizes, but the strict capture modes forbid the query. Earlier calls have loaded the kernels.
    with torch.cuda.graph(graph, capture_error_mode="relaxed"):
        outputs = call()
    return graph, outputs


class GraphedDelegate:
    """A delegate that is captured after `warm_up_calls` ordinary calls.

    Args:
        method: name for messages.
        run: the delegate; all calls must have inputs of the same shapes.
        capture: captures a call; tests pass their own.
        warm_up_calls: calls before the capture, which load kernels and allocate memory.
    """

    def __init__(
        self, method: str, run: RunDelegate, capture: Capture = capture_cuda_graph, warm_up_calls: int = WARM_UP_CALLS
    ) -> None:
        self._method, self._run, self._capture = method, run, capture
        self._left = warm_up_calls
        self._graph: Graph | None = None
        self._inputs: list[Tensor] = []
        self._outputs: list[Tensor] = []

    @property
    def captured(self) -> bool:
        """True once calls are replays."""
        return self._graph is not None

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Run the delegate once.

        Raises:
            ValueError: the inputs have other shapes or dtypes than the captured ones.
        """
        if self._graph is None and self._left > 0:
            self._left -= 1
            return self._run(list(inputs))
        if self._graph is None:
            # Copies, because the caller may free its tensors before a replay. Outputs are copied below as well.
            self._inputs = [tensor.clone() for tensor in inputs]
            # The runtime takes ownership of the tensors in the list, and may remove them from it.
            self._graph, self._outputs = self._capture(lambda: self._run(list(self._inputs)))
        else:
            self._check(inputs)
            for static, given in zip(self._inputs, inputs, strict=True):
                static.copy_(given)
        self._graph.replay()
        return [output.clone() for output in self._outputs]

    def _check(self, inputs: Sequence[Tensor]) -> None:
        expected = [(tuple(t.shape), t.dtype) for t in self._inputs]
        given = [(tuple(t.shape), t.dtype) for t in inputs]
        if given != expected:
            raise ValueError(
                f"method {self._method} was captured as a CUDA graph for inputs {expected} and is called with {given}: "
                "call it with one set of shapes, or without CUDA graph"
            )


def graph_methods(
    methods: Collection[str], capture: Capture = capture_cuda_graph
) -> Callable[[str, RunDelegate], RunDelegate]:
    """A `wrap_delegate` for `DelegateHost`: delegates of these methods become graphs, others are not changed."""

    def wrap(method: str, run: RunDelegate) -> RunDelegate:
        return GraphedDelegate(method, run, capture) if method in methods else run

    return wrap


def check_graph_methods(program: PteFile, methods: Collection[str]) -> None:
    """Check that methods can be captured.

    Raises:
        ValueError: the program lacks a method, or a method has inputs of dynamic sizes.
    """
    for method in methods:
        named = [name for name in program.method_names if split_method(name)[0] == method]
        if not named:
            raise ValueError(
                f"no method {method!r} in {program.path} to make a CUDA graph of: it has "
                f"{', '.join(program.method_names)}"
            )
        for index, tensor in enumerate(program.inputs(named[0])):
            if tensor.dynamic:
                raise ValueError(
                    f"method {method!r} cannot be a CUDA graph: its input {index}, {tensor}, changes its size"
                )
