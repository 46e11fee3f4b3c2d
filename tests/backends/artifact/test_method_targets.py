"""Artifacts for several architectures: the choice of the methods for a GPU, and the messages if there are none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from executorch_moe.backends.artifact import method_targets
from executorch_moe.backends.artifact.files import Artifact
from executorch_moe.backends.artifact.method_targets import method_for, pick_methods, split_method
from executorch_moe.backends.runtime import loader as runtime
from executorch_moe.kernels.gpus import find_model

BOTH = ["decode@sm_80", "decode@sm_86", "decode@sm_90", "prefill@sm_80", "prefill@sm_90"]


def test_names() -> None:
    assert method_for("decode", find_model("rtx4090")) == "decode@sm_89"
    assert split_method("decode@sm_89") == ("decode", 89)
    assert split_method("mail@home") == ("mail@home", None)


@pytest.mark.parametrize(
    ("capability", "decode", "prefill"),
    [((8, 0), 80, 80), ((8, 6), 86, 80), ((8, 9), 86, 80), ((9, 0), 90, 90)],
)
def test_newest_code_that_runs_is_picked(capability: tuple[int, int], decode: int, prefill: int) -> None:
    assert pick_methods(BOTH, capability) == {"decode": f"decode@sm_{decode}", "prefill": f"prefill@sm_{prefill}"}


def test_plain_names_are_for_any_gpu() -> None:
    assert pick_methods(["prefill", "decode"], None) == {"decode": "decode", "prefill": "prefill"}


@pytest.mark.parametrize(
    ("capability", "decode"), [((8, 0), "decode@sm_80"), ((8, 9), "decode"), ((9, 0), "decode@sm_90")]
)
def test_plain_names_are_those_of_the_first_architecture(capability: tuple[int, int], decode: str) -> None:
    names = ["decode", "decode@sm_80", "decode@sm_90", "forward"]
    asked: list[str] = []

    def sm_of(name: str) -> int:
        asked.append(name)
        return 86

    assert pick_methods(names, capability, sm_of) == {"decode": decode, "forward": "forward"}
    assert asked == ["decode"]
    with pytest.raises(RuntimeError, match=r"method decode was exported for sm_80, sm_86, sm_90, this GPU is sm_75"):
        pick_methods(names, (7, 5), sm_of)


def test_no_code_for_the_gpu_names_both() -> None:
    line = r"method decode was exported for sm_80, sm_86, sm_90, this GPU is sm_75: export it again with --target sm_75"
    with pytest.raises(RuntimeError, match=line):
        pick_methods(BOTH, (7, 5))
    with pytest.raises(RuntimeError, match=r"exported for sm_80, sm_86, sm_90, and there is no GPU: load it on"):
        pick_methods(BOTH, None)


def test_capability_without_torch_comes_from_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        def __init__(self, name: str) -> None:
            assert name == "libcuda.so.1"

        def cuInit(self, flags: int) -> int:
            return 0

        def cuDeviceGet(self, device: object, index: int) -> int:
            return 0

        def cuDeviceGetAttribute(self, value: object, attribute: int, device: object) -> int:
            value._obj.value = {75: 12, 76: 1}[attribute]  # type: ignore[attr-defined]
            return 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(method_targets.ctypes, "CDLL", Driver)
    assert method_targets.gpu_capability() == (12, 1)

    def missing(name: str) -> None:
        raise OSError

    monkeypatch.setattr(method_targets.ctypes, "CDLL", missing)
    assert method_targets.gpu_capability() is None


class Engine:
    """Records the methods that it loads and runs."""

    def __init__(self, program: object, ptd: Path | None, methods: object) -> None:
        self.names = list(methods)  # type: ignore[call-overload]
        self.ran: list[str] = []

    def run(self, method: str, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        self.ran.append(method)
        return list(inputs)

    def reset(self) -> None:
        pass


def test_loader_loads_and_runs_the_methods_of_this_gpu(emulated: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulated delegates have no GPU code, so any architecture is accepted. Their methods are renamed."""
    names = ["decode@sm_80", "decode@sm_90", "peek@sm_80", "peek@sm_90", "prefill@sm_80", "prefill@sm_90"]
    monkeypatch.setattr(runtime.PteFile, "method_names", property(lambda self: names))
    plan = runtime.PteFile.plan
    monkeypatch.setattr(runtime.PteFile, "plan", lambda self, name: plan(self, name.partition("@")[0]))
    monkeypatch.setattr(
        runtime.PteFile, "delegates", lambda self: [(n, d) for n in names for d in self.plan(n).delegates]
    )
    monkeypatch.setattr(runtime, "why_not_executorch", lambda backends: "")
    monkeypatch.setattr(runtime, "ExecutorchEngine", Engine)
    monkeypatch.setattr(runtime, "gpu_capability", lambda: (9, 0))
    loaded = runtime.load(emulated.pte)
    assert loaded.method_names == ["decode", "peek", "prefill"]
    engine = loaded._engine
    assert isinstance(engine, Engine) and engine.names == ["decode@sm_90", "peek@sm_90", "prefill@sm_90"]
    loaded.run("decode", torch.zeros(1))
    assert engine.ran == ["decode@sm_90"]
    monkeypatch.setattr(runtime, "gpu_capability", lambda: (10, 0))
    with pytest.raises(RuntimeError, match=r"method decode was exported for sm_80, sm_90, this GPU is sm_100"):
        runtime.load(emulated.pte)
