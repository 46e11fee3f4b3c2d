"""The CPU target: exports run in executorch.runtime and are compared with the eager module."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cached_experts import CONTEXT, CachedExperts, inputs, methods
from torch.export import export

from executorch_moe.backends import lower as targets
from executorch_moe.backends.artifact.files import save
from executorch_moe.backends.cpu import MoECpuPartitioner
from executorch_moe.backends.cpu import uncopied_weights as uncopied_weights_module
from executorch_moe.backends.cpu.uncopied_weights import StorageData
from executorch_moe.backends.lower import lower
from executorch_moe.backends.runtime.loader import EXECUTORCH_CPU, LoadedProgram, load


@dataclass(frozen=True)
class Case:
    scheme: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.scheme}-{str(self.dtype).removeprefix('torch.')}"


CASES = [
    pytest.param(Case("w4a16", torch.bfloat16), marks=pytest.mark.exhaustive),
    Case("w4a16", torch.float32),  # fp32 around experts that compute in bf16
    Case("w4a8", torch.bfloat16),
    Case("bf16", torch.bfloat16),
]


@pytest.fixture(scope="module", params=CASES, ids=str)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, executorch_runtime: None):
    case: Case = request.param
    module = CachedExperts(case.scheme, case.dtype).eval()
    manager = lower(methods(module, case.dtype), "cpu", {"get_max_context_len": CONTEXT})
    artifact = save(manager, tmp_path_factory.mktemp("cpu") / "model.pte")
    return case, module, load(artifact.pte)


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=2**-7, atol=2**-7)


def test_every_length_equals_eager(exported) -> None:
    case, module, loaded = exported
    eager = copy.deepcopy(module)
    loaded.reset()
    for tokens in (2, 7, CONTEXT):
        args = inputs(tokens, case.dtype)
        (got,) = loaded.run("prefill", *args)
        assert_close(got, eager(*args))


def test_methods_share_state_and_reset_restores_it(exported) -> None:
    case, module, loaded = exported
    for _ in range(2):
        eager = copy.deepcopy(module)
        loaded.reset()
        args = inputs(5, case.dtype)
        assert_close(loaded.run("prefill", *args)[0], eager(*args))
        for position in (5, 6):
            args = inputs(1, case.dtype, start=position)
            assert_close(loaded.run("decode", *args)[0], eager(*args))
    assert eager.calls[0] == 6  # three calls on a buffer that starts at 3: the initial value was exported


def test_outputs_survive_the_next_call(exported) -> None:
    case, _, loaded = exported
    (first,) = loaded.run("prefill", *inputs(4, case.dtype))
    kept = first.clone()
    loaded.run("prefill", *inputs(9, case.dtype))
    loaded.reset()
    assert torch.equal(first, kept)


def test_dropped_ids(exported) -> None:
    case, module, loaded = exported
    x, ids, weights, position = inputs(4, case.dtype)
    ids[0, 0], ids[2] = -1, 99
    eager = copy.deepcopy(module)
    loaded.reset()
    assert_close(loaded.run("prefill", x, ids, weights, position)[0], eager(x, ids, weights, position))


def test_says_what_it_is(exported) -> None:
    _, _, loaded = exported
    assert isinstance(loaded, LoadedProgram)
    assert loaded.runtime == EXECUTORCH_CPU
    assert loaded.device == torch.device("cpu")
    assert loaded.method_names == ["decode", "prefill"]
    assert loaded.constant("get_max_context_len") == CONTEXT


class Router(torch.nn.Module):
    """A router whose weight requires gradients, before experts; a second method only reads the state."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(64, 8, bias=False)
        self.experts = CachedExperts("w4a16", torch.float32).experts
        self.register_buffer("last", torch.full((1, 64), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(2, -1)
        y = self.experts(x, ids, weights)
        self.last.copy_(y[:1])
        return y


class Last(torch.nn.Module):
    def __init__(self, owner: Router) -> None:
        super().__init__()
        self.register_buffer("last", owner.last)

    def forward(self, scale: torch.Tensor) -> torch.Tensor:
        return self.last * scale


def test_a_method_that_only_reads_the_state_sees_it(tmp_path: Path, executorch_runtime: None) -> None:
    module = Router().eval()
    x, scale = torch.randn(3, 64), torch.tensor([2.0])
    programs = {"forward": export(module, (x,)), "last": export(Last(module), (scale,))}
    loaded = load(save(lower(programs, "cpu"), tmp_path / "model").pte)
    assert_close(loaded.run("last", scale)[0], torch.full((1, 64), 1.0))
    (y,) = loaded.run("forward", x)
    assert_close(y, module(x).detach())
    assert_close(loaded.run("last", scale)[0], y[:1] * 2)


def test_weights_are_not_copied_and_the_files_are_those_of_stock_executorch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = CachedExperts("w4a16", torch.float32).eval()
    programs = {f"tokens_{tokens}": export(module, inputs(tokens, torch.float32)) for tokens in (1, 2)}
    manager = lower(programs, "cpu")
    buffers = manager._emitter_output.external_constant_buffer
    of_model = {t.untyped_storage().data_ptr(): t for t in module.experts.buffers()}
    found = [buffer for buffer in buffers if buffer._storage.data_ptr() in of_model]
    # Each exists once, although two methods read it.
    assert len(found) == len(of_model) >= 4
    for buffer in found:
        assert buffer.to_bytes() == bytes(of_model[buffer._storage.data_ptr()].untyped_storage())
    ours = save(manager, tmp_path / "ours")
    monkeypatch.setattr(targets, "uncopied_weights", contextlib.nullcontext)
    manager = lower(programs, "cpu")
    assert {type(buffer) for buffer in manager._emitter_output.external_constant_buffer} == {bytes}
    stock = save(manager, tmp_path / "stock")
    assert ours.ptd.read_bytes() == stock.ptd.read_bytes() and ours.pte.read_bytes() == stock.pte.read_bytes()


def test_bytes_of_a_storage() -> None:
    tensor = torch.arange(100, dtype=torch.int16)
    content = tensor.numpy().tobytes()
    data = StorageData(tensor.untyped_storage())
    file = io.BytesIO()
    data.write_to_file(file)
    assert len(data) == 200 and data.prefix(32) == content[:32]
    assert data.to_bytes() == file.getvalue() == content
    assert data.sha256() == hashlib.sha256(content).digest()
    empty = StorageData(torch.empty(0).untyped_storage())
    assert len(empty) == 0 and empty.to_bytes() == b"" and empty.sha256() == hashlib.sha256().digest()


def test_another_emitter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uncopied_weights_module._Emitter, "_save_new_const_tensor", lambda self, spec: 0)
    with pytest.raises(RuntimeError, match=r"cpu.* with .*_save_new_const_tensor\(self, spec\), not .*: install"):
        lower({"forward": export(torch.nn.ReLU(), (torch.randn(3),))}, "cpu")


def test_partitioner_leaves_other_programs_alone() -> None:
    program = export(torch.nn.ReLU(), (torch.randn(3),))
    assert MoECpuPartitioner().transform_for_pre_decomposition(program) is program


@pytest.mark.parametrize(
    ("programs", "target", "constants", "message"),
    [
        ({"forward": None}, "tpu", None, r"target 'tpu' is unknown: choose one of cuda, cpu"),
        ({}, "cpu", None, r"programs is empty"),
        ({"forward": None}, "cpu", {"forward": 1}, r"'forward' is both a method and a constant method"),
    ],
)
def test_lower_refuses(programs, target, constants, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lower(programs, target, constants)


def test_cuda_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    program = export(torch.nn.ReLU(), (torch.randn(3),))
    with pytest.raises(RuntimeError, match=r"cannot lower for target 'cuda': .*use target 'cpu'"):
        lower({"forward": program}, "cuda")
