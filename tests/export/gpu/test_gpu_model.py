"""On a GPU: CUDA graphs, sampling, other experts and the profile, each in a whole exported model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from executorch_moe.backends.cuda import placeholders
from executorch_moe.backends.runtime.loader import load
from executorch_moe.export.bench.model import benchmark_model
from executorch_moe.export.build import build_synthetic
from executorch_moe.export.generate.generator import TextGenerator, synthetic_weights
from executorch_moe.export.models.causal_lm import CausalLM
from executorch_moe.export.models.sampling import Sampler
from executorch_moe.export.options import Context, Dense, ExportOptions, Target
from executorch_moe.export.pipeline import export_model

from ..matrix import Cell

pytestmark = pytest.mark.gpu
HOST = "delegate-host"
TEXT = list(b"The import statement combines two operations")


@pytest.fixture(scope="session")
def logits_of(made_once: Callable[[str, Callable[[Path], None]], Path]) -> Callable[[str], torch.Tensor]:
    """logits_of(experts) -> logits of the tiny model after TEXT and after one more token, fp32 [2, V].

    The exports name this GPU: Inductor then chooses GEMMs by rules. On the GPU it times candidates, and two exports may
    get different ones, whose sums differ in the last bits.
    """
    cell = Cell("w4a16", "none")
    target = "sm_{}{}".format(*torch.cuda.get_device_capability())

    def get(experts: str) -> torch.Tensor:
        def make(folder: Path) -> None:
            options = cell.options(target, folder)
            chosen = dataclasses.replace(options.experts, implementation=experts)
            export_model(dataclasses.replace(options, experts=chosen))

        program = load(cell.file(made_once(f"experts-{experts}", make)), runtime=HOST)
        first = program.run("prefill", torch.tensor([TEXT]), torch.arange(len(TEXT)))[0]
        return torch.cat((first, program.run("decode", torch.tensor([[32]]), torch.tensor([len(TEXT)]))[0]))

    return get


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_both_schedules_give_the_same_bits(logits_of: Callable[[str], torch.Tensor]) -> None:
    assert torch.equal(logits_of("ours-tile"), logits_of("ours"))


def test_upstreams_experts_give_the_same_model_within_rounding(logits_of: Callable[[str], torch.Tensor]) -> None:
    assert distance(logits_of("upstream"), logits_of("ours")) < 0.03


@torch.no_grad()
def test_an_artifact_without_weights_makes_them_on_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placeholders, "LEAST_BYTES", 1024)
    options = ExportOptions(
        "synthetic:tiny",
        tmp_path / "x.pte",
        dense=Dense("int8"),
        target=Target("cuda"),
        context=Context(64, "logits"),
        placeholder_weights=True,
    )
    export_model(options)
    assert options.pte.with_suffix(".ptd").stat().st_size < 100_000
    program = load(options.pte, runtime=HOST, make_weights=synthetic_weights)
    model = build_synthetic(options, program.device).to(program.device)
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
        # Tokens read one by one, and the cache written in chunks.
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
        result.profile_prompts(generator, [32, 8])
        assert [prompt.tokens for prompt in result.prompts] == [32, 8]
        for prompt in result.prompts:
            parts = {part.name: part for part in prompt.parts}
            assert parts["experts GEMM1"].launches == parts["experts GEMM2"].launches
            for name in ("qkv projection", "output projection", "attention", "experts GEMM1", "lm_head"):
                assert parts[name].floor_us, (name, [(k.part, k.kernel) for k in prompt.kernels])
            assert prompt.gap_us >= 0 and sum(part.launches for part in prompt.parts) == sum(
                kernel.launches for kernel in prompt.kernels
            )
        assert 0 < result.breakdown.accounted < 1 and result.breakdown.gap_us >= 0
        assert result.peak_bytes["gpu"] > 0
