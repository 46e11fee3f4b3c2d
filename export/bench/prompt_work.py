"""The least work of a prompt: bytes and FLOPs of each part of a Qwen3-MoE model.

Bytes are those of weights and cache, and of activations as if each part read and wrote them once; activations may stay
in the L2 cache, which is faster.

Letters: T tokens, H hidden size, I width of an expert, D head_dim, E experts, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from executorch_moe.export.models.synthetic import SyntheticModel, is_synthetic, parse

QKV, OUT, ROUTER, HEAD = "qkv projection", "output projection", "router", "lm_head"
CONVERSION = "weights to bf16"
GEMM1, GEMM2, SUM = "experts GEMM1", "experts GEMM2", "experts, other"
ATTENTION, ROUTING, ELEMENTWISE = "attention", "routing", "norm, elementwise"


class Work(NamedTuple):
    """Bytes and FLOPs of a part."""

    nbytes: float = 0
    flops: float = 0

    def floor_us(self, bandwidth: float, flops: float) -> float:
        """Microseconds at these rates, in bytes/s and FLOP/s: the longer of both times."""
        return 1e6 * max(self.nbytes / bandwidth, self.flops / flops)


class ModelSizes(NamedTuple):
    """Sizes of a Qwen3-MoE model, as `report.summary.model_sizes` records them."""

    layers: int
    hidden: int
    experts: int
    top_k: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int


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
    if type(model) is not SyntheticModel:  # layers of other kinds
        return None
    return ModelSizes(*(getattr(model, field) for field in ModelSizes._fields))


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
    heads, rows = m.heads * m.head_dim, (m.heads + 2 * m.kv_heads) * m.head_dim
    expert = record["expert_bytes"] / (m.layers * m.experts)
    # With uniform routing, a token leaves an expert out with probability 1 - top_k / E.
    touched = expert * m.experts * (1 - (1 - m.top_k / m.experts) ** t)
    scores = sum(range(start + 1, start + t + 1))  # position p attends to p + 1 positions

    def linear(n: int, k: int) -> Work:
        # Prompts multiply in bf16: weights stored in 8 or 4 bits are converted first, which is a separate part.
        return Work(matrix_bytes(n, k, "none") + 2 * t * (n + k), 2 * t * n * k)

    stored = formats["linear"]
    layer = {
        QKV: linear(rows, h),
        OUT: linear(h, heads),
        ROUTER: linear(m.experts, h),
        ATTENTION: Work(
            2 * (2 * t * heads + 2 * (start + t) * m.kv_heads * m.head_dim), 4 * m.heads * m.head_dim * scores
        ),
        ROUTING: Work(2 * t * m.experts + pairs * (8 + 4)),
        GEMM1: Work(touched * 2 / 3 + 2 * t * h + 2 * pairs * i, 2 * pairs * 2 * i * h),
        GEMM2: Work(touched / 3 + 2 * pairs * i + 2 * pairs * h, 2 * pairs * i * h),
        SUM: Work(2 * pairs * h + 2 * t * h),
        # Two norms that add the residual: two rows read, two written. The rotation and the cache: one each.
        ELEMENTWISE: Work(2 * 4 * 2 * t * h + 2 * 2 * t * rows),
    }
    if stored != "none":
        layer[CONVERSION] = Work(
            sum(matrix_bytes(*n, stored) + matrix_bytes(*n, "none") for n in ((rows, h), (h, heads)))
        )
    work = {part: Work(m.layers * one.nbytes, m.layers * one.flops) for part, one in layer.items()}
    work[HEAD] = Work(matrix_bytes(m.vocabulary, h, formats["lm_head"]), 2 * m.vocabulary * h)
    return work
