"""Choices of an export that exclude each other, and what the choices change in a model."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from executorch_moe.backends.fusion.report import FusionReport
from executorch_moe.export.build import attention_of, forced_schedule, load_whole, use_upstream_
from executorch_moe.export.check import check_export
from executorch_moe.export.checkpoint.whole import load_model
from executorch_moe.export.generate.generator import synthetic_weights
from executorch_moe.export.models import synthetic
from executorch_moe.export.models.attention import grouped_attention, merge_attention_
from executorch_moe.export.models.causal_lm import CausalLM
from executorch_moe.export.models.linears import Int8Linear
from executorch_moe.export.models.pretrained import resolve
from executorch_moe.export.models.router import TopKFirstRouter, replace_routers_
from executorch_moe.export.models.upstream_experts import UpstreamMoE, pack
from executorch_moe.export.options import IMPLEMENTATIONS, Context, Dense, Experts, ExportOptions, Target
from executorch_moe.export.quantize.dense import quantize_dense_
from executorch_moe.export.quantize.experts import quantize_experts_
from executorch_moe.export.report.metadata import MADE_FROM, made_from
from executorch_moe.export.report.summary import ExportSummary
from executorch_moe.kernels import pack_experts
from executorch_moe.kernels.arguments import ExpertArguments
from executorch_moe.kernels.op import _OPTIONS
from executorch_moe.kernels.packing.experts import unpack_experts


def on_cpu(model: str = "tiny", **choices: Any) -> ExportOptions:
    return ExportOptions(model, target=Target("cpu"), **choices)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Context(output="text"), "output='text' is unknown: use one of token, greedy, logits"),
        (lambda: Experts(implementation="theirs"), "experts='theirs' is unknown: use one of ours, ours-tile, upstream"),
        (lambda: Dense("int2"), "dense='int2' is unknown: use one of none, int8, int4"),
        (lambda: Dense(lm_head="fp8"), "lm_head='fp8' is unknown: use one of none, int8, int4"),
        (lambda: Dense(embedding="int4"), "embedding='int4' is unknown: use one of none, int8"),
        (lambda: on_cpu(dense=Dense(lm_head="int8")), "lm_head='int8' is for CUDA targets"),
        (lambda: on_cpu(dense=Dense(embedding="int8")), "embedding='int8' is for CUDA targets"),
        (lambda: check_export(on_cpu("synthetic:tiny")), "--check is for models in folders"),
        (lambda: on_cpu(experts=Experts(implementation="upstream")), "experts='upstream' is for CUDA targets"),
        (lambda: on_cpu(experts=Experts(implementation="ours-tile")), "experts='ours-tile' is for CUDA targets"),
        (lambda: on_cpu(layers=4), "layers=4 is for synthetic models, 'tiny' has its own"),
        (lambda: on_cpu("synthetic:huge"), "model='synthetic:huge' is unknown"),
        (
            lambda: Experts("bf16", implementation="upstream"),
            "does not support scheme='bf16': use one of w4a16, w4a8",
        ),
        (lambda: Experts(algorithm="hqq", implementation="upstream"), "does not support algorithm='hqq': use minmax"),
        (lambda: Target("cpu", kernel_configs=Path("c.json")), "kernel_configs='c.json' is for a GPU by name"),
        (lambda: Target("cpu", "fp8"), "dtype='fp8' is unknown: use one of bf16, fp32, auto"),
        (lambda: on_cpu().pte, "out is missing: name the .pte to write"),
    ],
)
def test_choices_that_exclude_each_other(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_upstreams_packing_holds_the_same_numbers_as_ours() -> None:
    gate_up, down = torch.randn(3, 256, 128), torch.randn(3, 128, 128)
    ours = unpack_experts(pack_experts(gate_up, down, group_size=32))
    weights = pack(gate_up, down, 32)
    for (codes, scale), expected in zip(
        ((weights.w13, weights.w13_scale), (weights.w2, weights.w2_scale)), ours, strict=True
    ):
        byte = codes.view(torch.uint8).int()
        values = torch.stack((byte & 0xF, byte >> 4), -1).flatten(-2) - 8
        assert torch.equal((values.unflatten(-1, (-1, 32)) * scale.float()[..., None]).flatten(-2), expected)


def test_upstreams_experts_take_the_place_of_the_models() -> None:
    model = use_upstream_(load_model(resolve("tiny"), torch.bfloat16), "w4a16", 32)
    found: list[Any] = [module for module in model.modules() if isinstance(module, UpstreamMoE)]
    assert len(found) == 2
    assert (found[0].num_experts, found[0].hidden_size, found[0].intermediate_size) == (8, 128, 64)
    # Nothing there for our partitioners to take for experts: neither name nor two 3-D float weights.
    assert not type(found[0]).__name__.endswith("Experts")
    assert not [t for t in found[0].state_dict().values() if t.dim() == 3 and t.is_floating_point()]
    assert found[0].decode is not found[0].prefill


def test_only_the_schedule_is_forced_and_only_within() -> None:
    for implementation in IMPLEMENTATIONS:
        with forced_schedule(Experts(implementation=implementation)):
            assert _OPTIONS.get().persistent == (implementation != "ours-tile")
        assert _OPTIONS.get().persistent


def test_a_forced_schedule_reaches_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels are asked for, without a GPU: the operator traced on fake CUDA tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from executorch_moe.kernels import op

    seen: list[bool] = []

    def run(arguments: ExpertArguments, *, options: Any) -> torch.Tensor:
        seen.append(options.persistent)
        return torch.empty_like(arguments.hidden_states)

    monkeypatch.setattr(op, "run_fused_experts", run)
    packed = pack_experts(torch.randn(2, 256, 128), torch.randn(2, 128, 128), group_size=32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        tensors = [None if t is None else torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in
                   packed.tensors().values()]  # fmt: skip
        x = torch.empty(4, 128, dtype=torch.bfloat16, device="cuda")
        ids, weights = torch.zeros(4, 1, dtype=torch.int64, device="cuda"), torch.ones(4, 1, device="cuda")
        for implementation in ("ours", "ours-tile"):
            with forced_schedule(Experts(implementation=implementation)):
                op.fused_experts._init_fn(x, ids, weights, *tensors, "w4a16", "silu", 32)  # type: ignore[attr-defined]
    assert seen == [True, False]


def test_grouped_attention_equals_transformers_own() -> None:
    ids, tokens = torch.randint(32, 122, (1, 12)), torch.arange(12)
    model = quantize_experts_(load_model(resolve("tiny"), torch.float32), "w4a16", 32)
    with torch.no_grad():
        expected = CausalLM(model, 32)(ids, tokens)
        assert attention_of(Target("cuda", "fp32")) == "eager"
        for target in (Target("cpu", "fp32"), Target("cuda", "bf16")):
            model.set_attn_implementation(attention_of(target))  # type: ignore[operator]
            module = CausalLM(model, 32)
            torch.testing.assert_close(module(ids, tokens), expected)
        program = torch.export.export(module, (ids, tokens), strict=False)
    (attention, *_) = [n for n in program.graph.nodes if "scaled_dot_product" in str(n.target)]
    # Two key/value heads go in as they are, not repeated to the four of the queries.
    assert attention.args[1].meta["val"].shape[1] == 2


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_merged_attention_equals_transformers_own(dtype: torch.dtype, bound: float) -> None:
    model = synthetic.build(synthetic.parse("synthetic:tiny"), group_size=32, dtype=dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.uniform_(0.5, 1.5)
    merged = merge_attention_(copy.deepcopy(model))
    assert not [name for name, _ in merged.named_modules() if name.endswith("k_proj")]
    ids, results = torch.randint(0, 300, (1, 20)), []
    for module in (CausalLM(model, 64), CausalLM(merged, 64)):
        prompt = module(ids, torch.arange(20))
        results.append(torch.cat((prompt, module(ids[:, :1], torch.tensor([20])))))
    assert (results[0] - results[1]).norm() / results[0].norm() < bound
    # Quantized after it was merged: one layer for query, key and value.
    quantize_dense_(merged, "int8")
    assert isinstance(merged.model.layers[0].self_attn.qkv_proj, Int8Linear)  # type: ignore[union-attr, index]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_router_with_top_k_first_chooses_and_weighs_the_same(dtype: torch.dtype) -> None:
    model = synthetic.build(synthetic.parse("synthetic:tiny", 1), group_size=32, dtype=dtype)
    layer = model.model.layers[0]  # type: ignore[union-attr, index]
    before, x = layer.mlp.gate, torch.randn(50, 128).to(dtype)
    after = replace_routers_(layer).mlp.gate  # type: ignore[union-attr]
    assert isinstance(after, TopKFirstRouter) and after.weight is before.weight
    with torch.no_grad():
        (logits, weights, experts), (same_logits, expected, chosen) = after(x), before(x)
    assert torch.equal(experts, chosen) and torch.equal(logits, same_logits)
    assert weights.dtype == torch.float32 and expected.dtype == dtype
    torch.testing.assert_close(weights, expected.float(), rtol=0.008 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    # One that does not renormalize is another function.
    before.norm_topk_prob = False
    layer.mlp.gate = before
    assert replace_routers_(layer).mlp.gate is before  # type: ignore[union-attr]


def test_grouped_attention_masks() -> None:
    q, k = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 5, 8)
    mask = torch.rand(1, 1, 3, 5) > 0.4
    mask[..., 0] = True
    got, _ = grouped_attention(nn.Module(), q, k, k, mask, scaling=0.3)
    scores = (q.unflatten(1, (2, 2)) @ k.transpose(2, 3)[:, :, None] * 0.3).masked_fill(~mask[:, :, None], -torch.inf)
    expected = (scores.softmax(-1) @ k[:, :, None]).flatten(1, 2).transpose(1, 2)
    torch.testing.assert_close(got, expected)


def test_weights_that_are_made_again_are_those_of_the_export(tmp_path: Path) -> None:
    dense, target = Dense("int4", embedding="int8"), Target("sm_90", "bf16")
    options = ExportOptions("synthetic:tiny", tmp_path / "x.pte", dense=dense, target=target, seed=3, layers=1)
    exported = load_whole(options, tmp_path).state_dict()
    # The loader knows the program's constants only.
    constants: Any = SimpleNamespace(constant_names=[MADE_FROM], constant={MADE_FROM: made_from(options)}.get)
    make = synthetic_weights(constants, torch.device("cpu"))
    assert make is not None
    assert len(exported) > 10
    for name, tensor in exported.items():
        made = make(f"model.{name}", tensor.nbytes)
        assert made is not None and torch.equal(made, tensor.contiguous().flatten().view(torch.uint8)), name
    cache = make("kv_cache.key_0", 64)
    assert cache is not None and cache.tolist() == [0] * 64
    assert make("_lifted_tensor_constant3", 8) is None and make("model.model.rotary_emb.inv_freq", 64) is None
    # With placeholder weights, the same tensors have no values; the rotary table has its own.
    empty = load_whole(replace(options, placeholder_weights=True), tmp_path)
    assert {n: (t.shape, t.dtype) for n, t in empty.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in exported.items()
    }
    table = dict(empty.named_buffers())["model.rotary_emb.inv_freq"]
    assert torch.equal(table, dict(load_whole(options, tmp_path).named_buffers())["model.rotary_emb.inv_freq"])


@pytest.mark.parametrize("experts", ["ours", "upstream"])
def test_weights_are_made_from_what_an_artifact_says(tmp_path: Path, experts: str) -> None:
    options = ExportOptions(
        "synthetic:tiny",
        tmp_path / "x.pte",
        experts=Experts(implementation=experts),
        dense=Dense("int8", embedding="int8"),
        target=Target("sm_90"),
        context=Context(16),
        layers=1,
        placeholder_weights=True,
    )
    program: Any = SimpleNamespace(constant_names=[MADE_FROM], constant=lambda name: made_from(options))
    make = synthetic_weights(program, torch.device("cpu"))
    assert make is not None
    for name, tensor in load_whole(options, tmp_path).state_dict().items():
        made = make(f"model.{name}", tensor.nbytes)
        assert made is not None and made.numel() == tensor.nbytes, name
    program.constant_names = []
    assert synthetic_weights(program, torch.device("cpu")) is None


def test_only_synthetic_models_can_do_without_weights(tmp_path: Path) -> None:
    for model, target in (("tiny", "sm_90"), ("synthetic:tiny", "cpu")):
        with pytest.raises(ValueError, match=f"not for '{model}' on {target}"):
            ExportOptions(model, tmp_path / "x.pte", target=Target(target), placeholder_weights=True)


def test_the_record_of_an_export_has_the_peak_of_its_costliest_step(tmp_path: Path) -> None:
    options = ExportOptions("synthetic:tiny", tmp_path / "x.pte", target=Target("cpu"))
    summary = ExportSummary(options, FusionReport(), 16, 0, peaks={"load": 3, "lower": 7, "write": 5})
    assert json.loads(summary.record())["peak_bytes"]["host"] == 7
