"""Trains the tiny Qwen3-MoE model in checkpoint/.

    python -m executorch_moe.examples.tiny.train [OUT_DIR]

The text is `pydoc_data.topics`, the language reference that is part of Python, so that nothing is downloaded. One token
is one byte. The same Python, torch and CPU give the same checkpoint; the text of other versions of Python differs a
little.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

CHECKPOINT = Path(__file__).resolve().parent / "checkpoint"

STEPS = 1800
BATCH_SIZE = 4
SEQUENCE_LENGTH = 512
PEAK_LEARNING_RATE = 4e-3
WARMUP_STEPS = 100
SEED = 20

BYTE_VOCABULARY = 256
BOS, EOS = "<|bos|>", "<|eos|>"
# 256 bytes and two special tokens, rounded up to a multiple of 8 for tensor cores; ids above 257 are unused.
VOCABULARY_SIZE = 264


def make_config():
    """Qwen3-MoE with 2 layers of 8 experts, top-2, hidden 128."""
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=SEQUENCE_LENGTH,
        tie_word_embeddings=True,
        output_router_logits=False,
        router_aux_loss_coef=0.01,
        bos_token_id=BYTE_VOCABULARY,
        eos_token_id=BYTE_VOCABULARY + 1,
        initializer_range=0.04,
    )


def byte_symbols() -> list[str]:
    """The printable symbol of each byte in byte-level tokenizers, in the order of the bytes.

    Source: bytes_to_unicode of OpenAI's GPT-2 encoder.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def save_tokenizer(folder: Path) -> None:
    """Writes a tokenizer whose ids are the values of bytes, so that it reproduces any text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(BOS, special=True), AddedToken(EOS, special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": SEQUENCE_LENGTH,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def corpus() -> torch.Tensor:
    """The bytes of Python's language reference, [N] int64."""
    from pydoc_data import topics

    text = "\n\n".join(topics.topics[name].strip() for name in sorted(topics.topics))
    # So small a model predicts long rules and deep indentation easily, and then repeats them.
    text = re.sub(r"([*=~^.-])\1{3,}", r"\1\1\1", text)
    text = re.sub(r" {4,}", "   ", text)
    text = re.sub(r"\n{3,}", "\n\n", text)
    return torch.tensor(list(text.encode()), dtype=torch.int64)


def learning_rate(step: int) -> float:
    """Linear warm-up, then cosine decay to zero."""
    if step < WARMUP_STEPS:
        return PEAK_LEARNING_RATE * (step + 1) / WARMUP_STEPS
    return PEAK_LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / (STEPS - WARMUP_STEPS)))


def train() -> tuple[torch.nn.Module, float]:
    """Trains the model; returns it and the mean loss of the last 50 steps, in nats per byte."""
    from transformers import Qwen3MoeForCausalLM

    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    data = corpus()
    # The load-balancing loss of the router makes the model use all eight experts.
    config = make_config()
    config.output_router_logits = True
    model = Qwen3MoeForCausalLM._from_config(config, attn_implementation="sdpa", experts_implementation="eager")
    model.train()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {data.numel():,} bytes of text")

    recent: list[float] = []
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
    with Progress(*columns, TimeRemainingColumn()) as progress:
        task = progress.add_task("train", total=STEPS, loss="")
        for step in range(STEPS):
            starts = torch.randint(0, data.numel() - SEQUENCE_LENGTH - 1, (BATCH_SIZE,)).tolist()
            batch = torch.stack([data[start : start + SEQUENCE_LENGTH + 1] for start in starts])
            output = model(input_ids=batch[:, :-1], use_cache=False)
            loss = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1).float(), batch[:, 1:].flatten())
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step)
            optimizer.zero_grad(set_to_none=True)
            (loss + config.router_aux_loss_coef * router_balance(output.router_logits)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            recent = [*recent[-49:], loss.item()]
            progress.update(task, advance=1, loss=f"loss {sum(recent) / len(recent):.3f}")
    model.config.output_router_logits = False
    return model.eval(), sum(recent) / len(recent)


def router_balance(router_logits: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Load-balancing loss of Switch Transformer: experts x sum(share of tokens x mean probability), 1 if balanced."""
    total = torch.zeros(())
    for logits in router_logits:
        probabilities = logits.float().softmax(-1)
        chosen = torch.zeros_like(probabilities).scatter(-1, probabilities.topk(2, dim=-1).indices, 0.5)
        total = total + logits.shape[-1] * (chosen.mean(0) * probabilities.mean(0)).sum()
    return total / len(router_logits)


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else CHECKPOINT
    model, loss = train()
    aside = out.with_name(out.name + ".new")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    model.to(torch.bfloat16).save_pretrained(aside)
    save_tokenizer(aside)
    shutil.rmtree(out, ignore_errors=True)
    aside.rename(out)
    size = (out / "model.safetensors").stat().st_size
    print(f"loss {loss:.3f} nats a byte over the last 50 steps; {size / 1e6:.2f} MB of weights in {out}")


if __name__ == "__main__":
    main()
