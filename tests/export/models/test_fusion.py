"""Recognizing experts by structure, refusing other modules, and sharing packed weights between methods."""

from __future__ import annotations

import json

import pytest
import torch
from executorch.exir import to_edge_transform_and_lower
from torch import Tensor, nn
from torch.export import Dim, export

from executorch_moe.backends.cpu import MoECpuPartitioner
from executorch_moe.backends.cuda import MoECudaPartitioner
from executorch_moe.backends.cuda.missing_operators import missing_operators
from executorch_moe.backends.fusion import ExpertFuser, FusionOptions
from executorch_moe.export.checkpoint.whole import load_model
from executorch_moe.export.models.causal_lm import CausalLM, export_methods
from executorch_moe.export.models.pretrained import resolve

from ..families import by_name, export_logits

E, H, WIDTH, K = 5, 64, 32, 2
FUSED = torch.ops.executorch_moe.fused_experts.default


class Zorg(nn.Module):
    """Experts of an unknown class: separate gate, up and down; every expert computes every token."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.transposed = transposed
        shapes = {"first": (E, WIDTH, H), "second": (E, H, WIDTH), "third": (E, WIDTH, H)}
        for name, (e, n, k) in shapes.items():
            shape = (e, k, n) if transposed else (e, n, k)
            setattr(self, name, nn.Parameter(torch.randn(shape) / k**0.5))

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return nn.functional.silu(gate) * up

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        def rows(w: Tensor) -> Tensor:
            return w if self.transposed else w.transpose(1, 2)

        every = x.expand(E, *x.shape)
        y = self.gated(every @ rows(self.third), every @ rows(self.first)) @ rows(self.second)
        share = torch.zeros(x.shape[0], E, dtype=x.dtype).scatter(1, ids, weights)
        return (y * share.T.unsqueeze(-1)).sum(0)


class Gelu(Zorg):
    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return nn.functional.gelu(gate) * up


class NearlyOurs(Zorg):
    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return gate * torch.sigmoid(1.01 * gate) * up


class Limited(Zorg):
    """Gated experts with a limit at one of the places where models have one."""

    def __init__(self, limit: float, place: str) -> None:
        super().__init__()
        self.limit, self.place = limit, place

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        if self.place == "gate":
            return nn.functional.silu(gate.clamp(max=self.limit)) * up
        if self.place == "activation":
            return nn.functional.silu(gate).clamp(max=self.limit) * up
        if self.place == "up":
            return nn.functional.silu(gate) * up.clamp(-self.limit, self.limit)
        return self.limit * torch.tanh(nn.functional.silu(gate) * up / self.limit)


class Decay(nn.Module):
    """Not experts: a mixer with two tables of the same first size, as in linear attention, without parameters."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("query_decay", "key_decay"):
            self.register_buffer(name, torch.rand(4, H // 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (4, H // 4)).unsqueeze(-1)
        return (heads * self.query_decay * self.key_decay).flatten(1)


class Grouped(nn.Module):
    """Not experts: stacked matrices of several heads, all of which compute every token."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(4, H, 8)), nn.Parameter(torch.randn(4, 8, H))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.down @ self.up).sum(0)


class SharedExperts(Zorg):
    """Experts that all compute every token, with a weight for each."""

    def forward(self, x: Tensor, gammas: Tensor) -> Tensor:  # type: ignore[override]
        every = x.expand(E, *x.shape)
        gated = self.gated(every @ self.third.mT, every @ self.first.mT)
        return (gated @ self.second.mT * gammas.T[..., None]).sum(0)


class AllExperts(SharedExperts):
    """The same module under another name."""


class WithOthers(nn.Module):
    """A block with experts, and other modules that resemble experts by shape or name."""

    def __init__(self) -> None:
        super().__init__()
        self.decay, self.grouped, self.block = Decay(), Grouped(), Block(Zorg())
        self.shared, self.all = SharedExperts(), AllExperts()

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.decay(x) + self.grouped(x) / 100)
        gammas = x[:, :E].softmax(-1)
        return x + self.shared(x, gammas) + self.all(x, gammas)


class WritesItsInput(Zorg):
    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        y = super().forward(x, weights, ids)
        x.mul_(2)
        return y


class TwoOutputs(Zorg):
    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:  # type: ignore[override]
        y = super().forward(x, weights, ids)
        return y, y * 2  # type: ignore[return-value]


class RoutesItself(Zorg):
    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return super().forward(x, *x[:, :E].softmax(-1).topk(K))


class ThreeDimensional(Zorg):
    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return super().forward(x[0], weights, ids)[None]


class LinearExperts(nn.Module):
    """A module named like experts, with other weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(H, H))

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return (x @ self.weight) * weights.sum(-1, keepdim=True) + ids.sum(-1, keepdim=True)


class Block(nn.Module):
    """A router that owns experts."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.router = nn.Linear(H, E, bias=False)
        self.inner = nn.ModuleDict({"zorg": experts})

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(K, -1)
        y = self.inner["zorg"](x[None] if isinstance(self.inner["zorg"], ThreeDimensional) else x, weights, ids)
        return x + (y[0] + y[1] if isinstance(y, tuple) else y)


def program_of(experts: nn.Module) -> torch.export.ExportedProgram:
    shapes = {"x": {0: Dim("T", min=2, max=64)}}
    return export(Block(experts).eval(), (torch.randn(6, H),), dynamic_shapes=shapes)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_class_that_nobody_knows(transposed: bool) -> None:
    program = program_of(Zorg(transposed))
    fuser = ExpertFuser(FusionOptions("bf16"))
    fused = fuser.fuse(program)
    (layer,) = fuser.report.layers
    assert (layer.module, layer.family, layer.activation) == ("inner.zorg", "Zorg", "silu")
    assert (layer.num_experts, layer.top_k, layer.hidden_size, layer.intermediate_size) == (E, K, H, WIDTH)
    assert [name for name in fused.state_dict if "zorg" in name] == ["inner.zorg.packed_w13", "inner.zorg.packed_w2"]
    for tokens in (2, 17):
        x = torch.randn(tokens, H)
        torch.testing.assert_close(fused.module()(x), program.module()(x), rtol=0.03, atol=0.03)


@pytest.mark.parametrize("place", ["gate", "activation", "up", "product"])
@pytest.mark.parametrize("limit", [16.0, 30.0, 500.0])
def test_a_limit_at_any_height_is_found(limit: float, place: str) -> None:
    program = program_of(Limited(limit, place))
    with pytest.raises(NotImplementedError, match="not fused: computes "):
        ExpertFuser(FusionOptions("bf16")).fuse(program)


def test_a_limit_is_found_in_a_program_for_one_token() -> None:
    program = export(Block(Limited(30.0, "gate")).eval(), (torch.randn(1, H),))
    with pytest.raises(NotImplementedError, match=r"it limits \(clamps\)"):
        ExpertFuser(FusionOptions("bf16")).fuse(program)
    fuser = ExpertFuser(FusionOptions("bf16"))
    fuser.fuse(export(Block(Zorg()).eval(), (torch.randn(1, H),)))
    assert len(fuser.report.layers) == 1


def test_a_limit_beyond_every_number_of_a_model_is_none() -> None:
    fuser = ExpertFuser(FusionOptions("bf16"))
    fuser.fuse(program_of(Limited(float("inf"), "gate")))
    assert [layer.activation for layer in fuser.report.layers] == ["silu"]


def test_modules_that_every_token_goes_through_are_left_alone() -> None:
    model = WithOthers().eval()
    program = export(model, (torch.randn(6, H),), dynamic_shapes={"x": {0: Dim("T", min=2, max=64)}})
    fuser = ExpertFuser(FusionOptions("bf16"))
    fused = fuser.fuse(program)
    assert [layer.module for layer in fuser.report.layers] == ["block.inner.zorg"] and not fuser.report.unfused
    x = torch.randn(9, H)
    actual, expected = fused.module()(x), program.module()(x)
    assert (actual - expected).norm() / expected.norm() < 0.02


def test_the_report_as_json() -> None:
    fuser = ExpertFuser(FusionOptions("w4a16", 32))
    fuser.fuse(program_of(Zorg()))
    report = json.loads(fuser.report.json())
    assert report["layers"][0]["bytes_before"] == report["bytes_before"] == 3 * E * H * WIDTH * 4
    assert report["layers"][0]["group_size"] == 32 and report["unfused"] == []
    # WIDTH = 32 and H = 64 are padded to 128: 4 bits and one bf16 scale for 32 of them.
    assert report["bytes_after"] == E * (256 * 128 + 128 * 128) * (4 + 16 / 32) / 8


@pytest.mark.parametrize(
    ("experts", "reason"),
    [
        (Gelu, "computes something else than gated experts with activation silu or swiglu_oai"),
        (NearlyOurs, "computes something else"),
        (WritesItsInput, r"has 2 outputs \(sum_1, mul_\)"),
        (TwoOutputs, "has 2 outputs"),
        (RoutesItself, "has integer inputs none, expected one, the expert ids"),
        (ThreeDimensional, "flatten batch and sequence"),
        (LinearExperts, "has parameters weight .*expected gate_up"),
    ],
)
def test_an_unfused_region_is_an_error_that_names_module_and_reason(experts: type[nn.Module], reason: str) -> None:
    program = program_of(experts())
    named = rf"experts inner\.zorg \({experts.__name__}\) not fused: .*{reason}"
    with pytest.raises(NotImplementedError, match=named):
        ExpertFuser().fuse(program)

    fuser = ExpertFuser(FusionOptions(require_fused=False))
    kept = fuser.fuse(program)
    assert [region.module for region in fuser.report.unfused] == ["inner.zorg"] and not fuser.report.layers
    x = torch.randn(4, H)
    torch.testing.assert_close(kept.module()(x.clone()), program.module()(x.clone()))


@pytest.mark.parametrize("partitioner", [MoECpuPartitioner, MoECudaPartitioner])
def test_a_group_size_that_does_not_divide(partitioner: type) -> None:
    chosen = partitioner(fusion=FusionOptions("w4a16", 64))
    with pytest.raises(NotImplementedError, match=r"inner\.zorg .*size I=32 must be a multiple .* group_size=32$"):
        chosen.transform_for_pre_decomposition(program_of(Zorg()))


def test_leaving_experts_unfused_is_offered_where_it_helps() -> None:
    offer = r"computes something .*require_fused=False\) leaves such experts unfused"
    with pytest.raises(NotImplementedError, match=offer):
        ExpertFuser().fuse(program_of(Gelu()))
    experts = Zorg()
    with torch.no_grad():
        experts.second[3] = float("inf")
    with pytest.raises(NotImplementedError, match=r"inner\.zorg .*down of expert 3 holds NaN, Inf .*ends at 65504\)$"):
        ExpertFuser().fuse(program_of(experts))


def test_unfused_experts_that_the_cpu_runtime_cannot_run() -> None:
    family, options = by_name("qwen3_moe"), FusionOptions("w4a16", 128, require_fused=False)
    named = (
        r"^experts model\.model\.layers\.0\.mlp\.experts \(Qwen3MoeExperts\) are not fused \(hidden size .*\), "
        r"and ExecuTorch's CPU runtime has no aten\.histc, transformers\.grouped_mm_fallback: .*'batched_mm'$"
    )
    with pytest.raises(NotImplementedError, match=named):
        MoECpuPartitioner(options).transform_for_pre_decomposition(export_logits(family.model("grouped_mm")))
    partitioner = MoECpuPartitioner(options)
    program = export_logits(family.model("batched_mm"), dynamic=False)
    lowered = to_edge_transform_and_lower(program, partitioner=[partitioner])
    assert len(partitioner.report.unfused) == family.moe_layers and lowered.methods == {"forward"}


def test_the_cuda_partitioner_fuses() -> None:
    partitioner = MoECudaPartitioner(fusion=FusionOptions("w4a16", 32))
    fused = partitioner.transform_for_pre_decomposition(program_of(Zorg()))
    assert sum(node.target is FUSED for node in fused.graph.nodes) == 1
    assert partitioner.report.layers[0].module == "inner.zorg"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "int3"}, "scheme='int3' is unknown: use one of"),
        ({"group_size": -5}, "group_size=-5 is not supported: use 32, 64, 128 or a multiple of 128"),
        ({"group_size": 48}, "group_size=48 is not supported"),
        ({"group_size": "abc"}, "group_size='abc' is not an integer: write group_size=32"),
        ({"group_size": 32.0}, "group_size=32.0 is not an integer"),
        ({"require_fused": "no"}, "require_fused='no' is neither True nor False"),
    ],
)
def test_bad_options_are_refused_when_they_are_made(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FusionOptions(**options)  # type: ignore[arg-type]


def test_a_group_size_that_is_not_used_may_be_anything() -> None:
    FusionOptions("bf16", 0)


@pytest.mark.parametrize("wrong", ["w4a16", [], {"scheme": "w4a16"}, 32])
def test_partitioners_refuse_what_is_no_option(wrong: object) -> None:
    for make in (MoECpuPartitioner, lambda fusion: MoECudaPartitioner(fusion=fusion), ExpertFuser):
        with pytest.raises(TypeError, match=rf"as a {type(wrong).__name__}, expected FusionOptions .*: write Fusion"):
            make(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [FusionOptions(), ExpertFuser(), "w4a16", ["w4a16"]])
def test_the_cuda_partitioner_takes_options_by_name(wrong: object) -> None:
    with pytest.raises(TypeError, match=r"expected a list of CompileSpec: .* MoECudaPartitioner\(fusion=FusionOptions"):
        MoECudaPartitioner(wrong)  # type: ignore[arg-type]


def test_programs_without_experts_are_left_alone() -> None:
    program = export(nn.Linear(4, 4), (torch.randn(2, 4),))
    assert ExpertFuser().fuse(program) is program


def test_methods_share_weights_that_are_packed_once() -> None:
    model = CausalLM(load_model(resolve("tiny"), torch.float32), 64)
    fuser = ExpertFuser(FusionOptions("w4a16", 32))
    fused = {name: fuser.fuse(program) for name, program in export_methods(model).items()}
    packed = {name for name in fused["prefill"].state_dict if ".packed_" in name}
    assert len(fuser.report.layers) == 2 and len(packed) == 8
    for name in packed:
        assert fused["prefill"].state_dict[name] is fused["decode"].state_dict[name]
    again = fuser.fuse(fused["decode"])
    assert again is fused["decode"]  # no experts are left to fuse


def test_operators_that_the_cuda_runtime_lacks_are_gone_once_fused() -> None:
    program = export_logits(by_name("qwen3_moe").model())
    missing = missing_operators(program)
    assert {operator.operator for operator in missing} == {"aten.histc", "transformers.grouped_mm_fallback"}
    assert {operator.module_type for operator in missing} == {"Qwen3MoeExperts"}
    assert missing_operators(ExpertFuser().fuse(program)) == []
