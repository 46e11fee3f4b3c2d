"""The delegate host on real AOTInductor delegates for the CPU: everything except the CUDA container class."""

from __future__ import annotations

import struct

import pytest
import torch
from emulated_cuda import CONTEXT, WIDTH, open_cpu_container, stateful_programs
from executorch.exir.schema import (
    BackendDelegate,
    BackendDelegateDataReference,
    Chain,
    ContainerMetadata,
    DataLocation,
    DelegateCall,
    ExecutionPlan,
    FreeCall,
    Instruction,
    JumpFalseCall,
    KernelCall,
    MoveCall,
    Operator,
)
from torch.export import export

from executorch_moe.backends.artifact.files import Artifact, open_artifact
from executorch_moe.backends.artifact.weight_metadata import MAGIC, MUTATED_BUFFERS_KEY, parse_delegate
from executorch_moe.backends.cuda import MoECudaPartitioner
from executorch_moe.backends.cuda.cuda_partitioner import check_state
from executorch_moe.backends.runtime.delegate_host import DelegateHost, Step, plan_steps

CPU = torch.device("cpu")


@pytest.fixture
def host(emulated: Artifact) -> DelegateHost:
    program, data = open_artifact(emulated.pte)
    return DelegateHost(program, data, CPU, open_container=open_cpu_container)


@pytest.mark.parametrize("tokens", [2, 5, CONTEXT])
def test_every_length_equals_eager(host: DelegateHost, tokens: int) -> None:
    module, _ = stateful_programs()
    x, position = torch.randn(tokens, WIDTH), torch.arange(tokens)
    torch.testing.assert_close(host.run("prefill", (x, position))[0], module(x, position))


def test_methods_share_state_and_reset_restores_it(host: DelegateHost) -> None:
    for _ in range(2):
        module, _ = stateful_programs()
        x, position = torch.randn(6, WIDTH), torch.arange(6)
        torch.testing.assert_close(host.run("prefill", (x[:5], position[:5]))[0], module(x[:5], position[:5]))
        for _ in range(2):
            torch.testing.assert_close(host.run("decode", (x[5:], position[5:]))[0], module(x[5:], position[5:]))
        torch.testing.assert_close(host.run("peek", (torch.ones(WIDTH),))[0], module.cache.sum(0))
        host.reset()
        assert torch.count_nonzero(host.run("peek", (torch.ones(WIDTH),))[0]) == 0
    assert host.storage("cuda_fqn_weight:cpu:count").view(torch.int64).tolist() == [3] * WIDTH


def test_a_weight_exists_once(host: DelegateHost, emulated: Artifact) -> None:
    _, data = open_artifact(emulated.pte)
    assert data is not None
    keys = [key for key in data.sizes() if key.startswith("cuda_fqn_weight:")]
    assert len({host.storage(key).data_ptr() for key in keys}) == len(keys) == 3


def test_reset_leaves_weights_alone(host: DelegateHost) -> None:
    scale = host.storage("cuda_fqn_weight:cpu:scale")
    scale.zero_()
    host.reset()
    assert torch.count_nonzero(scale) == 0


def test_outputs_survive_the_next_call(host: DelegateHost) -> None:
    position = torch.arange(2)
    (first,) = host.run("prefill", (torch.ones(2, WIDTH), position))
    state = host.run("peek", (torch.ones(WIDTH),))[1]
    kept = first.clone(), state.clone()
    host.run("prefill", (torch.full((2, WIDTH), 5.0), position))
    host.reset()
    assert torch.equal(first, kept[0])
    assert torch.equal(state, kept[1])
    assert torch.count_nonzero(state) > 0


def test_without_a_list_of_state_everything_is_restored(emulated: Artifact) -> None:
    """As written by CudaPartitioner itself, without our compile spec."""
    program, data = open_artifact(emulated.pte)
    for _, delegate in program.delegates():
        delegate.compile_specs = [spec for spec in delegate.compile_specs if spec.key != MUTATED_BUFFERS_KEY]
    host = DelegateHost(program, data, CPU, open_container=open_cpu_container)
    for key in ("scale", "cache", "count"):
        host.storage(f"cuda_fqn_weight:cpu:{key}").fill_(9)
    host.reset()
    module, _ = stateful_programs()
    x, position = torch.randn(2, WIDTH), torch.arange(2)
    torch.testing.assert_close(host.run("prefill", (x, position))[0], module(x, position))


def test_two_hosts_of_one_file_do_not_share_state(emulated: Artifact) -> None:
    program, data = open_artifact(emulated.pte)
    hosts = [DelegateHost(program, data, CPU, open_container=open_cpu_container) for _ in range(2)]
    hosts[0].run("decode", (torch.ones(1, WIDTH), torch.zeros(1, dtype=torch.int64)))
    assert torch.count_nonzero(hosts[1].run("peek", (torch.ones(WIDTH),))[0]) == 0


def test_wrap_delegate_sees_every_call(emulated: Artifact) -> None:
    program, data = open_artifact(emulated.pte)
    seen = []

    def wrap(method, run):
        def wrapped(inputs):
            seen.append((method, len(inputs)))
            return run(inputs)

        return wrapped

    host = DelegateHost(program, data, CPU, open_container=open_cpu_container, wrap_delegate=wrap)
    host.run("decode", (torch.ones(1, WIDTH), torch.zeros(1, dtype=torch.int64)))
    host.run("peek", (torch.ones(WIDTH),))
    assert seen == [("decode", 2), ("peek", 1)]


def test_inputs_are_checked_before_the_delegate(host: DelegateHost) -> None:
    position = torch.arange(CONTEXT + 1)
    with pytest.raises(ValueError, match=rf"input 0 of prefill has shape \[{CONTEXT + 1}, {WIDTH}\].*smaller input"):
        host.run("prefill", (torch.ones(CONTEXT + 1, WIDTH), position))
    with pytest.raises(ValueError, match=r"input 1 of decode has dtype torch.int32, expected torch.int64"):
        host.run("decode", (torch.ones(1, WIDTH), torch.zeros(1, dtype=torch.int32)))


def test_a_container_with_an_unknown_constant(emulated: Artifact) -> None:
    class Container:
        def get_constant_names_to_original_fqns(self) -> dict[str, str]:
            return {"c0": "not.in.the.file"}

    program, data = open_artifact(emulated.pte)
    with pytest.raises(ValueError, match=r"no weight for constant 'not.in.the.file'"):
        DelegateHost(program, data, CPU, open_container=lambda library, device: Container())


def test_missing_ptd_is_said(emulated: Artifact) -> None:
    program, _ = open_artifact(emulated.pte)
    with pytest.raises(ValueError, match=r"is in no file: pass the .ptd of the same export"):
        DelegateHost(program, None, CPU, open_container=open_cpu_container)


# Plans


def plan(*calls, outputs=(9,), backend: str = "CudaBackend", operators=("et_copy::_h2d_copy",)) -> ExecutionPlan:
    return ExecutionPlan(
        name="forward",
        container_meta_type=ContainerMetadata("", ""),
        values=[],
        inputs=[0, 1],
        outputs=list(outputs),
        chains=[Chain([], [], [Instruction(call) for call in calls], None)],
        operators=[Operator(name, "out") for name in operators],
        delegates=[BackendDelegate(backend, BackendDelegateDataReference(DataLocation.INLINE, 0), [])],
        non_const_buffer_sizes=[0],
    )


def test_steps_of_a_plan() -> None:
    calls = [KernelCall(0, [0, 2, 2]), DelegateCall(0, [2, 1, 3, 4]), FreeCall(2), MoveCall(4, 9)]
    assert plan_steps(plan(*calls)) == [
        Step(None, (0,), (2,)),
        Step(0, (2, 1), (3, 4)),
        Step(None, (4,), (9,)),
    ]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (plan(KernelCall(0, [0, 9]), operators=("aten::add",)), r"forward runs aten::add outside its delegates"),
        (plan(JumpFalseCall(0, 3)), r"forward runs JumpFalseCall outside its delegates"),
        (plan(DelegateCall(0, [0, 9]), backend="XnnpackBackend"), r"has a XnnpackBackend delegate"),
        (plan(DelegateCall(0, [0, 8, 1, 9])), r"are not inputs, then outputs"),
        (plan(MoveCall(5, 9)), r"value 5 is used before anything writes it"),
        (plan(DelegateCall(0, [0, 8])), r"output value 9 is not computed"),
    ],
)
def test_plans_that_are_not_hosted(bad: ExecutionPlan, message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        plan_steps(bad)


# Payloads


def payload(fqn: bytes = b"w") -> bytes:
    def text(value: bytes) -> bytes:
        return struct.pack("<I", len(value)) + value

    entry = text(fqn) + text(b"cuda_fqn_weight:cuda:w") + struct.pack("<QiiqI", 24, 6, 1, 2, 2)
    return MAGIC + text(b"key") + struct.pack("<I", 1) + entry + struct.pack("<4q", 2, 2, 2, 1)


def test_payload() -> None:
    parsed = parse_delegate(payload(), "m")
    (weight,) = parsed.weights
    assert parsed.library_key == "key"
    assert (weight.fqn, weight.device, weight.dtype, weight.storage_nbytes) == ("w", "cuda", 6, 24)
    assert (weight.storage_offset, weight.sizes, weight.strides) == (2, (2, 2), (2, 1))


def test_payloads_that_are_not_read() -> None:
    with pytest.raises(NotImplementedError, match=r"model, method m: the delegate starts with b'ETCUDAFQN9'"):
        parse_delegate(b"ETCUDAFQN9" + payload()[10:], "model, method m")
    for length in range(len(MAGIC), len(payload())):
        with pytest.raises(ValueError, match="weight table is damaged"):
            parse_delegate(payload()[:length], "m")
    with pytest.raises(ValueError, match="3 bytes after the delegate's weight table"):
        parse_delegate(payload() + b"123", "m")
    with pytest.raises(ValueError, match=r"weight table is damaged \(a name is not UTF-8\)"):
        parse_delegate(payload(b"\xff\xfe"), "m")
    with pytest.raises(NotImplementedError, match="m: the delegate starts with bytes that are not text"):
        parse_delegate(b"\0" + payload()[1:], "m")


# Partitioner


def test_partitioner_is_a_drop_in() -> None:
    from executorch.backends.cuda.cuda_partitioner import CudaPartitioner
    from executorch.exir.backend.compile_spec_schema import CompileSpec

    given = [CompileSpec("method_name", b"decode"), CompileSpec("max_autotune", b"ON")]
    ours, theirs = MoECudaPartitioner(given).delegation_spec, CudaPartitioner(given).delegation_spec
    assert ours.backend_id == theirs.backend_id == "CudaBackend"
    assert ours.compile_specs == theirs.compile_specs
    assert {spec.key: spec.value for spec in MoECudaPartitioner().delegation_spec.compile_specs} == {
        "method_name": b"forward",
        "target_device": b"cuda:0",
    }


@pytest.mark.parametrize(
    ("shape", "refused"), [((), True), ((1, 1), True), ((8,), True), ((9,), False), ((2, 2), False)]
)
def test_state_that_would_be_compiled_in(shape: tuple[int, ...], refused: bool) -> None:
    class Counter(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(shape))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count.add_(1)
            return x + self.count.sum()

    program = export(Counter(), (torch.ones(2),))
    if refused:
        with pytest.raises(
            NotImplementedError, match=r"mutated buffer 'count' has shape .* compile its initial value in"
        ):
            check_state(program, {"count"})
    else:
        check_state(program, {"count"})
    check_state(program, set())


# Artifacts with placeholders


@pytest.fixture(scope="module")
def with_placeholders(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The method decode of the emulated artifact, with placeholders for weights of 512 bytes or more: the cache."""
    from unittest import mock

    from emulated_cuda import lower_emulated

    from executorch_moe.backends.artifact.files import save
    from executorch_moe.backends.cuda import placeholders

    _, programs = stateful_programs()
    with mock.patch.object(placeholders, "LEAST_BYTES", 512), placeholders.without_weights():
        return save(lower_emulated({"decode": programs["decode"]}), tmp_path_factory.mktemp("placeholders") / "model")


def test_weights_that_are_made_when_loaded(with_placeholders: Artifact) -> None:
    program, data = open_artifact(with_placeholders.pte)
    assert data is not None and data.is_placeholder("cuda_fqn_weight:cpu:cache")
    assert not data.is_placeholder("cuda_fqn_weight:cpu:scale")
    asked = []

    def make(name: str, nbytes: int) -> torch.Tensor | None:
        asked.append((name, nbytes))
        if name == "scale":  # a made weight is used, although the file has one too
            return torch.full((WIDTH,), 2.0).view(torch.uint8)
        return torch.zeros(nbytes, dtype=torch.uint8) if name == "cache" else None

    host = DelegateHost(program, data, CPU, open_container=open_cpu_container, weights=make)
    assert {("cache", 4 * CONTEXT * WIDTH), ("scale", 4 * WIDTH), ("count", 8 * WIDTH)} == set(asked)
    x, position = torch.randn(1, WIDTH), torch.tensor([3])
    for _ in range(2):
        module, _ = stateful_programs()
        module.scale.fill_(2.0)
        for _ in range(2):
            torch.testing.assert_close(host.run("decode", (x, position))[0], module(x, position))
        host.reset()


def test_placeholders_are_not_run(with_placeholders: Artifact) -> None:
    program, data = open_artifact(with_placeholders.pte)
    message = r"holds no weights, only placeholders: .* export it without --placeholder-weights"
    with pytest.raises(ValueError, match=message):
        DelegateHost(program, data, CPU, open_container=open_cpu_container)
    with pytest.raises(ValueError, match=r"weight 'cache' has 8 bytes, .* needs 512"):
        DelegateHost(
            program, data, CPU, open_container=open_cpu_container,
            weights=lambda name, nbytes: torch.zeros(8, dtype=torch.uint8) if name == "cache" else None,
        )  # fmt: skip
