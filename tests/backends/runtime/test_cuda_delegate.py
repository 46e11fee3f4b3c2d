"""On a GPU: export a model with our operator to .pte + .ptd, and run its delegates in PyTorch's AOTInductor runtime."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cached_experts import CONTEXT, CachedExperts, inputs, methods

from executorch_moe.backends.artifact.files import Artifact, artifact_paths, check, save
from executorch_moe.backends.artifact.inspect import check_cuda_artifact, inspect_artifact
from executorch_moe.backends.artifact.pte import PteFile
from executorch_moe.backends.lower import lower
from executorch_moe.backends.runtime.delegate_host import DelegateHost, check_arch
from executorch_moe.backends.runtime.loader import DELEGATE_HOST, EXECUTORCH_CUDA, LoadedProgram, load
from executorch_moe.backends.runtime.pybindings import why_not_pybindings

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

SCHEMES = ("w4a16", "w4a8", "bf16")


@dataclass(frozen=True)
class Exported:
    scheme: str
    module: CachedExperts
    artifact: Artifact


@pytest.fixture(scope="module", params=SCHEMES)
def exported(request: pytest.FixtureRequest, made_once: Callable[[str, Callable[[Path], None]], Path]) -> Exported:
    scheme: str = request.param
    module = CachedExperts(scheme).eval()

    def make(folder: Path) -> None:
        manager = lower(methods(module), "cuda", {"get_max_context_len": CONTEXT, "get_eos_ids": [1, 2]})
        save(manager, folder / "model")

    return Exported(scheme, module, artifact_paths(made_once(f"cached-experts-{scheme}", make) / "model"))


@pytest.fixture
def eager(exported: Exported) -> CachedExperts:
    return copy.deepcopy(exported.module).cuda()


@pytest.fixture
def loaded(exported: Exported) -> LoadedProgram:
    return load(exported.artifact.pte)


def on_gpu(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.cuda() for tensor in tensors)


def assert_same(got: torch.Tensor, expected: torch.Tensor, note: str, note_bits) -> None:
    """Assert equality within bf16 rounding of the experts' output, and note whether the bits are equal."""
    bits = "equal bit for bit" if torch.equal(got.cpu(), expected.cpu()) else "equal within bf16 rounding"
    note_bits(f"{note}: {bits}")
    torch.testing.assert_close(got.cpu(), expected.cpu(), rtol=2**-7, atol=2**-7)


def test_artifact_is_self_contained(exported: Exported, note_bits) -> None:
    check(exported.artifact.pte, verify_bytes=True)
    report = inspect_artifact(exported.artifact.pte)
    check_cuda_artifact(report)
    major, minor = torch.cuda.get_device_capability()
    for name, method in report.methods.items():
        (delegate,) = method.delegates
        kernels = [kernel for kernel in delegate.kernels if kernel.startswith("moe_")]
        note_bits(f"{exported.scheme} {name}: {', '.join(kernels)} for {', '.join(delegate.archs)}")
        assert kernels
        assert any(arch.startswith(f"sm_{major}{minor}") for arch in delegate.archs)
        assert set(delegate.mutated or ()) == {"cache", "calls"}
        assert {"experts.w13", "experts.w2", "cache", "calls"} <= delegate.weights.keys()


def test_says_which_runtime_ran(loaded: LoadedProgram) -> None:
    assert loaded.runtime in (DELEGATE_HOST, EXECUTORCH_CUDA)
    assert loaded.method_names == ["decode", "prefill"]
    assert loaded.constant("get_max_context_len") == CONTEXT
    assert loaded.constant("get_eos_ids") == [1, 2]


def test_bindings_for_another_torch_are_not_touched(exported: Exported, note_bits) -> None:
    if not (why := why_not_pybindings()):
        pytest.skip(f"the bindings are built for the installed torch {torch.__version__}")
    note_bits(f"not run: {why}")
    assert load(exported.artifact.pte).runtime == DELEGATE_HOST
    assert "executorch.extension.pybindings.portable_lib" not in sys.modules
    with pytest.raises(RuntimeError, match="ExecuTorch's runtime: "):
        load(exported.artifact.pte, runtime="executorch")


@pytest.mark.parametrize("tokens", [2, 3, 16, 17, CONTEXT])
def test_prefill_equals_eager_at_any_length(
    exported: Exported, eager: CachedExperts, loaded: LoadedProgram, tokens: int, note_bits
) -> None:
    args = inputs(tokens)
    (got,) = loaded.run("prefill", *args)
    assert_same(got, eager(*on_gpu(args)), f"{exported.scheme} prefill T={tokens}", note_bits)


def test_methods_share_weights_and_state(
    exported: Exported, eager: CachedExperts, loaded: LoadedProgram, note_bits
) -> None:
    for attempt in range(2):
        args = inputs(6)
        loaded.run("prefill", *args)
        eager(*on_gpu(args))
        for position in (6, 7):
            args = inputs(1, start=position)
            (got,) = loaded.run("decode", *args)
            expected = eager(*on_gpu(args))
            note = f"{exported.scheme} decode at {position}, round {attempt}"
            assert_same(got, expected, note, note_bits)
        loaded.reset()
        eager.cache.zero_()
        eager.calls.fill_(3)
    engine = loaded._engine
    if isinstance(engine, DelegateHost):
        report = inspect_artifact(exported.artifact.pte)
        names = [set(method.delegates[0].weights) for method in report.methods.values()]
        shared = names[0] & names[1]
        assert {"experts.w13", "experts.w2", "cache", "calls"} <= shared
        assert engine.storage("cuda_fqn_weight:cuda:cache").is_cuda


def test_outputs_survive_the_next_call(loaded: LoadedProgram) -> None:
    (first,) = loaded.run("prefill", *inputs(4))
    kept = first.clone()
    loaded.run("prefill", *inputs(9))
    torch.cuda.synchronize()
    assert torch.equal(first, kept)


def test_same_input_same_bits(loaded: LoadedProgram) -> None:
    outputs = []
    for _ in range(3):
        loaded.reset()
        outputs.append(loaded.run("prefill", *inputs(CONTEXT))[0].clone())
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def test_gpu_of_another_architecture_is_refused(exported: Exported) -> None:
    program = PteFile(exported.artifact.pte)
    library = next(data for key, data in program.named_data().items() if key.endswith("_so_blob"))
    with pytest.raises(RuntimeError, match=r"was exported for .*, this GPU is sm_70: export it again"):
        check_arch(library, (7, 0), "method decode")
