"""The exported model and the eager quantized model give the same greedy tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from executorch_moe.export.generate.generator import TextGenerator
from executorch_moe.export.models.sampling import Sampler

from ..conftest import eager_greedy, eager_model

PROMPTS = (
    "The import statement",
    "class Point:\n    def __init__(self",
    "x",  # one token, so that the first call is decode
)
NEW_TOKENS = 64


def compare(pte: Path, scheme: str, target: str, runtime: str, dtype: str = "auto") -> str:
    """Asserts equal tokens for every prompt; returns the name of the runtime."""
    generator = TextGenerator.load(pte, runtime=runtime)
    model = eager_model(scheme, target, dtype)
    for prompt in PROMPTS:
        ids = generator.encode(prompt)
        result = generator.generate(ids, NEW_TOKENS, ignore_eos=True)
        assert result.tokens == eager_greedy(model, ids, NEW_TOKENS), f"prompt {prompt!r}"
        assert len(result.tokens) == NEW_TOKENS
    return generator.program.runtime


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["w4a16", pytest.param("w4a8", marks=pytest.mark.exhaustive)])
def test_tokens_of_the_cpu_runtime_equal_eager(scheme: str, exported: Callable[[str, str], Path]) -> None:
    assert compare(exported(scheme, "cpu"), scheme, "cpu", "auto") == "executorch (CPU)"


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["w4a16", "w4a8", "bf16"])
def test_tokens_of_the_delegate_host_equal_eager(scheme: str, exported: Callable[..., Path]) -> None:
    """Dense layers are fp32, so that cuBLAS and Inductor's kernels agree; experts are as in any export."""
    ran = compare(exported(scheme, "cuda", "fp32"), scheme, "cuda", "delegate-host", "fp32")
    assert ran == "delegate host (PyTorch AOTInductor)"


@pytest.mark.gpu
def test_prefill_takes_one_token_on_the_gpu(exported: Callable[..., Path]) -> None:
    """ExecuTorch's runners give a prompt of one token to prefill; its token is that of decode."""
    generator = TextGenerator.load(exported("w4a16", "cuda", "fp32"), runtime="delegate-host")
    program = generator.program
    settings = Sampler().inputs(program.device)
    for token in generator.encode("The import"):
        ids = torch.tensor([[token]], device=program.device)
        picked = []
        for method in ("prefill", "decode"):
            program.reset()
            (first,) = program.run(method, ids, torch.tensor([0], device=program.device), *settings)
            (second,) = program.run(method, first, torch.tensor([1], device=program.device), *settings)
            picked.append((int(first), int(second)))
        assert picked[0] == picked[1]


@pytest.mark.gpu
@torch.no_grad()
def test_bf16_tokens_are_eagers_choice_within_rounding(exported: Callable[..., Path]) -> None:
    """In bf16 rounding differs, and near-ties may fall either way: each token must have nearly eager's best logit.

    Logits between 8 and 16 are 1/16 apart in bf16; the bound is four such steps.
    """
    generator = TextGenerator.load(exported("w4a16", "cuda"), runtime="delegate-host")
    model = eager_model("w4a16", "cuda")
    worst = 0.0
    for prompt in PROMPTS:
        ids = generator.encode(prompt)
        tokens = generator.generate(ids, NEW_TOKENS, ignore_eos=True).tokens
        model.reset()
        fed = 0
        for count in range(len(tokens)):
            text = [*ids, *tokens[:count]]
            logits = model(torch.tensor([text[fed:]], device="cuda"), torch.arange(fed, len(text), device="cuda"))[0]
            fed = len(text)
            worst = max(worst, float(logits.max() - logits[tokens[count]]))
    print(f"largest gap to eager's own choice: {worst:.4f}")
    assert worst <= 0.25


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_a_prompt_in_chunks_gives_the_same_text(chunk: int, exported: Callable[[str, str], Path]) -> None:
    pte = exported("w4a16", "cpu")
    at_once, in_chunks = TextGenerator.load(pte), TextGenerator.load(pte, prefill_chunk=chunk)
    ids = at_once.encode(PROMPTS[0])
    expected = at_once.generate(ids, 24, ignore_eos=True).tokens
    assert in_chunks.generate(ids, 24, ignore_eos=True).tokens == expected


@pytest.mark.slow
def test_sampled_text_is_that_of_the_eager_model(exported: Callable[[str, str], Path]) -> None:
    sampler = Sampler(0.9, 5, 0.95)
    generator, model = TextGenerator.load(exported("w4a16", "cpu")), eager_model("w4a16", "cpu")
    ids = generator.encode(PROMPTS[0])
    tokens = generator.generate(ids, 24, sampler, ignore_eos=True).tokens
    fed, text = 0, list(ids)
    while len(text) < len(ids) + 24:
        with torch.no_grad():
            logits = model(torch.tensor([text[fed:]]), torch.arange(fed, len(text)))
        fed = len(text)
        text.append(sampler(logits, fed))
    assert tokens == text[len(ids) :]
    assert tokens != generator.generate(ids, 24, Sampler(0.9, 6, 0.95), ignore_eos=True).tokens


@pytest.mark.slow
def test_a_second_run_starts_from_an_empty_cache(exported: Callable[[str, str], Path]) -> None:
    generator = TextGenerator.load(exported("w4a16", "cpu"))
    long = generator.encode("The import statement combines two operations; it searches for the named module")
    short = generator.encode("Lists")
    first = generator.generate(short, 16, ignore_eos=True).tokens
    generator.generate(long, 32, ignore_eos=True)
    assert generator.generate(short, 16, ignore_eos=True).tokens == first


@pytest.mark.slow
def test_the_whole_cache_can_be_used(exported: Callable[[str, str], Path]) -> None:
    generator = TextGenerator.load(exported("w4a16", "cpu"))
    context = generator.max_context
    ids = torch.randint(97, 122, (context,)).tolist()
    # Up to the last position and one token more: after the longest prompt, and after a short one.
    assert len(generator.generate(ids, 1).tokens) == 1
    assert len(generator.generate(ids[:2], context - 1, ignore_eos=True).tokens) == context - 1
