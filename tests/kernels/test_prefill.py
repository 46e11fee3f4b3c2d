"""The operators for several tokens: CPU kernels against plain torch, and Triton kernels against CPU kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from executorch_moe.kernels.gpus import MAX_DYNAMIC_SHARED, Gpu
from executorch_moe.kernels.launch import Launch
from executorch_moe.kernels.measure.compile import compile_launch
from executorch_moe.kernels.prefill import op as ops
from executorch_moe.kernels.prefill.aten import (
    cached_attention_aten,
    cached_attention_by_rows,
    residual_norm_aten,
    rotated_heads_aten,
    top_experts_aten,
)
from executorch_moe.kernels.prefill.launches import (
    AttentionTile,
    run_cached_attention,
    run_residual_norm,
    run_rotated_heads,
    run_top_experts,
)

from ..combinations import combinations
from .test_memory import same_bits_in_any_order
from .test_one_token import random

EPS = 1e-6
CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
SMALL = AttentionTile(16, 32, 2, 4)


def heads_arguments(tokens: int, heads: int, kv_heads: int, head_dim: int) -> tuple[object, ...]:
    angle = torch.arange(tokens)[None, :, None] * torch.linspace(0.1, 1.0, head_dim // 2)
    return (
        random(1, tokens, (heads + 2 * kv_heads) * head_dim), random(2, head_dim // 2),
        random(2, head_dim // 2, seed=1), angle.cos().bfloat16(), angle.sin().bfloat16(), kv_heads, EPS,
    )  # fmt: skip


def attention_arguments(
    start: int, tokens: int, heads: int, kv_heads: int, head_dim: int, context: int, window: int = 0
) -> tuple[object, ...]:
    """Tokens at `start` and later. The cache holds NaN where none of them may look."""
    key, value = (random(1, kv_heads, context, head_dim, seed=seed) for seed in (1, 2))
    key[:, :, start + tokens :], value[:, :, start + tokens :] = torch.nan, torch.nan
    last = torch.arange(start, start + tokens)[:, None]
    if window:
        low = max(start - window + 1, 0)
        key[:, :, :low], value[:, :, :low] = torch.nan, torch.nan
        last = torch.cat([(last - window + 1).clamp(min=0), last], 1)
    return random(1, tokens, heads, head_dim), key, value, last, head_dim**-0.5


HEADS = [(1, 2, 1, 32), (5, 4, 2, 32), (17, 3, 1, 64), (33, 2, 2, 128)]
ATTENTION = {
    "from the start": (0, 40, 4, 2, 32, 64),
    "one query head for each head of the cache": (3, 33, 2, 2, 32, 64),
    "three query heads, which no block holds evenly": (70, 19, 3, 1, 64, 128),
    "one token": (9, 1, 4, 2, 32, 16),
    "two tokens at the end of the cache": (126, 2, 8, 1, 32, 128),
    "a window": (50, 40, 4, 2, 32, 100, 20),
    "a window that is longer than the text": (0, 21, 2, 1, 32, 32, 64),
}


LOGITS = {
    "random": lambda: random(37, 128).float(),
    "bf16": lambda: random(9, 20),
    "equal": lambda: torch.zeros(5, 12),
    "both zeros": lambda: torch.tensor([[-0.0, 0.0, -0.0, 1.0, -1.0, 0.0]]),
    "not finite": lambda: torch.tensor([[torch.nan, torch.inf, -torch.inf, 3.0, torch.nan, -torch.inf]]),
    "nothing but -inf": lambda: torch.full((2, 6), -torch.inf),
}


NORM = [(1, 64), (9, 100), (3, 2048)]


def norm_arguments(tokens: int, hidden: int) -> tuple[Tensor, Tensor, Tensor, float]:
    return random(1, tokens, hidden), random(1, tokens, hidden, seed=1), random(hidden).float(), EPS


@pytest.mark.parametrize(("tokens", "hidden"), NORM)
def test_residual_norm_is_that_of_plain_modules(tokens: int, hidden: int) -> None:
    x, update, norm, eps = arguments = norm_arguments(tokens, hidden)
    summed, normed = ops.residual_norm(*arguments)
    assert torch.equal(summed, x + update)
    expected = torch.nn.functional.rms_norm((x + update).double(), (hidden,), norm.double(), eps)
    torch.testing.assert_close(normed.double(), expected, rtol=0.01, atol=0.01)
    torch.library.opcheck(torch.ops.executorch_moe.residual_norm, arguments, test_utils=CHECKS)


@pytest.mark.parametrize(
    ("changed", "to", "message"),
    [
        (0, torch.zeros(1, 9, 100), "hidden has dtype float32, expected bfloat16"),
        (0, random(9, 100), r"hidden has shape \[9, 100\], expected \[1, T, H\] with H from 1 to 8192"),
        (1, random(1, 8, 100), r"update has shape \[1, 8, 100\], expected that of hidden, \[1, 9, 100\]"),
        (2, random(99), r"norm has shape \[99\], expected 100 elements"),
        (3, float("nan"), "eps=nan must be a finite number"),
    ],
)
def test_wrong_arguments_of_residual_norm_are_named(changed: int, to: object, message: str) -> None:
    arguments: list[object] = list(norm_arguments(9, 100))
    arguments[changed] = to
    with pytest.raises(ValueError, match=message):
        ops.residual_norm(*arguments)


@pytest.mark.parametrize("sizes", HEADS)
def test_rotated_heads_are_those_of_plain_modules(sizes: tuple[int, int, int, int]) -> None:
    _, heads, kv_heads, head_dim = sizes
    qkv, q_norm, k_norm, cos, sin, *_ = arguments = heads_arguments(*sizes)
    query, new = ops.rotated_heads(*arguments)
    rows = qkv.unflatten(-1, (-1, head_dim))[0]  # type: ignore[attr-defined]

    def expected(x: Tensor, norm: Tensor) -> Tensor:
        x = torch.nn.functional.rms_norm(x.float(), (head_dim,), norm.flatten().float(), EPS)
        low, high = x.chunk(2, -1)
        turned = torch.cat([-high, low], -1)
        wide = (torch.cat([part, part], -1)[0, :, None].float() for part in (cos, sin))
        cosines, sines = wide
        return x * cosines + turned * sines

    torch.testing.assert_close(query[0].float(), expected(rows[:, :heads], q_norm), rtol=0.01, atol=0.01)
    key = expected(rows[:, heads : heads + kv_heads], k_norm).transpose(0, 1)
    torch.testing.assert_close(new[0, 0].float(), key, rtol=0.01, atol=0.01)
    assert torch.equal(new[1, 0], rows[:, heads + kv_heads :].transpose(0, 1))
    torch.library.opcheck(torch.ops.executorch_moe.rotated_heads, arguments, test_utils=CHECKS)


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_is_that_of_fp64(name: str) -> None:
    query, key, value, visible, scaling = arguments = attention_arguments(*ATTENTION[name])
    out = ops.cached_attention(*arguments)
    groups = query.shape[2] // key.shape[1]
    for token in range(query.shape[1]):
        first, last = int(visible[token, 0]) if visible.shape[1] == 2 else 0, int(visible[token, -1])
        for head in range(query.shape[2]):
            keys, values = (t[0, head // groups, first : last + 1].double() for t in (key, value))
            weights = (query[0, token, head].double() @ keys.T * scaling).softmax(-1)
            torch.testing.assert_close(out[0, token, head].double(), weights @ values, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("tokens", [1, 15, 16, 33])
@pytest.mark.parametrize(("dtype", "head_dim", "window"), [(torch.float32, 24, False), (torch.bfloat16, 32, True)])
def test_attention_by_rows_is_that_of_the_operator(
    tokens: int, dtype: torch.dtype, head_dim: int, window: bool
) -> None:
    """As CPU programs compute it, for head sizes and dtypes that CUDA does not have; nobody sees the last positions."""
    generator = torch.Generator().manual_seed(tokens)
    query = torch.randn(1, tokens, 6, head_dim, generator=generator).to(dtype)
    key, value = (torch.randn(1, 2, 50, head_dim, generator=generator).to(dtype) for _ in range(2))
    key[:, :, 40:], value[:, :, 40:] = torch.nan, torch.nan
    last = torch.arange(40 - tokens, 40)[:, None]
    visible = torch.cat([(last - 7).clamp(min=0), last], -1) if window else last
    arguments = ops.CachedAttentionArguments(query, key, value, visible, 0.2)
    found, expected = cached_attention_by_rows(arguments), ops.cached_attention(*arguments)
    bound = 1e-5 if dtype == torch.float32 else 0.01
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=bound, atol=bound)


def test_operators_keep_the_rules_of_torch() -> None:
    arguments = attention_arguments(3, 5, 4, 2, 32, 16)
    for index in (1, 2):  # opcheck compares results, and NaN is not equal to itself
        arguments[index].nan_to_num_()  # type: ignore[attr-defined]
    torch.library.opcheck(torch.ops.executorch_moe.cached_attention, arguments, test_utils=CHECKS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(1, 5, 4, 32, device="meta")}, r"query has dtype float32, expected bfloat16: convert it"),
        ({"query": random(2, 5, 4, 32)}, r"query has shape \[2, 5, 4, 32\], expected \[1, T, heads, D\]"),
        ({"query": random(1, 5, 3, 32)}, r"query has shape \[1, 5, 3, 32\], expected \[1, T, heads, 32\] with heads a"),
        ({"value": random(1, 2, 17, 32)}, r"value has shape \[1, 2, 17, 32\], expected that of key"),
        ({name: random(1, 2, 16, 48).to("meta") for name in ["query", "key", "value"]}, r"heads of D=48, expected one"),
        ({"query": torch.zeros(1, 5, 4, 32, dtype=torch.float64)}, r"query has dtype float64, expected bfloat16 or"),
        ({"visible": torch.zeros(5, dtype=torch.int64)}, r"visible has shape \[5\], expected \[5, 1\] or \[5, 2\]"),
        ({"visible": torch.zeros(5, 1, dtype=torch.int32)}, r"visible has dtype int32, expected int64"),
        ({"visible": torch.full((5, 1), 16)}, r"visible has positions from 16 to 16, expected 0 to 15"),
        ({"visible": torch.tensor([[3, 2]]).expand(5, 2)}, r"a first position after the last one"),
        ({"scaling": 0.0}, r"scaling=0.0 must be a positive number"),
        (
            {
                "query": random(1, 5, 4, 32).to("meta"),
                "key": random(1, 16, 2, 32).to("meta").transpose(1, 2),
                "value": random(1, 2, 16, 32).to("meta"),
                "visible": torch.zeros(5, 1, dtype=torch.int64, device="meta"),
            },
            r"key must be contiguous",
        ),
        ({"visible": torch.zeros(5, 1, dtype=torch.int64, device="meta")}, r"visible is on meta but query is on cpu"),
    ],
)
def test_wrong_arguments_of_attention_are_named(change: dict[str, object], message: str) -> None:
    arguments = ops.CachedAttentionArguments(*attention_arguments(3, 5, 4, 2, 32, 16))
    with pytest.raises(ValueError, match=message):
        ops.cached_attention(*arguments._replace(**change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(1, 5, 256)}, r"qkv has dtype float32, expected bfloat16"),
        ({"qkv": random(5, 256)}, r"qkv has shape \[5, 256\], expected \[1, T, \(heads \+ 2 \* kv_heads\) \* D\]"),
        ({"kv_heads": 3}, r"qkv has 256 columns, expected \(heads \+ 2 \* kv_heads\) \* D with kv_heads=3, D=32"),
        ({"k_norm": random(16)}, r"k_norm has shape \[16\], expected 32 elements"),
        ({"q_norm": random(48)}, r"q_norm has 48 elements, expected D, one of"),
        ({"cos": random(1, 4, 16)}, r"cos has shape \[1, 4, 16\], expected \[1, 5, 16\]"),
        ({"eps": -1.0}, r"eps=-1.0 must be a finite number, 0 or more"),
    ],
)
def test_wrong_arguments_of_heads_are_named(change: dict[str, object], message: str) -> None:
    arguments = ops.HeadsArguments(*heads_arguments(5, 4, 2, 32))
    with pytest.raises(ValueError, match=message):
        ops.rotated_heads(*arguments._replace(**change))


@pytest.mark.parametrize("name", LOGITS)
def test_top_experts_are_those_of_torch(name: str) -> None:
    logits = LOGITS[name]()
    weights, ids = ops.top_experts(logits, 4)
    values = logits.float().nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    expected = torch.sort(values, dim=1, descending=True, stable=True).indices[:, :4]
    assert torch.equal(ids, expected)
    chosen = logits.float().gather(1, ids)
    torch.testing.assert_close(weights, chosen.softmax(1), equal_nan=True)
    if chosen.isfinite().all():
        torch.library.opcheck(torch.ops.executorch_moe.top_experts, (logits, 4), test_utils=CHECKS)


@pytest.mark.parametrize(
    ("logits", "top_k", "message"),
    [
        (torch.zeros(3, 4, dtype=torch.int64), 2, "logits has dtype int64, expected bfloat16 or float32 or float16"),
        (torch.zeros(4), 2, r"logits has shape \[4\], expected \[T, E\]"),
        (torch.zeros(1, 2000), 2, r"logits has shape \[1, 2000\], expected \[T, E\] with E from 1 to 1024"),
        (torch.zeros(3, 4), 5, "top_k=5 must be from 1 to the E=4 experts"),
    ],
)
def test_wrong_arguments_of_top_experts_are_named(logits: Tensor, top_k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.top_experts(logits, top_k)


def close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    torch.testing.assert_close(found.float(), expected.float(), rtol=0.01, atol=0.01)


@pytest.mark.interpreter
@pytest.mark.parametrize(("tokens", "hidden"), NORM)
def test_interpreted_residual_norm(tokens: int, hidden: int) -> None:
    arguments = norm_arguments(tokens, hidden)
    found, expected = run_residual_norm(*arguments), residual_norm_aten(*arguments)
    assert torch.equal(found[0], expected[0])
    close(found[1], expected[1])
    same_bits_in_any_order(lambda: run_residual_norm(*arguments))


@pytest.mark.interpreter
@pytest.mark.parametrize("sizes", HEADS)
def test_interpreted_heads(sizes: tuple[int, int, int, int]) -> None:
    arguments = ops.HeadsArguments(*heads_arguments(*sizes))
    for found, expected in zip(run_rotated_heads(arguments), rotated_heads_aten(arguments), strict=True):
        close(found, expected)
    same_bits_in_any_order(lambda: run_rotated_heads(arguments))


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ATTENTION)
def test_interpreted_attention(name: str) -> None:
    arguments = ops.CachedAttentionArguments(*attention_arguments(*ATTENTION[name]))
    close(run_cached_attention(arguments, tile=SMALL), cached_attention_aten(arguments))
    same_bits_in_any_order(lambda: run_cached_attention(arguments, tile=SMALL))


@pytest.mark.interpreter
@pytest.mark.parametrize("top_k", [1, 3, 5])
@pytest.mark.parametrize("name", LOGITS)
def test_interpreted_top_experts(name: str, top_k: int) -> None:
    logits = LOGITS[name]()
    (weights, ids), expected = run_top_experts(logits, top_k), top_experts_aten(logits, top_k)
    assert torch.equal(ids, expected[1])
    torch.testing.assert_close(weights, expected[0], equal_nan=True)
    if weights.isfinite().all():
        same_bits_in_any_order(lambda: run_top_experts(logits, top_k))


COMPILED_OFTEN = {(80, 128), (89, 64), (90, 128), (90, 256), (100, 64), (120, 256)}


@pytest.mark.compiler
@pytest.mark.parametrize(
    ("capability", "head_dim"),
    combinations([80, 89, 90, 100, 120], [64, 128, 256], chosen=lambda *cell: cell in COMPILED_OFTEN),
)
def test_kernels_compile_without_spills(capability: int, head_dim: int) -> None:
    gpu = Gpu(capability, 132, MAX_DYNAMIC_SHARED[capability])
    launches: list[Launch] = []
    with torch.device("meta"):
        bf16 = {"dtype": torch.bfloat16}
        cache, angles = torch.empty(1, 4, 2304, head_dim, **bf16), torch.empty(1, 1000, head_dim // 2, **bf16)
        query, norm = torch.empty(1, 1000, 32, head_dim, **bf16), torch.empty(head_dim, **bf16)
        for width in (1, 2):
            visible = torch.empty(1000, width, dtype=torch.int64)
            run_cached_attention(
                ops.CachedAttentionArguments(query, cache, cache, visible, 0.1), gpu=gpu, submit=launches.append
            )
        qkv = torch.empty(1, 1000, 40 * head_dim, **bf16)
        heads = ops.HeadsArguments(qkv, norm, norm, angles, angles, 4, EPS)
        run_rotated_heads(heads, gpu=gpu, submit=launches.append)
        row = torch.empty(1, 1000, 6000, **bf16)
        run_residual_norm(row, row, torch.empty(6000, **bf16), EPS, gpu=gpu, submit=launches.append)
        for experts in (128, 512):
            run_top_experts(torch.empty(1000, experts, **bf16), 8, gpu=gpu, submit=launches.append)
    for launch in launches:
        report = compile_launch(launch, capability)
        assert report.spill_bytes == 0 and report.shared <= gpu.max_shared, (launch.kernel.__name__, report)


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "hidden"), [*NORM, (1000, 6000)])
def test_residual_norm_on_a_gpu(tokens: int, hidden: int) -> None:
    arguments = norm_arguments(tokens, hidden)
    found = ops.residual_norm(*(part.cuda() if isinstance(part, Tensor) else part for part in arguments))
    expected = ops.residual_norm(*arguments)
    assert torch.equal(found[0].cpu(), expected[0])
    close(found[1].cpu(), expected[1])


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [*HEADS, (1000, 32, 4, 128)])
def test_heads_on_a_gpu(sizes: tuple[int, int, int, int]) -> None:
    arguments = heads_arguments(*sizes)
    there = [part.cuda() if isinstance(part, Tensor) else part for part in arguments]
    found = ops.rotated_heads(*there)
    for one, expected in zip(found, ops.rotated_heads(*arguments), strict=True):
        close(one.cpu(), expected)
    assert all(torch.equal(one, other) for one, other in zip(ops.rotated_heads(*there), found, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
@pytest.mark.parametrize("name", [*ATTENTION, "a long text", "a long window"])
def test_attention_on_a_gpu(name: str, head_dim: int) -> None:
    longer = {"a long text": (500, 1001, 8, 2, 0, 2000), "a long window": (700, 777, 8, 1, 0, 1500, 128)}
    sizes = list(longer.get(name) or ATTENTION[name])
    sizes[4] = head_dim
    arguments = attention_arguments(*sizes)
    there = [part.cuda() if isinstance(part, Tensor) else part for part in arguments]
    found = ops.cached_attention(*there)
    close(found.cpu(), ops.cached_attention(*arguments))
    assert torch.equal(ops.cached_attention(*there), found)


@pytest.mark.gpu
@pytest.mark.parametrize("top_k", [1, 3, 5])
@pytest.mark.parametrize("name", LOGITS)
def test_top_experts_on_a_gpu(name: str, top_k: int) -> None:
    logits = LOGITS[name]()
    weights, ids = ops.top_experts(logits.cuda(), top_k)
    expected = ops.top_experts(logits, top_k)
    assert torch.equal(ids.cpu(), expected[1])
    torch.testing.assert_close(weights.cpu(), expected[0], equal_nan=True)
