"""The choice of the runtime for a program, its messages, and errors for bad input."""

from __future__ import annotations

import sys

import pytest
import torch
from tiny_artifacts import CONSTANTS

from executorch_moe.backends.artifact.files import Artifact
from executorch_moe.backends.runtime import loader as runtime
from executorch_moe.backends.runtime import pybindings
from executorch_moe.backends.runtime.loader import EXECUTORCH_CPU, load
from executorch_moe.backends.runtime.pybindings import why_not_pybindings


@pytest.fixture
def fresh_check():
    """`why_not_pybindings` caches its result."""
    why_not_pybindings.cache_clear()
    yield
    why_not_pybindings.cache_clear()


def test_cpu_program_in_executorch(linear: Artifact, executorch_runtime: None) -> None:
    loaded = load(linear.pte)
    assert (loaded.runtime, loaded.device) == (EXECUTORCH_CPU, torch.device("cpu"))
    assert loaded.method_names == ["forward"]
    assert {name: loaded.constant(name) for name in loaded.constant_names} == CONSTANTS
    assert load(linear.pte, linear.ptd, "executorch").runtime == EXECUTORCH_CPU


def test_an_explicit_choice_that_cannot_be(linear: Artifact) -> None:
    with pytest.raises(ValueError, match=r"no CudaBackend delegate.*use runtime 'executorch'"):
        load(linear.pte, runtime="delegate-host")
    with pytest.raises(ValueError, match=r"runtime 'gpu' is unknown: choose one of auto, executorch, delegate-host"):
        load(linear.pte, runtime="gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")
def test_cuda_program_without_a_gpu(emulated: Artifact) -> None:
    with pytest.raises(RuntimeError) as error:
        load(emulated.pte)
    for part in ("ExecuTorch's runtime: ", "the delegate host: ", "export with target 'cpu'"):
        assert part in str(error.value)
    with pytest.raises(RuntimeError, match="the delegate host: ") as error:
        load(emulated.pte, runtime="delegate-host")
    assert "ExecuTorch's runtime" not in str(error.value)
    with pytest.raises(RuntimeError, match="ExecuTorch's runtime: ") as error:
        load(emulated.pte, runtime="executorch")
    assert "the delegate host" not in str(error.value)


def test_registered_cuda_backend_comes_first(emulated: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = object()
    monkeypatch.setattr(runtime, "why_not_pybindings", lambda: "")
    monkeypatch.setattr(runtime, "_bindings", lambda: _FakeBindings())
    monkeypatch.setattr(runtime, "why_not_delegate_host", lambda: "")
    monkeypatch.setattr(runtime, "ExecutorchEngine", lambda program, ptd, methods: engine)
    loaded = load(emulated.pte)
    assert loaded.runtime == runtime.EXECUTORCH_CUDA
    assert loaded._engine is engine


class _FakeBindings:
    @staticmethod
    def _get_registered_backend_names() -> list[str]:
        return ["CudaBackend", "XnnpackBackend"]


def test_bindings_match_the_torch_they_are_built_for(fresh_check: None) -> None:
    expected = torch.__version__.startswith("2.13.")
    assert (why_not_pybindings() == "") is expected


def test_bindings_are_not_touched_beside_another_torch(
    linear: Artifact, monkeypatch: pytest.MonkeyPatch, fresh_check: None
) -> None:
    monkeypatch.setattr(pybindings.torch, "__version__", "2.11.0+cu130")
    for name in [
        name for name in sys.modules if name.startswith(("executorch.extension.pybindings", "executorch.runtime"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(
        RuntimeError, match=r"built for torch 2\.13, not for the installed torch 2\.11\.0\+cu130"
    ) as error:
        load(linear.pte)
    assert "wrong layout" in str(error.value)
    assert not any(name.startswith("executorch.extension.pybindings.") for name in sys.modules)


def test_bindings_of_an_unknown_release_are_judged_by_their_symbols(
    monkeypatch: pytest.MonkeyPatch, fresh_check: None
) -> None:
    monkeypatch.setattr(pybindings, "_BUILT_FOR", {})
    monkeypatch.setattr(pybindings, "_TORCH_LIBRARIES", ("libc10.so",))  # as if torch had no other libraries
    assert "symbols that torch" in why_not_pybindings()


@pytest.mark.parametrize(
    ("method", "args", "message"),
    [
        ("nothing", (), r"no method 'nothing' in .*model\.pte: it has forward"),
        ("get_eos_ids", (), r"no method 'get_eos_ids'"),
        ("forward", (), r"forward got 0 inputs, expected 1: float32 \[2, 4\]"),
        (
            "forward",
            (torch.zeros(2, 4, dtype=torch.float64),),
            r"input 0 of forward has dtype torch.float64, expected torch.float32",
        ),
        ("forward", (torch.zeros(3, 4),), r"input 0 of forward has shape \[3, 4\], expected float32 \[2, 4\]"),
        ("forward", (torch.zeros(4),), r"input 0 of forward has shape \[4\], expected float32 \[2, 4\]"),
        ("forward", ([[0.0]],), r"input 0 of forward is a list, expected a tensor float32 \[2, 4\]"),
    ],
)
def test_bad_inputs(linear: Artifact, method: str, args: tuple, message: str, executorch_runtime: None) -> None:
    with pytest.raises(ValueError, match=message):
        load(linear.pte).run(method, *args)


def test_constants_that_are_not_there(linear: Artifact, executorch_runtime: None) -> None:
    loaded = load(linear.pte)
    with pytest.raises(ValueError, match=r"no method 'get_bos_id'"):
        loaded.constant("get_bos_id")
    with pytest.raises(ValueError, match=r"'forward' in .* is not a constant method: use run"):
        loaded.constant("forward")


def test_non_contiguous_input(linear: Artifact, executorch_runtime: None) -> None:
    x = torch.randn(4, 2).t()
    loaded = load(linear.pte)
    assert torch.equal(loaded.run("forward", x)[0], loaded.run("forward", x.contiguous())[0])
