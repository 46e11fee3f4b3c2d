"""The least work of a prompt: bytes and FLOPs of each part of a Qwen3-MoE, Qwen3.5-MoE or Qwen3-Next model.

Bytes are those of weights and cache, and of activations as if each part read and wrote them once; activations may stay
in the L2 cache, which is faster.

Letters: T tokens, H hidden size, I width of an expert, D head_dim, E experts, V vocabulary. DK and DV are the widths of
a key head and of a value head of the gated delta rule.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from executorch_moe.export.models.synthetic import SyntheticRecurrentModel, is_synthetic, parse

QKV, OUT, ROUTER, HEAD = "qkv projection", "output projection", "router", "lm_head"
CONVERSION = "weights to bf16"
GEMM1, GEMM2, SUM = "experts GEMM1", "experts GEMM2", "experts, other"
ATTENTION, ROUTING, ELEMENTWISE = "attention", "routing", "norm, elementwise"
DELTA_IN, DELTA_RULE, SHARED = "delta rule projection", "gated delta rule", "shared expert"


class Work(NamedTuple):
    """Bytes and FLOPs of a part."""

    nbytes: float = 0
    flops: float = 0

    def floor_us(self, bandwidth: float, flops: float) -> float:
        """Microseconds at these rates, in bytes/s and FLOP/s: the longer of both times."""
        return 1e6 * max(self.nbytes / bandwidth, self.flops / flops)


class ModelSizes(NamedTuple):
    """Sizes of a model, as `report.summary.model_sizes` records them.

    Attributes:
        query_parts: 2 if the projection of the queries also has a gate of the output.
        shared: width of the shared expert, or 0.
        recurrent_layers: layers with the gated delta rule instead of attention.
        key_heads, value_heads, key_dim, value_dim: of the gated delta rule.
    """

    layers: int
    hidden: int
    experts: int
    top_k: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    query_parts: int = 1
    shared: int = 0
    recurrent_layers: int = 0
    key_heads: int = 0
    value_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0


def sizes_of(record: Mapping[str, Any]) -> ModelSizes | None:
    """Sizes of the model from an export's record; None if it lacks them.

    Records of earlier versions lack them, but for synthetic models the name is enough.
    """
    if sizes := record.get("sizes"):
        return ModelSizes(**sizes)
    options = record.get("options", {})
    if not is_synthetic(options.get("model", "")):
        return None
    model = parse(options["model"], options.get("layers"))
    sizes = ModelSizes(
        *(getattr(model, field) for field in ModelSizes._fields if field not in ModelSizes._field_defaults)
    )
    if not isinstance(model, SyntheticRecurrentModel):
        return sizes
    return sizes._replace(
        query_parts=2,
        shared=model.shared,
        recurrent_layers=model.layers - model.layers // 4,
        key_heads=model.key_heads,
        value_heads=model.value_heads,
        key_dim=model.linear_dim,
        value_dim=model.linear_dim,
    )


def matrix_bytes(n: int, k: int, stored: str) -> float:
    """Bytes of a matrix [N, K] stored as "none" (bf16), "int8-per-output" or "int4-per-32-inputs"."""
    if stored == "none":
        return 2 * n * k
    if stored == "int8-per-output":
        return n * k + 4 * n
    group = re.fullmatch(r"int4-per-(\d+)-inputs", stored)
    assert group is not None, f"unknown format {stored}"
    return n * k / 2 + 2 * n * k / int(group[1])


def prompt_work(record: Mapping[str, Any], tokens: int, chunk: int | None = None) -> dict[str, Work]:
    """Work of a whole prompt by part, all layers; empty if the record lacks the sizes.

    Args:
        record: of an export for CUDA.
        tokens: T of the prompt. chunk: largest number of tokens per call; each call reads the weights again.
    """
    m = sizes_of(record)
    formats = record.get("dense_formats")
    if m is None or formats is None:
        return {}
    total: dict[str, Work] = {}
    step = chunk or tokens
    for start in range(0, tokens, step):
        for part, work in _call_work(m, record, formats, start, min(step, tokens - start)).items():
            before = total.get(part, Work())
            total[part] = Work(before.nbytes + work.nbytes, before.flops + work.flops)
    return total


def _call_work(
    m: ModelSizes, record: Mapping[str, Any], formats: Mapping[str, str], start: int, t: int
) -> dict[str, Work]:
    """Work of one call with T tokens from position `start` on."""
    h, i, pairs = m.hidden, m.intermediate, t * m.top_k
    heads, rows = m.heads * m.head_dim, (m.query_parts * m.heads + 2 * m.kv_heads) * m.head_dim
    keys, values = m.key_heads * m.key_dim, m.value_heads * m.value_dim
    projected = 2 * keys + 2 * values + 2 * m.value_heads  # query, key, value, gate of the output; two gates a head
    expert = record["expert_bytes"] / (m.layers * m.experts)
    # With uniform routing, a token leaves an expert out with probability 1 - top_k / E.
    touched = expert * m.experts * (1 - (1 - m.top_k / m.experts) ** t)
    scores = sum(range(start + 1, start + t + 1))  # position p attends to p + 1 positions
    stored = formats["linear"]

    def linear(n: int, k: int) -> Work:
        # Prompts multiply in bf16: weights stored in 8 or 4 bits are converted first, which is a separate part.
        return Work(matrix_bytes(n, k, "none") + 2 * t * (n + k), 2 * t * n * k)

    def conversion(*matrices: tuple[int, int]) -> Work:
        if stored == "none":
            return Work()
        return Work(sum(matrix_bytes(n, k, stored) + matrix_bytes(n, k, "none") for n, k in matrices))

    attention = {
        QKV: linear(rows, h),
        OUT: linear(h, heads),
        ATTENTION: Work(
            2 * (2 * t * heads + 2 * (start + t) * m.kv_heads * m.head_dim), 4 * m.heads * m.head_dim * scores
        ),
        CONVERSION: conversion((rows, h), (h, heads)),
        # The rotation and the cache: query, key and value are read and written once.
        ELEMENTWISE: Work(2 * 2 * t * rows),
    }
    delta_rule = {
        DELTA_IN: linear(projected, h),
        OUT: linear(h, values),
        # Token by token: the state, fp32 [DK, DV] for each value head, is multiplied with key and query, and updated.
        DELTA_RULE: Work(2 * t * (projected + values) + 2 * 4 * m.key_dim * values, 6 * m.key_dim * values * t),
        CONVERSION: conversion((projected, h), (h, values)),
    }
    every = {
        ROUTER: linear(m.experts, h),
        ROUTING: Work(2 * t * m.experts + pairs * (8 + 4)),
        GEMM1: Work(touched * 2 / 3 + 2 * t * h + 2 * pairs * i, 2 * pairs * 2 * i * h),
        GEMM2: Work(touched / 3 + 2 * pairs * i + 2 * pairs * h, 2 * pairs * i * h),
        SUM: Work(2 * pairs * h + 2 * t * h),
        # Two norms that add the residual: two rows read, two written.
        ELEMENTWISE: Work(2 * 4 * 2 * t * h),
    }
    if m.shared:
        up, down = (2 * m.shared + 1, h), (h, m.shared)  # one column for the expert's own gate
        every[SHARED] = Work(*(sum(both) for both in zip(linear(*up), linear(*down), strict=True)))
        every[CONVERSION] = conversion(up, down)
    work: dict[str, Work] = {}
    for layers, parts in (
        (m.layers - m.recurrent_layers, attention),
        (m.recurrent_layers, delta_rule),
        (m.layers, every),
    ):
        for part, one in parts.items():
            before = work.get(part, Work())
            work[part] = Work(before.nbytes + layers * one.nbytes, before.flops + layers * one.flops)
    work = {part: one for part, one in work.items() if one != Work()}
    work[HEAD] = Work(matrix_bytes(m.vocabulary, h, formats["lm_head"]), 2 * m.vocabulary * h)
    return work
