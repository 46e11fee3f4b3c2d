"""Compares the static cache and its mask with transformers' generation, and checks the exported programs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from executorch_moe.backends.runtime import loader as runtime
from executorch_moe.export.build import attention_of
from executorch_moe.export.checkpoint.structure import structure_of
from executorch_moe.export.checkpoint.whole import load_model
from executorch_moe.export.models.causal_lm import CausalLM, GreedyLM, SamplingLM, check_positions, export_methods
from executorch_moe.export.models.pretrained import resolve
from executorch_moe.export.models.sampling import Sampler
from executorch_moe.export.options import Target
from executorch_moe.export.quantize.experts import quantize_experts_

from ..conftest import MAX_CONTEXT, eager_greedy, eager_model
from ..families import by_name, tokens

TEXT = list(b"The import statement combines two operations")


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return eager_model("w4a16", "cpu")


def run(model: CausalLM, ids: list[int], position: int) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids]), torch.arange(position, position + len(ids)))


@pytest.mark.transformers
def test_same_tokens_as_transformers(model: CausalLM) -> None:
    ids = torch.tensor([TEXT])
    expected = model.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=48, do_sample=False)
    assert eager_greedy(model, TEXT, 48)[: expected.shape[1] - len(TEXT)] == expected[0, len(TEXT) :].tolist()


def test_prefill_equals_token_by_token(model: CausalLM) -> None:
    model.reset()
    at_once = run(model, TEXT, 0)
    model.reset()
    for position, token in enumerate(TEXT):
        one_by_one = run(model, [token], position)
    # fp32 sums in another order may change how the experts' input is rounded to bf16.
    torch.testing.assert_close(at_once, one_by_one, rtol=0, atol=0.05)


@pytest.mark.parametrize("chunks", [(20, 24), (1, 43), (43, 1), (7, 7, 7, 23)])
def test_a_prompt_in_chunks_leaves_the_same_cache_and_logits(model: CausalLM, chunks: tuple[int, ...]) -> None:
    model.reset()
    at_once, cache = run(model, TEXT, 0), {}
    for name, buffer in model.kv_cache.named_buffers():
        cache[name] = buffer.clone()
    model.reset()
    start = 0
    for size in chunks:
        in_chunks = run(model, TEXT[start : start + size], start)
        start += size
    assert start == len(TEXT)
    torch.testing.assert_close(in_chunks, at_once, rtol=0, atol=0.05)
    for name, buffer in model.kv_cache.named_buffers():
        torch.testing.assert_close(buffer, cache[name], rtol=0, atol=0.05, msg=name)


def test_the_model_that_picks_gives_the_sampled_token_of_the_logits(model: CausalLM) -> None:
    picking = SamplingLM(model.model, MAX_CONTEXT)
    ids, positions = torch.tensor([TEXT]), torch.arange(len(TEXT))
    for sampler in (Sampler(), Sampler(0.8, 3), Sampler(1.5, 4, 0.7)):
        picking.reset()
        model.reset()
        with torch.no_grad():
            token = picking(ids, positions, *sampler.inputs(torch.device("cpu")))
            assert token.shape == (1, 1) and int(token) == sampler(model(ids, positions), len(TEXT))
    likeliest = GreedyLM(model.model, MAX_CONTEXT)
    with torch.no_grad():
        assert likeliest(ids, positions).tolist() == [[int(run(model, TEXT, 0).argmax())]]


def test_logits_are_those_of_the_last_position(model: CausalLM) -> None:
    model.reset()
    logits = run(model, TEXT, 0)
    assert logits.shape == (1, model.model.config.vocab_size) and logits.dtype == torch.float32
    with torch.no_grad():
        every = model.model(input_ids=torch.tensor([TEXT]), use_cache=False).logits
    torch.testing.assert_close(logits, every[:, -1], rtol=0, atol=0.05)


def test_positions_beyond_the_text_are_never_seen(model: CausalLM) -> None:
    model.reset()
    run(model, TEXT, 0)
    clean = run(model, TEXT[:1], len(TEXT))
    for buffer in model.kv_cache.buffers():
        buffer[:, :, len(TEXT) + 1 :] = 1e4  # as after an earlier, longer text
    assert torch.equal(run(model, TEXT[:1], len(TEXT)), clean)
    model.reset()
    for buffer in model.kv_cache.buffers():
        buffer[:, :, len(TEXT) :] = 1e4
    run(model, TEXT, 0)
    assert torch.equal(run(model, TEXT[:1], len(TEXT)), clean)


def test_every_earlier_position_is_seen(model: CausalLM) -> None:
    model.reset()
    run(model, TEXT, 0)
    clean = run(model, TEXT[:1], len(TEXT))
    model.kv_cache.value_0[:, :, 0] += 10.0
    assert not torch.allclose(run(model, TEXT[:1], len(TEXT)), clean)


def test_exported_programs(model: CausalLM) -> None:
    model.reset()
    programs = export_methods(model)
    assert set(programs) == {"prefill", "decode"}
    states = []
    for program in programs.values():
        targets = [str(node.target) for node in program.graph.nodes]
        assert targets.count("executorch_moe.fused_experts.default") == 2
        states.append(set(program.state_dict))
    assert states[0] == states[1]
    assert {"kv_cache.key_0", "kv_cache.value_1"} <= states[0]
    # The length is a symbol with the documented range, not that of the example.
    (bounds,) = programs["prefill"].range_constraints.values()
    assert (bounds.lower, bounds.upper) == (1, MAX_CONTEXT)
    prefill = programs["prefill"].module()
    for length in (1, 2, 3, 40, MAX_CONTEXT):
        ids, positions = torch.randint(32, 122, (1, length)), torch.arange(length)
        with torch.no_grad():
            torch.testing.assert_close(prefill(ids, positions), model(ids, positions))


@pytest.mark.parametrize("max_context", [0, 7, 513, -1])
def test_context_out_of_range(max_context: int) -> None:
    inner = quantize_experts_(load_model(resolve("tiny"), torch.float32))
    with pytest.raises(ValueError, match=f"max_context={max_context} must be between 8 and .*=512"):
        CausalLM(inner, max_context)


WINDOWS = {
    "mixtral": {"sliding_window": 5},
    "qwen3_moe": {"sliding_window": 5, "use_sliding_window": True},
    # sliding windows in some layers; the prompt is longer than a window, and a chunk of it is shorter
    "qwen2_moe": {"sliding_window": 5, "use_sliding_window": True, "num_hidden_layers": 2, "max_window_layers": 9},
    "gpt_oss": {"sliding_window": 5, "num_hidden_layers": 2},  # with attention sinks
}


CHUNKS = [(12, 1, 1, 1), (3, 9, 1, 2)]


def check_chunks(inner: torch.nn.Module, ids: torch.Tensor, chunks: tuple[int, ...]) -> torch.Tensor:
    """Asserts that logits after each chunk equal those of the unmodified model; returns the last."""
    expected = inner(input_ids=ids, use_cache=False).logits[0]
    model, start = CausalLM(inner, 24), 0
    for size in chunks:
        end = start + size
        logits = model(ids[:, start:end], torch.arange(start, end))
        torch.testing.assert_close(logits[0], expected[end - 1], rtol=1e-4, atol=1e-4)
        start = end
    return expected[-1]


@pytest.mark.transformers
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("target", ["cpu", "sm_90"])
@torch.no_grad()
def test_latent_attention_keeps_latents(target: str, chunks: tuple[int, ...]) -> None:
    inner: Any = by_name("deepseek_v3").model("eager")
    inner.set_attn_implementation(attention_of(Target(target, "bf16"), structure_of(inner)))
    check_chunks(inner, tokens(sum(chunks)), chunks)
    cache = CausalLM(inner, 24).kv_cache
    assert cache.key_0.shape == (1, 1, 24, 32) and cache.value_0.shape == (1, 1, 24, 16)


@pytest.mark.transformers
@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("chunks", CHUNKS)
@torch.no_grad()
def test_a_sliding_window_is_that_of_transformers(name: str, chunks: tuple[int, ...]) -> None:
    family = by_name(name)
    family = dataclasses.replace(family, options=family.options | WINDOWS[name])
    inner: Any = family.model("eager")
    inner.set_attn_implementation(attention_of(Target("cpu", "fp32"), structure_of(inner)))
    ids = tokens(sum(chunks))
    expected = check_chunks(inner, ids, chunks)
    # The window matters: a wider one gives other logits.
    inner.config.sliding_window = 24
    wider = CausalLM(inner, 24)(ids, torch.arange(len(ids[0])))
    assert not torch.allclose(wider[0], expected, rtol=1e-4, atol=1e-4)


def test_other_kinds_of_attention_are_refused() -> None:
    inner = load_model(resolve("tiny"), torch.float32)
    inner.config.layer_types = ["chunked_attention", "full_attention"]
    with pytest.raises(NotImplementedError, match=r"chunked_attention are not .* full_attention or sliding_attention"):
        CausalLM(inner, 64)


@pytest.mark.parametrize("positions", [[-1], [3, 4, -2], [2**40]])
def test_positions_outside_the_cache(positions: list[int]) -> None:
    with pytest.raises(ValueError, match=r"cache_position has -?\d+, expected positions from 0 to 15: count"):
        check_positions(torch.tensor(positions), 16)
    with pytest.raises(ValueError, match=r"method 'decode' got position -?\d+, but its cache has positions 0 to 15"):
        runtime.check_positions(torch.tensor(positions), 16, "decode")
    assert check_positions(torch.tensor([], dtype=torch.int64), 16) is None
    for check in (check_positions, lambda *args: runtime.check_positions(*args, "decode")):
        check(torch.tensor([0, 15]), 16)


def test_the_model_refuses_positions_outside_its_cache(model: CausalLM) -> None:
    model.reset()
    for position in (-1, MAX_CONTEXT):
        with pytest.raises(ValueError, match=f"cache_position has {position}, expected positions from 0"):
            run(model, [5], position)
    assert not any(buffer.any() for buffer in model.kv_cache.buffers())
