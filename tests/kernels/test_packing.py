"""The packed layout follows its formula, quantization chooses the nearest codes, and bad weights are refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from executorch_moe.kernels import ALGORITHMS, SCHEMES, pack_experts, unpack_experts
from executorch_moe.kernels.packing.fragments import (
    deinterleave_gate_up,
    dequantize,
    dequantize_in_place,
    fragment_order,
    interleave_gate_up,
    pack_int4,
    unpack_int4,
)
from executorch_moe.kernels.packing.rounding import quantize_int4

from . import cases


@pytest.mark.parametrize("scheme", ["w4a16", "w4a8"])
def test_every_value_is_where_the_formula_says(scheme: str) -> None:
    q = torch.randint(-8, 8, (2, 5, 256), dtype=torch.int8)
    packed = pack_int4(q, scheme)
    assert packed.shape == (2, 2, 5, 64) and packed.dtype == torch.uint8
    for k in range(256):
        inner = k % 128
        if scheme == "w4a16":  # k = 32s + 16c + 8h + 2t + l
            s, c, h, t, low = inner // 32, inner // 16 % 2, inner // 8 % 2, inner // 2 % 4, inner % 2
            byte, nibble = 16 * t + 8 * c + 4 * h + 2 * low + s // 2, s % 2
        else:  # k = 64s + 32c + 16h + 4t + 2m + l
            s, c, h, t, m, low = (
                inner // 64,
                inner // 32 % 2,
                inner // 16 % 2,
                inner // 4 % 4,
                inner // 2 % 2,
                inner % 2,
            )
            byte, nibble = 16 * t + 8 * c + 4 * h + 2 * low + m, s
        code = (packed[:, k // 128, :, byte].to(torch.int32) >> (4 * nibble)) & 15
        signed = torch.where(code >= 8, code - 16, code)
        assert torch.equal(signed, q[:, :, k].to(torch.int32)), k


@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 3), st.sampled_from(["w4a16", "w4a8"]))
@settings(deadline=None, max_examples=25)
def test_unpack_inverts_pack(e: int, n: int, blocks: int, scheme: str) -> None:
    q = torch.randint(-8, 8, (e, n, 128 * blocks), dtype=torch.int8)
    assert torch.equal(unpack_int4(pack_int4(q, scheme), scheme), q.float())


@pytest.mark.parametrize(
    ("scheme", "zero", "group_size"),
    [
        *((*way, g) for way in (("w4a16", False), ("w4a16", True), ("w4a8", False)) for g in (32, 64, 128, 256, 512)),
        ("mxfp4", False, 32),
    ],
)
def test_values_dequantized_in_place_have_the_bits_of_dequantize(scheme: str, zero: bool, group_size: int) -> None:
    packed = pack_experts(
        torch.randn(2, 1024, 512), torch.randn(2, 512, 512), scheme=scheme, group_size=group_size,
        algorithm="hqq" if zero else "minmax",
    )  # fmt: skip
    for gemm, matrix in ((1, "w13"), (2, "w2")):
        tensors = (getattr(packed, f"{matrix}{suffix}") for suffix in ("", "_scale", "_zero"))
        args = (*tensors, fragment_order(scheme, gemm))
        assert (args[2] is not None) == zero
        expected = dequantize(*args).unflatten(-1, (-1, 128))
        seen = []
        for weight, positions in dequantize_in_place(*args):
            assert torch.equal(weight, expected[..., positions].flatten(-2))
            seen += positions.tolist()
        assert sorted(seen) == list(range(128))


def test_gate_and_up_alternate_in_runs_of_8() -> None:
    rows = torch.arange(64).reshape(1, 64, 1)
    packed = interleave_gate_up(rows)
    assert packed[0, :8, 0].tolist() == list(range(8))
    assert packed[0, 8:16, 0].tolist() == list(range(32, 40))
    assert torch.equal(deinterleave_gate_up(packed), rows)


def test_quantized_code_is_the_nearest_one_for_the_stored_scale() -> None:
    w = torch.randn(3, 7, 128)
    q, scale = quantize_int4(w, 32)
    assert scale.dtype == torch.bfloat16 and scale.shape == (3, 7, 4)
    codes = torch.arange(-8, 8).float()
    grid = codes * scale.float()[..., None, None]
    nearest = (w.unflatten(-1, (4, 32))[..., None] - grid).abs().amin(-1)
    error = (w.unflatten(-1, (4, 32)) - q.unflatten(-1, (4, 32)).float() * scale.float()[..., None]).abs()
    torch.testing.assert_close(error, nearest)


def test_a_group_of_zeros_stays_zero() -> None:
    w = torch.randn(1, 2, 64)
    w[0, 0, :32] = 0
    q, scale = quantize_int4(w, 32)
    assert scale[0, 0, 0] == 0 and not q[0, 0, :32].any()


@pytest.mark.parametrize(
    ("scheme", "h", "i", "g"),
    [
        *((s, *sizes) for s in ("bf16", "w4a16", "w4a8") for sizes in ((160, 96, 32), (256, 128, 128), (192, 64, 64))),
        ("mxfp4", 160, 96, 32),
    ],
)
def test_unpacked_layer_is_close_to_the_original(scheme: str, h: int, i: int, g: int) -> None:
    gate_up, down = torch.randn(3, 2 * i, h), torch.randn(3, h, i)
    packed = pack_experts(gate_up, down, scheme=scheme, group_size=g)
    back_gate_up, back_down = unpack_experts(packed)
    bound = 0.002 if scheme == "bf16" else 0.13
    assert cases.relative_error(back_gate_up, gate_up) < bound
    assert cases.relative_error(back_down, down) < bound


def test_biases_are_stored_in_packed_row_order() -> None:
    gate_up, down = torch.randn(2, 2 * 96, 160), torch.randn(2, 160, 96)
    bias = torch.randn(2, 192)
    packed = pack_experts(
        gate_up, down, scheme="w4a16", group_size=32, gate_up_bias=bias, down_bias=torch.randn(2, 160)
    )
    stored = cases.stored_bias(packed)
    assert torch.equal(stored[:, :96], bias[:, :96]) and torch.equal(stored[:, 128 : 128 + 96], bias[:, 96:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scheme": "w3a16"}, "scheme='w3a16' is unknown: use one of bf16, w4a16, w4a8, mxfp4"),
        ({"group_size": 48}, "group_size=48 is not supported"),
        ({"scheme": "mxfp4"}, "group_size=64 is not supported by scheme mxfp4, .* 32 weights: use group_size=32"),
        ({"group_size": 128}, "hidden size H=192 must be a multiple of group_size=128: requantize with group_size=64"),
        ({"down": torch.zeros(2, 192, 32)}, "do not belong together"),
        ({"down": torch.zeros(192, 64)}, "must be 3-D"),
        ({"gate_up_bias": torch.zeros(2, 64)}, "gate_up_bias has shape"),
        ({"gate_up": torch.zeros(2, 128, 192, dtype=torch.int8)}, "gate_up has dtype int8, expected floats: dequant"),
        ({"down": torch.zeros(2, 192, 64, dtype=torch.bool)}, "down has dtype bool, expected floats"),
        ({"down": torch.zeros(2, 192, 64, dtype=torch.complex64)}, "down has dtype complex64, expected floats"),
        ({"down_bias": torch.zeros(2, 192, dtype=torch.int32)}, "down_bias has dtype int32, expected floats"),
        ({"down": torch.zeros(2, 192, 64, device="meta")}, "down is on meta but gate_up is on cpu: move both"),
        ({"gate_up_bias": torch.zeros(2, 128, device="meta")}, "gate_up_bias is on meta but gate_up is on cpu"),
    ],
)
def test_bad_weights_get_a_reason_and_a_remedy(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "gate_up": torch.zeros(2, 128, 192),
        "down": torch.zeros(2, 192, 64),
        "group_size": 64,
    }
    arguments |= change
    with pytest.raises(ValueError, match=message):
        pack_experts(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("h", "i", "group_size", "message"),
    [
        (192, 96, 128, "hidden size H=192 must be a multiple of group_size=128: requantize with group_size=32$"),
        (256, 96, 128, "intermediate size I=96 must be a multiple of group_size=128: requantize with group_size=32$"),
        (128, 384, 256, "hidden size H=128 must be a multiple of group_size=256: requantize with group_size=128$"),
        (160, 80, 64, "H=160 .* requantize with group_size=32, and pad intermediate size I to a multiple of it$"),
        (80, 40, 32, "H=80 .* with group_size=32, and pad hidden size H and intermediate size I to a multiple of it$"),
    ],
)
def test_the_group_size_that_an_error_names_fits_both_sizes(h: int, i: int, group_size: int, message: str) -> None:
    gate_up, down = torch.zeros(2, 2 * i, h), torch.zeros(2, h, i)
    with pytest.raises(ValueError, match=message):
        pack_experts(gate_up, down, group_size=group_size)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_that_are_no_numbers_are_named(scheme: str, algorithm: str, value: float) -> None:
    shapes = {"gate_up": (4, 128, 192), "down": (4, 192, 64), "gate_up_bias": (4, 128), "down_bias": (4, 192)}
    for name in shapes:
        weights = {other: torch.randn(shape) for other, shape in shapes.items()}
        for expert in (2, 3):
            weights[name][expert].view(-1)[-1] = value
        with pytest.raises(ValueError, match=f"^{name} of expert 12 holds NaN, Inf or values that bfloat16 cannot"):
            pack_experts(**weights, scheme=scheme, group_size=32, algorithm=algorithm, first_expert=10)  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_large_weights_and_weights_without_values_are_packed(scheme: str) -> None:
    gate_up, down = torch.randn(2, 128, 64), torch.randn(2, 64, 64)
    gate_up[0, 0, 0], down[1, 2, 3] = (2e10, -2e10) if scheme == "mxfp4" else (3e38, -3e38)
    assert all(t.isfinite().all() for t in unpack_experts(pack_experts(gate_up, down, scheme=scheme, group_size=32)))
    packed = pack_experts(gate_up.to("meta"), down.to("meta"), scheme=scheme, group_size=32)
    assert packed.w13.is_meta
    with FakeTensorMode() as mode:
        packed = pack_experts(mode.from_tensor(gate_up), mode.from_tensor(down), scheme=scheme, group_size=32)
    assert packed.num_experts == 2
