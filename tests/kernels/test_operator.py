"""The operator: CPU kernel and ATen form against the reference, opcheck, symbolic T, and all argument checks."""

from __future__ import annotations

import inspect
import pydoc
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, export
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from executorch_moe.kernels import SCHEMES, FusedExperts, fused_experts, pack_experts
from executorch_moe.kernels.arguments import ExpertArguments
from executorch_moe.kernels.experts.aten import fused_experts_aten
from executorch_moe.kernels.experts.plan import Options, run_fused_experts
from executorch_moe.kernels.gpus import find_model
from executorch_moe.kernels.launch import Launch
from executorch_moe.kernels.validate import check_fused_experts

from .cases import BOUNDS, CASES, ZERO_CASE, Case, make, relative_error


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cpu_kernel_against_the_oracle(case: Case, scheme: str) -> None:
    problem = make(case, scheme)
    out = fused_experts(*problem.args())
    assert out.dtype == torch.bfloat16 and out.shape == problem.hidden_states.shape
    assert relative_error(out, problem.expected) <= BOUNDS[scheme]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_aten_form_is_the_cpu_kernel_within_rounding(case: Case, scheme: str) -> None:
    args = make(case, scheme).args()
    assert relative_error(fused_experts_aten(args), fused_experts(*args).float()) <= 1e-3


def test_zero_points() -> None:
    problem = make(ZERO_CASE, "w4a16")
    assert relative_error(fused_experts(*problem.args()), problem.expected) <= BOUNDS["w4a16"]
    assert relative_error(fused_experts_aten(problem.args()), problem.expected) <= BOUNDS["w4a16"]


def test_no_tokens() -> None:
    args = make(Case("no tokens", tokens=4), "w4a16").args()
    empty = (args[0][:0], args[1][:0], args[2][:0], *args[3:])  # type: ignore[index]
    assert fused_experts(*empty).shape == (0, 128)


def test_repeated_expert_of_a_token_counts_twice() -> None:
    problem = make(Case("repeat", tokens=3), "bf16")
    args = list(problem.args())
    args[1] = torch.zeros_like(problem.topk_ids)
    twice = fused_experts(*args).float()
    args[1] = torch.stack([torch.zeros(3, dtype=torch.int64), torch.full((3,), -1)], 1)
    args[2] = problem.topk_weights.sum(1, keepdim=True).expand(3, 2).contiguous()
    torch.testing.assert_close(twice, fused_experts(*args).float(), rtol=2e-2, atol=2e-2)


def test_the_arguments_are_those_of_expert_arguments() -> None:
    """The schema is part of every exported program: it may only get further arguments with defaults at its end."""
    assert str(torch.ops.executorch_moe.fused_experts.default._schema) == (
        "executorch_moe::fused_experts(Tensor hidden_states, Tensor topk_ids, Tensor topk_weights, Tensor w13, "
        "Tensor w2, Tensor? w13_scale, Tensor? w2_scale, Tensor? w13_zero, Tensor? w2_zero, Tensor? w13_bias, "
        "Tensor? w2_bias, str scheme, str activation, SymInt group_size, Tensor? shared=None, Tensor? share=None, "
        "Tensor? shared_down=None, Tensor? shared_down_scale=None) -> Tensor"
    )
    arguments = make(Case("keywords", tokens=3), "w4a16").args()
    by_keyword = fused_experts(**dict(reversed(arguments._asdict().items())))
    assert torch.equal(by_keyword, fused_experts(*arguments))
    assert tuple(inspect.signature(fused_experts).parameters) == ExpertArguments._fields
    assert "topk_weights: fp32, bf16 or fp16 [T, top_k]" in pydoc.render_doc(fused_experts)
    with pytest.raises(RuntimeError, match="group_size"):
        fused_experts(*arguments[: ExpertArguments._fields.index("group_size")])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
def test_opcheck(scheme: str, contiguous: bool) -> None:
    args = list(make(Case("opcheck", tokens=5), scheme).args())
    if not contiguous:
        args[0] = torch.randn(128, 5).bfloat16().t()
        args[1] = args[1].t().contiguous().t()  # type: ignore[attr-defined]
        args[2] = torch.rand(5, 4)[:, ::2]
    torch.library.opcheck(fused_experts, tuple(args))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_kernels_are_planned_with_numbers_where_every_size_is_a_symbol(scheme: str) -> None:
    """AOT dispatch with dynamic shapes traces the operator so. Only the number of tokens may stay a symbol."""
    problem = make(Case("symbols", tokens=40), scheme)
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)

    def symbolic(value: object) -> object:
        if not isinstance(value, torch.Tensor):
            return value
        context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DUCK] * value.dim())  # type: ignore[var-annotated]
        return mode.from_tensor(value, symbolic_context=context)

    arguments = ExpertArguments(*map(symbolic, problem.args()))  # type: ignore[arg-type]
    assert isinstance(arguments.w13.shape[0], torch.SymInt)
    launches: list[Launch] = []
    with mode:
        check_fused_experts(arguments)
        run_fused_experts(arguments, options=Options(), gpu=find_model("h200").gpu, submit=launches.append)
    assert any(isinstance(launch.args.get("num_pairs"), torch.SymInt) for launch in launches)
    for launch in launches:
        assert not any(isinstance(value, torch.SymInt) for value in launch.constexprs.values()), launch.kernel


@pytest.mark.parametrize("strict", [True, False])
def test_symbolic_tokens_export_to_one_node(strict: bool) -> None:
    problem = make(Case("export", tokens=6), "w4a16")
    module = FusedExperts(problem.packed)
    inputs = (problem.hidden_states, problem.topk_ids, problem.topk_weights)
    tokens = Dim("tokens", min=2, max=512)
    program = export(module, inputs, dynamic_shapes=({0: tokens},) * 3, strict=strict)
    nodes = [n for n in program.graph.nodes if n.target is torch.ops.executorch_moe.fused_experts.default]
    assert len(nodes) == 1
    longer = make(Case("longer", tokens=33), "w4a16")
    args = (longer.hidden_states, longer.topk_ids, longer.topk_weights)
    assert torch.equal(program.module()(*args), module(*args))


def test_module_keeps_packed_dtypes_and_accepts_fp32() -> None:
    problem = make(Case("fp32", tokens=4, bias=True), "w4a16")
    module = FusedExperts(problem.packed).to(torch.float64)
    assert module.w13.dtype == torch.uint8 and module.w13_scale.dtype == torch.bfloat16
    assert module.w13_bias.dtype == torch.float32
    out = module(problem.hidden_states.float(), problem.topk_ids, problem.topk_weights)
    assert out.dtype == torch.float32
    assert relative_error(out, problem.expected) <= BOUNDS["w4a16"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_module_refuses_rows_of_another_width_that_the_padded_weights_would_take(scheme: str) -> None:
    problem = make(Case("width", tokens=4), scheme)
    module, hidden = FusedExperts(problem.packed), problem.hidden_states
    for width in (32, 64, 96, 160):
        other = hidden.new_zeros(4, width)
        with pytest.raises(ValueError, match=f"hidden_states has {width} columns, .* hidden size H=128: pass "):
            module(other, problem.topk_ids, problem.topk_weights)
    with pytest.raises(ValueError, match="hidden_states has rank 3, expected 2"):
        module(hidden[None], problem.topk_ids, problem.topk_weights)


def bad(name: str, value: object) -> ExpertArguments:
    """Arguments with one of them replaced."""
    arguments = make(Case("bad", tokens=5), "w4a16").args()
    return arguments._replace(**{name: value(getattr(arguments, name)) if callable(value) else value})


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("hidden_states", lambda t: t.float(), ValueError, "hidden_states has dtype float32, expected bfloat16"),
        ("hidden_states", lambda t: t[None], ValueError, "hidden_states has rank 3, expected 2: flatten"),
        ("hidden_states", lambda t: t[:4], ValueError, "hidden_states has 4 tokens but topk_ids has 5"),
        ("hidden_states", lambda t: t[:, :100], ValueError, "must be a multiple of group_size=32"),
        ("topk_ids", lambda t: t.float(), ValueError, "topk_ids has dtype float32, expected int32 or int64"),
        ("topk_ids", lambda t: t.repeat(1, 5), ValueError, "must have the same shape"),
        ("topk_weights", lambda t: t[:, :1], ValueError, "must have the same shape"),
        ("topk_weights", lambda t: t.double(), ValueError, "topk_weights has dtype float64"),
        ("w13", lambda t: t.float(), ValueError, "w13 has dtype float32, expected uint8"),
        ("w13", lambda t: t[:, :, :16], ValueError, "w13 has shape .* pack the weights with pack_experts"),
        ("w2", lambda t: t[0], ValueError, "w2 rank 3, not the packed layout"),
        ("w13_scale", None, ValueError, "scheme=w4a16 needs w13_scale and w2_scale"),
        ("w13_scale", lambda t: t.float(), ValueError, "w13_scale has dtype float32, expected bfloat16"),
        ("w13_scale", lambda t: t[:, :2], ValueError, "w13_scale has shape"),
        ("w13_zero", lambda _: torch.zeros(8, 4, 256).bfloat16(), ValueError, "must be given together"),
        ("w13_bias", lambda _: torch.zeros(8, 4), ValueError, "w13_bias has shape"),
        ("w13", lambda t: t.to("meta"), ValueError, "w13 is on meta but hidden_states is on cpu: move both"),
        ("scheme", "w8a8", ValueError, "scheme='w8a8' is unknown"),
        ("activation", "relu", ValueError, "activation='relu' is not supported: use one of silu, swiglu_oai"),
        ("group_size", 64, ValueError, "w13_scale has shape"),
        ("group_size", 7, ValueError, "group_size=7 is not supported"),
    ],
)
def test_bad_arguments_get_a_reason(name: str, value: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fused_experts(*bad(name, value))


def test_top_k_above_the_number_of_experts() -> None:
    args = make(Case("bad", tokens=5), "w4a16").args()
    args = args._replace(topk_ids=torch.zeros(5, 9, dtype=torch.int64), topk_weights=torch.zeros(5, 9))
    with pytest.raises(ValueError, match="top_k=9 must be between 1 and the number of experts E=8"):
        fused_experts(*args)


def test_int8_activations_take_no_zero_points() -> None:
    args = make(replace(ZERO_CASE, zero=False), "w4a8").args()
    assert args.w13_scale is not None
    args = args._replace(w13_zero=args.w13_scale[:, :-1].contiguous(), w2_zero=args.w2_scale)
    with pytest.raises(NotImplementedError, match="zero points"):
        fused_experts(*args)


def test_fake_checks_as_the_operator_does() -> None:
    args = make(Case("fake", tokens=5), "w4a16").args()
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
    with mode, pytest.raises(ValueError, match="expected bfloat16"):
        fused_experts(fakes[0].float(), *fakes[1:])


def test_backward_says_that_there_is_none() -> None:
    problem = make(Case("backward", tokens=3), "w4a16")
    hidden = problem.hidden_states.float().requires_grad_()
    out = FusedExperts(problem.packed)(hidden, problem.topk_ids, problem.topk_weights)
    with pytest.raises(NotImplementedError, match=r"fused_experts is for inference only .*: .*no_grad"):
        out.sum().backward()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(scheme: str, dtype: torch.dtype) -> None:
    problem = make(Case("autocast", tokens=7, bias=True), scheme)
    module, args = FusedExperts(problem.packed), (problem.hidden_states, problem.topk_ids, problem.topk_weights)
    expected = module(*args)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(module(*args), expected)


@pytest.mark.parametrize("group_size", [32.0, "32", True, None])
def test_group_sizes_that_are_no_integers(group_size: Any) -> None:
    message = re.escape(f"group_size={group_size!r} is a {type(group_size).__name__}, expected an int: use 32")
    with pytest.raises(ValueError, match=message):
        pack_experts(torch.randn(2, 256, 128), torch.randn(2, 128, 128), group_size=group_size)


@pytest.mark.parametrize("activation", ["gelu", "", None, []])
def test_a_module_of_an_unknown_activation(activation: Any) -> None:
    packed = make(Case("activation", tokens=1), "w4a16").packed
    with pytest.raises(ValueError, match="is not supported: use one of silu, swiglu_oai"):
        FusedExperts(packed, activation=activation)
