"""The committed checkpoint: its size, its tokenizer, and that it has learnt the text it was trained on."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoTokenizer

from executorch_moe.examples.tiny import train
from executorch_moe.export.checkpoint.whole import load_model
from executorch_moe.export.models.pretrained import resolve


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return load_model(resolve("tiny"), torch.float32)


def test_shape_is_the_one_that_the_script_makes(model: torch.nn.Module) -> None:
    made = train.make_config()
    for name in ("hidden_size", "moe_intermediate_size", "num_hidden_layers", "num_experts", "num_experts_per_tok"):
        assert getattr(model.config, name) == getattr(made, name)
    assert sum(parameter.numel() for parameter in model.parameters()) == 528_128
    weights = resolve("tiny") / "model.safetensors"
    assert weights.stat().st_size < 2_000_000


def test_it_has_learnt_the_text(model: torch.nn.Module) -> None:
    data = train.corpus()
    starts = torch.linspace(0, data.numel() - 513, 16).long().tolist()
    batch = torch.stack([data[start : start + 513] for start in starts])
    with torch.no_grad():
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    # Training ended at 0.94 nats a byte; other versions of Python ship a slightly different text. Untrained: 5.6.
    assert loss < 1.1


def test_every_expert_is_used(model: torch.nn.Module) -> None:
    chosen: list[torch.Tensor] = []
    hooks = [
        layer.mlp.experts.register_forward_pre_hook(lambda _, args: chosen.append(args[1]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(input_ids=train.corpus()[None, :4096].reshape(8, 512), use_cache=False)
    for hook in hooks:
        hook.remove()
    for ids in chosen:
        counts = torch.bincount(ids.flatten(), minlength=8)
        assert counts.min() > 0.02 * counts.sum()


@pytest.mark.parametrize("text", ["The import statement", "naïve 😀\n\ttabs  spaces", "", "中文 ÿ \x00 \x7f"])
def test_the_tokenizer_gives_bytes_and_gives_them_back(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(resolve("tiny"), local_files_only=True)
    ids = tokenizer(text).input_ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_special_tokens() -> None:
    config = json.loads((resolve("tiny") / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(resolve("tiny"), local_files_only=True)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (config["bos_token_id"], config["eos_token_id"])
    assert tokenizer.decode([104, config["eos_token_id"]], skip_special_tokens=True) == "h"


def test_learning_rate_warms_up_and_ends_at_zero() -> None:
    rates = [train.learning_rate(step) for step in range(train.STEPS)]
    assert max(rates) == train.PEAK_LEARNING_RATE
    assert rates[0] < rates[train.WARMUP_STEPS // 2] < train.PEAK_LEARNING_RATE
    assert rates[-1] < 1e-4 * train.PEAK_LEARNING_RATE


@pytest.mark.slow
def test_training_is_deterministic_and_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "STEPS", 12)
    monkeypatch.setattr(train, "WARMUP_STEPS", 4)
    threads = torch.get_num_threads()
    try:
        (first, loss), (second, _) = train.train(), train.train()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert loss < 5.0
