"""On a GPU: CUDA graphs, picking, dense layers, other experts and the profile, each in a whole exported model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from executorch_moe.backends.cuda import placeholders
from executorch_moe.backends.runtime import load
from executorch_moe.export.benchmark import benchmark_model
from executorch_moe.export.build import build_synthetic, load_whole, quantize_dense
from executorch_moe.export.causal_lm import CausalLM
from executorch_moe.export.generation import TextGenerator, synthetic_weights
from executorch_moe.export.options import ExportOptions
from executorch_moe.export.pipeline import export_model
from executorch_moe.export.pretrained import resolve
from executorch_moe.export.quantize import quantize_experts_
from executorch_moe.export.sampling import Sampler

pytestmark = pytest.mark.gpu
HOST = "delegate-host"
TEXT = list(b"The import statement combines two operations")


@pytest.fixture(scope="session")
def logits_of(made_once: Callable[[str, Callable[[Path], None]], Path]) -> Callable[..., torch.Tensor]:
    """logits_of(**choices) -> logits of the tiny model after TEXT and after one token more, fp32 [2, V]."""
    stock = ExportOptions("tiny", Path("unused.pte"), "cuda", group_size=32, max_context=128, output="logits")

    def get(**choices: Any) -> torch.Tensor:
        options = dataclasses.replace(stock, **choices)
        # A choice that is the default needs no export of its own.
        chosen = [f"{key}={value}" for key, value in sorted(choices.items()) if value != getattr(stock, key)]

        def make(folder: Path) -> None:
            export_model(dataclasses.replace(options, out=folder / "tiny.pte"))

        program = load(made_once("-".join(["logits", *chosen]), make) / "tiny.pte", runtime=HOST)
        first = program.run("prefill", torch.tensor([TEXT]), torch.arange(len(TEXT)))[0]
        return torch.cat((first, program.run("decode", torch.tensor([[32]]), torch.tensor([len(TEXT)]))[0]))

    return get


@torch.no_grad()
def eager(**choices: Any) -> torch.Tensor:
    """The same in PyTorch."""
    options = ExportOptions("tiny", Path("unused.pte"), "cuda", "w4a16", 32, 128, **choices)
    model = quantize_experts_(load_whole(options, resolve("tiny")), "w4a16", 32)
    quantize_dense(model, options, "cuda")
    module = CausalLM(model.cuda(), 128)
    first = module(torch.tensor([TEXT]).cuda(), torch.arange(len(TEXT)).cuda())
    return torch.cat((first, module(torch.tensor([[32]]).cuda(), torch.tensor([len(TEXT)]).cuda())))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("dense", ["none", "int8", "int4"])
def test_dense_layers_equal_eager_within_rounding(dense: str, logits_of: Callable[..., torch.Tensor]) -> None:
    choices: dict[str, Any] = {"dense": dense, "embedding": "none" if dense == "none" else "int8"}
    assert distance(logits_of(**choices), eager(**choices)) < 0.02


def test_both_schedules_give_the_same_bits(logits_of: Callable[..., torch.Tensor]) -> None:
    assert torch.equal(logits_of(experts="ours-tile"), logits_of(experts="ours"))


def test_upstreams_experts_give_the_same_model_within_rounding(logits_of: Callable[..., torch.Tensor]) -> None:
    assert distance(logits_of(experts="upstream"), logits_of(experts="ours")) < 0.03


@torch.no_grad()
def test_an_artifact_without_weights_makes_them_on_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placeholders, "LEAST_BYTES", 1024)
    options = ExportOptions(
        "synthetic:tiny", tmp_path / "x.pte", "cuda", max_context=64, output="logits", dense="int8", thin=True
    )
    export_model(options)
    assert options.out.with_suffix(".ptd").stat().st_size < 100_000
    program = load(options.out, runtime=HOST, make_weights=synthetic_weights)
    model = build_synthetic(options, "cuda", "bf16", program.device).to(program.device)
    module, ids, positions = CausalLM(model, 64), torch.arange(20)[None].cuda(), torch.arange(20).cuda()
    assert distance(program.run("prefill", ids, positions)[0], module(ids, positions)) < 0.02


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(0.8, 3, 0.9)])
def test_a_graph_gives_the_same_text(sampler: Sampler, exported: Callable[..., Path]) -> None:
    pte = exported("w4a16", "cuda")
    plain, graphed = TextGenerator.load(pte, HOST), TextGenerator.load(pte, HOST, cuda_graph=True)
    for prompt in ("The import statement", "x", "class Point:"):
        ids = plain.encode(prompt)
        expected = plain.generate(ids, 48, sampler, ignore_eos=True).tokens
        assert graphed.generate(ids, 48, sampler, ignore_eos=True).tokens == expected, prompt
        # Looked at one by one, and with the cache written by chunks.
        seen: list[int] = []
        graphed.prefill_chunk = 3
        graphed.generate(ids, 48, sampler, ignore_eos=True, on_token=seen.append)
        graphed.prefill_chunk = None
        assert len(seen) == 48


def test_a_profile_names_every_part(exported: Callable[..., Path]) -> None:
    pte = exported("w4a16", "cuda")
    for cuda_graph in (False, True):
        generator = TextGenerator.load(pte, HOST, cuda_graph=cuda_graph)
        result = benchmark_model(pte, [32], 16, 2, generator=generator, cuda_graph=cuda_graph)
        result.profile_decode(generator, 32, 16)
        assert result.breakdown is not None
        launches = {share.group: share.launches for share in result.breakdown.shares}
        for group in ("experts GEMM1", "experts GEMM2", "routing", "attention", "dense", "sampling"):
            assert launches.get(group, 0) >= 1, (cuda_graph, group, result.breakdown.longest)
        assert launches["experts GEMM1"] == pytest.approx(launches["experts GEMM2"])
        assert 0 < result.breakdown.accounted < 1 and result.breakdown.gap_us >= 0
        assert result.peak_bytes["gpu"] > 0
