"""The decode step of a Qwen3-MoE model as calls of the operators that an exported program has, and checks of it.

Each layer calls `one_token_attention` and `one_token_experts`, as `models.decoder_layer` does.
After the last layer come the cache update of all layers, in one launch as in an exported program, the last norm, and
`one_token_linear` for the vocabulary. The embedding, cosines and sines of the position, and the choice of the token are
left out: five launches per token.

Letters: H hidden size, D head_dim, C positions in the cache, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from executorch_moe.export.models.linears import quantize_rows
from executorch_moe.export.models.synthetic import PREFIX, PRESETS, SyntheticModel, parse
from executorch_moe.kernels.decode.arguments import AttentionArguments, RouteArguments
from executorch_moe.kernels.decode.aten import one_token_attention_aten, one_token_router_aten
from executorch_moe.kernels.decode.op import fits_one_token
from executorch_moe.kernels.measure.timing import LayerInputs, random_packed
from executorch_moe.kernels.module import FusedExperts
from executorch_moe.kernels.routed.op import one_token_experts as _one_token_experts  # noqa: F401  registers it
from executorch_moe.kernels.schemes import check_layer_group_size, get_scheme
from executorch_moe.kernels.shapes import LayerShape

DENSE = ("int8", "bf16")
EPS = 1e-6
SHAPES = {"qwen3": "qwen3-30b-a3b"}
"""Names of `kernels.shapes` -> the synthetic model with such experts."""
LARGEST_ERROR = {"bf16": 4.0e-3, "w4a16": 4.5e-3, "w4a8": 1.2e-2, "mxfp4": 4.5e-3}
"""Scheme -> bound on the relative L2 error of the experts, as in docs/numerics.md."""
LARGEST_DENSE_ERROR = 1e-2
"""Bound on the relative L2 error of the one-token operators, whose results are rounded to bf16 two or three times."""
Run = Callable[[str, int, Callable[[], Any]], Any]
"""Calls an operator: (its name, index of the layer or -1, a function without arguments) -> the function's result."""


class Dense(NamedTuple):
    """A linear layer: weight int8 [N, K] with scale fp32 [N], or bf16 without a scale."""

    weight: Tensor
    scale: Tensor | None

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.scale is None else self.scale.nbytes)


@dataclass
class ChainLayer:
    """Weights and cache of one decoder layer.

    Attributes:
        input_norm, post_norm: bf16 [H]. q_norm, k_norm: bf16 [2, D/2]. router: bf16 [E, H].
        qkv: [(heads + 2 * kv_heads) * D, H]. out: [H, heads * D].
        key, value: bf16 [1, kv_heads, C, D].
        experts: a `FusedExperts`.
    """

    input_norm: Tensor
    qkv: Dense
    q_norm: Tensor
    k_norm: Tensor
    key: Tensor
    value: Tensor
    out: Dense
    post_norm: Tensor
    router: Tensor
    experts: Any


@dataclass
class LayerResults:
    """What the operators of one layer returned.

    Attributes:
        hidden: the residual stream after attention, bf16 [1, 1, H]. experts: bf16 [1, H].
    """

    attention: tuple[Tensor, Tensor, Tensor]
    hidden: Tensor
    experts: Tensor


def find_shape(text: str) -> SyntheticModel:
    """The model that a shape names: "qwen3", or a synthetic model, with or without "synthetic:".

    Raises:
        ValueError: unknown, or a layer that the operators for one token do not support.
    """
    name, comma, changes = text.removeprefix(PREFIX).partition(",")
    name = SHAPES.get(name, name)
    presets = [preset for preset, model in PRESETS.items() if type(model) is SyntheticModel]
    if name not in presets:
        raise ValueError(
            f"shape={text!r} is unknown: use one of {', '.join((*SHAPES, *presets))}, with changes as in "
            "qwen3,experts=64,top_k=4"
        )
    model = parse(f"{PREFIX}{name}{comma}{changes}")
    if not fits_one_token(model.head_dim, model.hidden, model.experts):
        raise ValueError(
            f"shape={text!r} has head_dim={model.head_dim}, hidden={model.hidden} and experts={model.experts}, which "
            "the operators for one token do not support: use other sizes"
        )
    return model


def check_sizes(model: SyntheticModel, layers: int, dense: str, scheme: str, group_size: int) -> None:
    """Checks the sizes and formats of a chain.

    Raises:
        ValueError: fewer than one layer, an unknown `dense` or `scheme`, or a group size that does not divide the
            sizes of the experts.
    """
    if layers < 1:
        raise ValueError(f"layers={layers} must be at least 1")
    if dense not in DENSE:
        raise ValueError(f"dense={dense!r} is unknown: use one of {', '.join(DENSE)}")
    if get_scheme(scheme).packed:
        check_layer_group_size(group_size, model.hidden, model.intermediate)


class DecodeChain:
    """Random weights of a few layers, and the decode step through them.

    Attributes:
        model: sizes; its `layers` is the number of layers of a whole model.
        layers: those of the chain, with different weights.
        context: positions in the cache that attention reads.
    """

    def __init__(
        self,
        model: SyntheticModel,
        layers: int,
        context: int,
        dense: str = "int8",
        scheme: str = "w4a16",
        group_size: int = 128,
        device: str = "cuda",
        seed: int = 0,
    ) -> None:
        """Makes the weights.

        Raises:
            ValueError: see `check_sizes`; fewer than one position.
        """
        check_sizes(model, layers, dense, scheme, group_size)
        if context < 1:
            raise ValueError(f"context={context} must be at least 1")
        self.model, self.context, self.dense, self.scheme = model, context, dense, scheme
        self.shape = LayerShape(model.experts, model.top_k, model.hidden, model.intermediate, group_size)
        self.device = device
        self._generator = torch.Generator(device).manual_seed(seed)
        h, d = model.hidden, model.head_dim
        # Room for this token, rounded up to 128 positions.
        self._cache = self._normal(layers, 2, 1, model.kv_heads, -(-(context + 1) // 128) * 128, d)
        self.layers = [self._layer(index) for index in range(layers)]
        self.norm = torch.ones(h, dtype=torch.bfloat16, device=device)
        self.head = self._dense(model.vocabulary, h)
        self.hidden = self._normal(1, 1, h)
        self.position = torch.full((1,), context, dtype=torch.int64, device=device)
        angle = context / 1e6 ** (torch.arange(d // 2, device=device) / (d // 2))
        self.cos, self.sin = (part.bfloat16().reshape(1, 1, -1) for part in (angle.cos(), angle.sin()))

    def _normal(self, *sizes: int, deviation: float = 1.0) -> Tensor:
        values = torch.empty(sizes, dtype=torch.bfloat16, device=self.device)
        return values.normal_(0.0, deviation, generator=self._generator)

    def _dense(self, rows: int, columns: int) -> Dense:
        weight = self._normal(rows, columns, deviation=columns**-0.5)
        return Dense(*quantize_rows(weight)) if self.dense == "int8" else Dense(weight, None)

    def _layer(self, index: int) -> ChainLayer:
        m = self.model
        h, d = m.hidden, m.head_dim
        ones = functools.partial(torch.ones, dtype=torch.bfloat16, device=self.device)
        packed = random_packed(self.shape, self.scheme, self.device, self._generator)
        return ChainLayer(
            input_norm=ones(h),
            qkv=self._dense((m.heads + 2 * m.kv_heads) * d, h),
            q_norm=ones(2, d // 2),
            k_norm=ones(2, d // 2),
            key=self._cache[index, 0],
            value=self._cache[index, 1],
            out=self._dense(h, m.heads * d),
            post_norm=ones(h),
            router=self._normal(m.experts, h, deviation=h**-0.5),
            experts=FusedExperts(packed),
        )

    @torch.no_grad()
    def step(self, passes: int = 1, run: Run = lambda name, index, call: call()) -> tuple[Tensor, list[LayerResults]]:
        """One token through all layers, `passes` times, then through the last norm and the vocabulary.

        Args:
            passes: passes over the layers; more make a longer chain with the same weights. The cache is updated once.
            run: calls each operator.

        Returns:
            Logits, bf16 [1, 1, V], and the results of the layers of the last pass.
        """
        ops = torch.ops.executorch_moe
        m, hidden, update = self.model, self.hidden, None
        for _ in range(passes):
            results = []
            for index, w in enumerate(self.layers):
                attention = run(
                    "attention", index,
                    functools.partial(
                        ops.one_token_attention, hidden, update, w.input_norm, *w.qkv, w.q_norm, w.k_norm, self.cos,
                        self.sin, self.position, w.key, w.value, m.head_dim**-0.5, EPS,
                    ),
                )  # fmt: skip
                route = (
                    attention[1], *w.out, attention[0], w.post_norm, w.router, m.top_k, EPS,
                )  # fmt: skip
                packed = w.experts.packed()
                kind = packed.scheme, w.experts.activation, packed.group_size
                hidden, experts = run(
                    "experts", index,
                    functools.partial(ops.one_token_experts, *route, *packed.tensors().values(), *kind),
                )  # fmt: skip
                update = experts[None]
                results.append(LayerResults(attention, hidden, experts))
        run("cache update", -1, functools.partial(self._update, [result.attention[2] for result in results]))
        last = run("last norm", -1, functools.partial(self._last, hidden, update))
        return run("lm_head", -1, functools.partial(ops.one_token_linear, last, *self.head)), results

    def _update(self, new: list[Tensor]) -> Tensor:
        return self._cache.index_copy_(4, self.position, torch.stack(new))

    def _last(self, hidden: Tensor, update: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(hidden + update, self.norm.shape, self.norm, EPS)

    def bytes_of(self, operator: str) -> tuple[int, ...]:
        """Bytes that each launch of an operator must read from memory: weights, scales, norms and cache.

        Activations are left out: the previous launch has just written them to the L2 cache.
        """
        m, w = self.model, self.layers[0]
        packed = w.experts.packed()
        if operator == "attention":
            row = m.kv_heads * m.head_dim * w.key.element_size()
            return w.qkv.nbytes + w.input_norm.nbytes, 2 * self.context * row + w.q_norm.nbytes + w.k_norm.nbytes
        if operator == "experts":
            gemms = ((packed.w13, packed.w13_scale), (packed.w2, packed.w2_scale))
            sizes = (sum(t[0].nbytes for t in gemm if t is not None) for gemm in gemms)
            return w.out.nbytes, w.router.nbytes + w.post_norm.nbytes, *(m.top_k * size for size in sizes)
        return (self.head.nbytes,) if operator == "lm_head" else (0,)


def check_first_layer(made: DecodeChain, results: LayerResults) -> dict[str, float]:
    """Relative L2 errors of the first layer's results against the operators in fp32 on the same inputs.

    Raises:
        RuntimeError: an error above its bound, such as experts that do not have the largest logits.
    """
    m, w = made.model, made.layers[0]
    attention = one_token_attention_aten(
        AttentionArguments(
            made.hidden, None, w.input_norm, *w.qkv, w.q_norm, w.k_norm, made.cos, made.sin, made.position, w.key,
            w.value, m.head_dim**-0.5, EPS,
        )
    )  # fmt: skip
    route = RouteArguments(results.attention[1], *w.out, results.attention[0], w.post_norm, w.router, m.top_k, EPS)
    # The same choice, with the same rounding, as that of one_token_experts.
    _, normed, weights, ids = torch.ops.executorch_moe.one_token_router(*route)
    hidden = results.hidden
    router = one_token_router_aten(route)
    # With nearly equal logits, another expert may be chosen. Rounded to bf16, the chosen logits must equal the largest.
    logits = (normed.float() @ w.router.float().T).bfloat16().float()
    best = logits.topk(m.top_k).values
    expected = LayerInputs(w.experts.packed(), normed, ids, weights).answer.expected
    errors = {
        "attention": relative_error(results.attention[1], attention[1]),
        "key and value": relative_error(results.attention[2], attention[2]),
        "residual": relative_error(hidden, router[0]),
        "norm": relative_error(normed, router[1]),
        "router": max(
            relative_error(logits.gather(1, ids).sort(descending=True).values, best),
            relative_error(weights, logits.gather(1, ids).softmax(-1)),
        ),
        "experts": relative_error(results.experts, expected),
    }
    for name, error in errors.items():
        bound = LARGEST_ERROR[made.scheme] if name == "experts" else LARGEST_DENSE_ERROR
        if not error <= bound:
            raise RuntimeError(
                f"{name} of the first layer is wrong (relative error {error:.2g}, at most {bound:.2g}), so the times "
                "mean nothing: report this"
            )
    return errors


def relative_error(found: Tensor, expected: Tensor) -> float:
    """L2 norm of the difference over that of the expected values."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def check_same_bits(made: DecodeChain, logits: Tensor) -> None:
    """Checks that a replay gives the same bits as the same operators with a pause after each.

    Raises:
        RuntimeError: it does not.
    """

    def alone(operator: str, layer: int, call: Callable[[], Any]) -> Any:
        result = call()
        torch.cuda.synchronize()
        return result

    expected, _ = made.step(run=alone)
    if not torch.equal(logits, expected):
        error = relative_error(logits, expected)
        raise RuntimeError(
            f"launches that overlap give other results (relative error {error:.2g}) than with a pause after each, so "
            "the times mean nothing: report this"
        )
