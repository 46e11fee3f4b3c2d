"""The training loop of the demonstration model."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .model import SEED, add_dropout, repetition_loss, router_balance

SEQUENCE_LENGTH = 512


@dataclass
class Options:
    """What decides a training run, apart from text and model."""

    steps: int = 1800
    batch_size: int = 64
    """Sequences of `sequence_length` tokens in a step."""
    sequence_length: int = SEQUENCE_LENGTH
    learning_rate: float = 2e-3
    """The highest of the schedule."""
    warmup_steps: int = 100
    weight_decay: float = 0.5
    dropout: float = 0.2
    label_smoothing: float = 0.0
    unlikelihood: float = 0.5
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
