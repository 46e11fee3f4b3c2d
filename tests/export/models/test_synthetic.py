"""Synthetic models: shapes, seeds, and experts that are only generated packed."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from executorch_moe.export.cli.app import app
from executorch_moe.export.models import synthetic
from executorch_moe.export.models.causal_lm import CausalLM
from executorch_moe.export.models.delta_rule import replace_delta_rule_
from executorch_moe.export.models.pretrained import check_cache
from executorch_moe.export.options import Context, ExportOptions, Target
from executorch_moe.export.pipeline import export_model
from executorch_moe.kernels import FusedExperts
from executorch_moe.kernels.measure import timing as kernels_benchmark

TINY = synthetic.parse("synthetic:tiny")


def state(seed: int = 0, layers: int = 2) -> dict[str, Tensor]:
    return synthetic.build(synthetic.parse("synthetic:tiny", layers), group_size=32, seed=seed).state_dict()


def test_the_30b_preset_is_the_published_shape() -> None:
    config = synthetic.parse("synthetic:qwen3-30b-a3b").config()
    expected = {
        "num_hidden_layers": 48, "num_experts": 128, "num_experts_per_tok": 8, "hidden_size": 2048,
        "moe_intermediate_size": 768, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "vocab_size": 151_936, "tie_word_embeddings": False, "norm_topk_prob": True,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected


def test_the_35b_preset_is_the_published_shape() -> None:
    config = synthetic.parse("synthetic:qwen3.5-35b-a3b").config()
    expected = {
        "num_hidden_layers": 40, "num_experts": 256, "num_experts_per_tok": 8, "hidden_size": 2048,
        "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "num_attention_heads": 16,
        "num_key_value_heads": 2, "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "vocab_size": 248_320,
        "tie_word_embeddings": False,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.layer_types == (["linear_attention"] * 3 + ["full_attention"]) * 10
    assert config.rope_parameters["partial_rotary_factor"] == 0.25


RECURRENT = (
    "synthetic:qwen3.5-35b-a3b,hidden=128,experts=8,top_k=2,intermediate=128,shared=128,heads=4,head_dim=32,key_heads=2,"
    "value_heads=4,linear_dim=32,vocabulary=300,context=512"
)


@torch.no_grad()
def test_a_recurrent_model_computes() -> None:
    """Its streams stay of size 1 through all layers, as far as random weights allow, and all experts are packed."""
    model = synthetic.parse(RECURRENT, 4)
    net = synthetic.build(model, group_size=32, dtype=torch.float32, prepare=replace_delta_rule_)
    assert sum(isinstance(module, FusedExperts) for module in net.modules()) == 4
    lm = CausalLM(net, 64)
    logits = torch.cat([lm(torch.tensor([[5, 9, 7]]), torch.arange(3)), lm(torch.tensor([[4]]), torch.tensor([3]))])
    assert 0.3 < logits.std() < 3 and not torch.equal(*logits)
    whole = CausalLM(net, 64)(torch.tensor([[5, 9, 7, 4]]), torch.arange(4))
    torch.testing.assert_close(logits[1:], whole, rtol=0, atol=0.05)
    actual = sum(tensor.nbytes for tensor in synthetic.build(model, group_size=32).state_dict().values())
    assert model.weight_bytes(4 + 16 / 32) == pytest.approx(actual, rel=0.05)


def test_heads_of_a_recurrent_model_must_fit() -> None:
    with pytest.raises(ValueError, match="value_heads=32 must be a multiple of key_heads=5"):
        synthetic.parse("synthetic:qwen3.5-35b-a3b,key_heads=5")


def test_a_context_over_the_model_s_is_refused_before_weights_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("executorch_moe.export.build.build_synthetic", None)
    options = ExportOptions(RECURRENT, tmp_path / "x.pte", target=Target("cpu"), context=Context(513), layers=2)
    with pytest.raises(ValueError, match=r"max_context=513 must be between 8 and the model's .*=512"):
        export_model(options)


def test_fields_and_layers_by_option() -> None:
    model = synthetic.parse("synthetic:qwen3-30b-a3b,experts=64,context=4096", layers=8)
    assert (model.layers, model.experts, model.context, model.hidden) == (8, 64, 4096, 2048)


@pytest.mark.parametrize(
    ("name", "layers", "message"),
    [
        ("synthetic:gpt", None, "use synthetic: and one of qwen3-30b-a3b, tiny"),
        ("synthetic:tiny,depth=3", None, "'depth=3' .* must be FIELD=NUMBER, with one of layers, hidden"),
        ("synthetic:tiny,experts=x", None, "'experts=x' .* must be FIELD=NUMBER"),
        ("synthetic:tiny", 0, "layers=0 of synthetic:tiny must be at least 1"),
        ("synthetic:tiny,top_k=9", None, "top_k=9 must be at most experts=8"),
        ("synthetic:tiny,kv_heads=3", None, "heads=4 must be a multiple of kv_heads=3"),
        ("synthetic:tiny,hidden=100", None, "hidden=100 must be a multiple of 128"),
        ("synthetic:tiny,vocabulary=100", None, "vocabulary=100 must be at least 264"),
    ],
)
def test_shapes_that_cannot_be(name: str, layers: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        synthetic.parse(name, layers)


@pytest.mark.parametrize(
    ("name", "placeholders", "message"),
    [
        ("synthetic:tiny,layers=999999", False, "layers=999999 of tiny is more than can be traced: use at most 1000"),
        ("synthetic:tiny,layers=999999", True, "layers=999999 of tiny is more than can be traced: use at most 1000"),
        (
            "synthetic:tiny,experts=1000000000",
            False,
            r"experts=1000000000 of tiny makes a model of about 55\.8 TB, more",
        ),
        (
            "synthetic:tiny,experts=1000000000",
            True,
            "experts=1000000000 of tiny .* more than any GPU has: use a smaller",
        ),
        ("synthetic:tiny,vocabulary=1000000000000", False, "vocabulary=1000000000000 of tiny makes a model of about"),
        ("synthetic:qwen3-30b-a3b,hidden=12800000", False, "hidden=12800000 of qwen3-30b-a3b makes a model of about"),
        ("synthetic:tiny,head_dim=100000000000", False, "head_dim=100000000000 of tiny makes a model of about"),
    ],
)
def test_models_that_fit_nowhere_are_refused_at_once(
    name: str, placeholders: bool, message: str, tmp_path: Path
) -> None:
    start = time.perf_counter()
    with pytest.raises(ValueError, match=message):
        synthetic.check_room(synthetic.parse(name), "w4a16", 32, tmp_path / "x.pte", placeholder_weights=placeholders)
    if not placeholders:
        with pytest.raises(ValueError, match=message):
            ExportOptions(name, tmp_path / "x.pte", target=Target("cpu"))
    with pytest.raises(ValueError, match=message):
        synthetic.build(synthetic.parse(name), group_size=32, device="meta" if placeholders else "cpu")
    assert time.perf_counter() - start < 1


def test_models_must_fit_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("executorch_moe.export.models.synthetic.total_memory", lambda: 10**12)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=10**9))
    model = synthetic.parse("synthetic:qwen3-30b-a3b")
    with pytest.raises(ValueError, match=rf"about 1\d\.\d+ GB, more than the 1\.00 GB free in {tmp_path}"):
        synthetic.check_room(model, "w4a16", 128, tmp_path / "new" / "x.pte")
    synthetic.check_room(model, "w4a16", 128)


def test_the_estimate_is_near_the_truth() -> None:
    built = synthetic.build(TINY, group_size=32)
    actual = sum(tensor.nbytes for tensor in built.state_dict().values())
    assert TINY.weight_bytes(4 + 16 / 32) == pytest.approx(actual, rel=0.05)


def test_a_cache_that_does_not_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("executorch_moe.export.models.pretrained.total_memory", lambda: 10**9)
    config = synthetic.parse("synthetic:qwen3-30b-a3b").config()
    check_cache(config, 10_000, 2)
    with pytest.raises(
        ValueError, match=r"max_context=40000 needs a KV cache of 3\.93 GB, but .* 1\.00 GB .* at most 101"
    ):
        check_cache(config, 40_000, 2)
    # A layer with a sliding window caches all positions too.
    config.layer_types = ["sliding_attention"] * config.num_hidden_layers
    with pytest.raises(ValueError, match="at most 101"):
        check_cache(config, 40_000, 2)


def test_the_seed_decides_and_layers_do_not_depend_on_their_number() -> None:
    first, again, other, longer = state(), state(), state(seed=1), state(layers=3)
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]), name
        assert torch.equal(tensor, longer[name]), name
        assert not tensor.is_meta
        assert "norm" in name or not torch.equal(tensor, other[name]), name
    assert not torch.equal(first["model.layers.0.mlp.experts.w13"], first["model.layers.1.mlp.experts.w13"])


def test_the_experts_never_exist_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts are generated layer by layer, and no tensor is as large as they would be in bf16."""
    model = synthetic.parse("synthetic:tiny,experts=32", 3)
    as_bf16 = 2 * model.experts * 3 * model.hidden * model.intermediate
    largest = 0
    real = torch.empty

    def empty(*args: object, **kwargs: object) -> Tensor:
        nonlocal largest
        tensor = real(*args, **kwargs)  # type: ignore[call-overload]
        largest = max(largest, 0 if tensor.is_meta else tensor.nbytes)
        return tensor

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(kernels_benchmark.torch, "empty", empty)
    built = synthetic.build(model, group_size=32)
    experts = [module for module in built.modules() if isinstance(module, FusedExperts)]
    assert len(experts) == 3 and not any(parameter.is_meta for parameter in built.parameters())
    assert 0 < largest < as_bf16 / 2


def test_it_computes_something_of_sane_size() -> None:
    model = CausalLM(synthetic.build(TINY, group_size=32, dtype=torch.float32), 64)
    with torch.no_grad():
        logits = model(torch.randint(0, 300, (1, 40)), torch.arange(40))
    assert logits.isfinite().all() and 0.2 < logits.std() < 5


def test_layers_are_prepared_one_by_one_then_the_model() -> None:
    seen: list[str] = []
    synthetic.build(TINY, group_size=32, prepare=lambda module: seen.append(type(module).__name__))
    assert seen == ["Qwen3MoeDecoderLayer", "Qwen3MoeDecoderLayer", "Qwen3MoeForCausalLM"]


def test_group_size_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="hidden size H=128 must be a multiple of group_size=256"):
        synthetic.build(TINY, group_size=256)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_synthetic_model_is_exported_and_runs(tmp_path: Path) -> None:
    pte = str(tmp_path / "synthetic.pte")
    exported = CliRunner().invoke(
        app, ["export", "synthetic:tiny", "-o", pte, "--target", "cpu", "--max-context", "32"]
    )
    assert exported.exit_code == 0, exported.output
    generated = CliRunner().invoke(app, ["generate", pte, "--prompt", "The import", "--max-new-tokens", "4"])
    assert generated.exit_code == 0 and generated.stdout.startswith("The import"), generated.output
