"""Unmodified transformers models, exported in each mode, fused and run, against the eager model."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.export import ExportedProgram

from executorch_moe.backends.artifact.files import save
from executorch_moe.backends.cuda.missing_operators import check_operators
from executorch_moe.backends.fusion import ExpertFuser, FusionOptions
from executorch_moe.backends.lower import lower
from executorch_moe.backends.runtime.loader import load
from executorch_moe.export.models import experts_interface

from ...combinations import EXHAUSTIVE, combinations
from ..families import FAMILIES, RECURRENT, Family, Logits, by_name, export_logits, operations, tokens
from ..gpu.family_artifacts import MODES, Mode, attention

# Relative L2 error of the logits of an fp32 model, whose fused experts take and return bf16.
BOUND = 1.5e-2
FUSED = torch.ops.executorch_moe.fused_experts.default


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


@functools.cache
def program_of_the_artifact(name: str, dynamic: bool) -> ExportedProgram:
    """A family's program in fp32, in the mode that runs on the GPU too (test_families_on_gpu.py)."""
    (mode,) = (mode for mode in MODES if mode.family.name == name and mode.dynamic == dynamic)
    return export_logits(mode.model(torch.float32), mode.strict, dynamic)


@functools.cache
def operations_of_the_artifact(name: str, dynamic: bool) -> list[tuple[str, ...]]:
    return operations(ExpertFuser(FusionOptions("bf16")).fuse(program_of_the_artifact(name, dynamic)))


STATIC = {"mixtral", "deepseek_v3"}
"""Families that `make test` also exports for a fixed length: one plain, and one with groups and shared experts."""


def opposite(family: Family, experts: str, strict: bool, dynamic: bool) -> bool:
    """Whether nothing but `dynamic` is as in the artifact of this family: the two are compared."""
    if not dynamic and family.name not in STATIC:
        return False
    (mode,) = (mode for mode in MODES if mode.family.name == family.name and mode.dynamic == dynamic)
    return experts != mode.experts and strict != mode.strict


@pytest.mark.parametrize(
    ("family", "experts", "strict", "dynamic"),
    combinations(
        FAMILIES,
        ["grouped_mm", "batched_mm"],
        {"strict": True, "non-strict": False},
        {"dynamic": True, "static": False},
        chosen=opposite,
    ),
)
def test_every_mode_is_fused_and_keeps_its_values(family: Family, experts: str, strict: bool, dynamic: bool) -> None:
    model = family.model(experts, attention=attention(dynamic))
    program = export_logits(model, strict, dynamic)
    before = set(program.state_dict)
    fuser = ExpertFuser(FusionOptions("bf16"))
    fused = fuser.fuse(program)

    assert len(fuser.report.layers) == family.moe_layers and not fuser.report.unfused
    assert sum(node.target is FUSED for node in fused.graph.nodes) == family.moe_layers
    assert not any(".experts." in name and ".packed_" not in name for name in fused.state_dict)
    assert set(program.state_dict) == before  # the program that was passed is unchanged
    # Every mode gives the same fused program as the artifact of this family.
    assert operations(fused) == operations_of_the_artifact(family.name, dynamic)
    for length in (2, 11, 40) if dynamic else (7,):
        ids = tokens(length)
        with torch.no_grad():
            assert relative_error(fused.module()(ids), Logits(model)(ids)) < BOUND


# The experts' weights are exact in 4 bits, so that w4a16 must be as close as bf16. In `make test`, test_any_length.py
# lowers an unmodified model for the CPU, and test_export_families.py runs families in ExecuTorch with caches.
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("family", "scheme"),
    [*((by_name(name), "bf16") for name in ("gpt_oss", "qwen3_moe")), *((family, "w4a16") for family in FAMILIES)],
    ids=str,
)
def test_runs_in_executorch(family: Family, scheme: str, tmp_path: Path, executorch_runtime: None) -> None:
    model = family.model()
    fuser = ExpertFuser(FusionOptions(scheme, 32))
    loaded = load(save(lower({"forward": export_logits(model)}, "cpu", fusion=fuser), tmp_path / "model").pte)
    assert [layer.scheme for layer in fuser.report.layers] == [scheme] * family.moe_layers
    for length in (2, 33):
        ids = tokens(length)
        with torch.no_grad():
            expected = Logits(model)(ids)
        (actual,) = loaded.run("forward", ids)
        assert relative_error(actual, expected) < BOUND


@pytest.mark.transformers
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_our_own_experts_implementation(family: Family) -> None:
    """Each layer has one node, which equals the model's own implementation and is fused like others."""
    experts_interface.register()
    model = family.model("executorch_moe")
    with torch.no_grad():
        expected = Logits(family.model())(tokens(9))
        assert relative_error(Logits(model)(tokens(9)), expected) < 1e-5
    program = export_logits(model)
    op = torch.ops.executorch_moe.experts.default
    assert sum(node.target is op for node in program.graph.nodes) == family.moe_layers
    fuser = ExpertFuser(FusionOptions("w4a16", 32))
    fused = fuser.fuse(program)
    assert len(fuser.report.layers) == family.moe_layers
    with torch.no_grad():
        assert relative_error(fused.module()(tokens(9)), expected) < BOUND


def test_our_own_implementation_refuses_a_gating_that_it_does_not_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts with a limit use SiLU, but their own gate function."""
    experts_interface.register()
    model: Any = by_name("qwen3_moe").model("executorch_moe")
    kind = type(model.model.layers[0].mlp.experts)

    def limited(self: Any, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, -1)
        return self.act_fn(gate.clamp(max=16.0)) * up.clamp(-16.0, 16.0)

    monkeypatch.setattr(kind, "_apply_gate", limited)
    with pytest.raises(NotImplementedError, match=r"Qwen3MoeExperts has its own gate function .*use experts_impl"):
        Logits(model)(tokens(4))


@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=() if mode.dynamic else EXHAUSTIVE) for mode in MODES], ids=str
)
def test_the_cuda_runtime_has_every_operator(mode: Mode) -> None:
    """Modes of the programs that test_families_on_gpu.py runs."""
    program = mode.program() if mode.dtype != torch.float32 else program_of_the_artifact(mode.family.name, mode.dynamic)
    check_operators(ExpertFuser(FusionOptions(mode.scheme, 32)).fuse(program))


@pytest.mark.parametrize("family", FAMILIES, ids=str)
@torch.no_grad()
def test_the_bound_would_notice_the_experts(family: Family) -> None:
    model = family.model()
    expected = Logits(model)(tokens(7))
    for name, parameter in model.named_parameters():
        if ".experts." in name and "down" in name:
            parameter.mul_(0.9)
    assert relative_error(Logits(model)(tokens(7)), expected) > 2 * BOUND


def test_bf16_models() -> None:
    family = FAMILIES[0]
    model = family.model(dtype=torch.bfloat16)
    fused = ExpertFuser(FusionOptions("bf16")).fuse(export_logits(model))
    with torch.no_grad():
        assert relative_error(fused.module()(tokens(9)), Logits(model)(tokens(9))) < 0.03


@pytest.mark.exhaustive
@pytest.mark.transformers
@pytest.mark.parametrize("family", RECURRENT, ids=str)
def test_unmodified_recurrent_models_are_fused_for_a_fixed_length(family: Family) -> None:
    """transformers pads their text to chunks of 64 tokens. `any_length` takes any length: test_any_length.py."""
    model = family.model()
    fuser = ExpertFuser(FusionOptions("w4a16", 32))
    fused = fuser.fuse(export_logits(model, dynamic=False))
    assert len(fuser.report.layers) == family.moe_layers and not fuser.report.unfused
    with torch.no_grad():
        assert relative_error(fused.module()(tokens(7)), Logits(model)(tokens(7))) < BOUND
