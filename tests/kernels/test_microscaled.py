"""MXFP4: rounding, the packed layout, the inline PTX of its decoders, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from executorch_moe.kernels import Int4Codes, fused_experts, pack_codes, pack_experts
from executorch_moe.kernels.experts.microscaled import decode_e2m1, dot_e2m1
from executorch_moe.kernels.packing.fragments import pack_int4, unpack_int4
from executorch_moe.kernels.packing.mxfp4 import (
    LEAST,
    MOST,
    STORED_OFFSET,
    Mxfp4Codes,
    e2m1_values,
    pack_e8m0,
    quantize_mxfp4,
    unpack_e8m0,
)
from executorch_moe.kernels.validate import check_fused_experts

from .cases import Case, make
from .ptx import run_ptx

VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
QUARTERS = (3, 1, 2, 0)
"""The nibble of a halfword in which quarter s of a K block is."""


def random_codes(n: int, k: int, experts: int = 2, low: int = 110, high: int = 126) -> Mxfp4Codes:
    q = torch.randint(0, 16, (experts, n, k), dtype=torch.uint8)
    return Mxfp4Codes(q, torch.randint(low, high, (experts, n, k // 32), dtype=torch.uint8))


def test_values_of_all_codes() -> None:
    expected = torch.tensor(VALUES + [-value for value in VALUES])
    assert torch.equal(e2m1_values(torch.arange(16, dtype=torch.uint8)), expected)


def test_every_code_is_where_the_formula_says() -> None:
    q = torch.randint(0, 16, (2, 5, 256), dtype=torch.uint8)
    packed = pack_int4(q, "mxfp4")
    for k in range(256):
        inner = k % 128  # k = 32s + 16c + 8h + 2t + l
        s, c, h, t, low = inner // 32, inner // 16 % 2, inner // 8 % 2, inner // 2 % 4, inner % 2
        byte, nibble = 16 * t + 8 * c + 4 * h + 2 * low + QUARTERS[s] // 2, QUARTERS[s] % 2
        assert torch.equal(packed[:, k // 128, :, byte] >> 4 * nibble & 15, q[:, :, k]), k
    assert torch.equal(unpack_int4(packed, "mxfp4"), q.float())


def test_every_scale_is_where_the_formula_says() -> None:
    scale = torch.arange(LEAST, MOST + 1, dtype=torch.uint8)[:128].reshape(1, 4, 32)
    packed = pack_e8m0(scale, 16, 1024)
    words = packed.view(torch.int32)[0, :, :4, 0].long() & 0xFFFFFFFF  # [K/128, N]
    turned = (words << 8 | words >> 24) & 0xFFFFFFFF
    fields = torch.stack((words >> 7, words >> 23, turned >> 7, turned >> 23), -1) & 255
    assert torch.equal(fields.transpose(0, 1).reshape(4, 32), scale[0].long() + STORED_OFFSET)
    assert torch.equal(unpack_e8m0(packed)[0, :4], torch.exp2(scale[0].double() - 127).float())


@pytest.mark.parametrize("scale", [LEAST, 60, 127, MOST])
def test_codes_come_back_and_values_are_exact(scale: int) -> None:
    gate_up, down = random_codes(192, 160), random_codes(160, 96)
    gate_up.scale.fill_(scale)
    packed = pack_codes(gate_up, down, scheme="mxfp4")
    from executorch_moe.kernels import unpack_experts

    for values, codes in zip(unpack_experts(packed), (gate_up, down), strict=True):
        assert torch.equal(values, codes.dequantize())


def test_rounding_takes_the_nearest_code() -> None:
    weight = torch.randn(16, 256) * torch.exp2(torch.randint(-30, 10, (16, 1)).float())
    codes = quantize_mxfp4(weight)
    unit = torch.exp2(codes.scale.float() - 127).repeat_interleave(32, -1)
    grid = torch.tensor(VALUES + [-value for value in VALUES])
    nearest = (weight[..., None] / unit[..., None] - grid).abs().amin(-1)
    torch.testing.assert_close((weight - codes.dequantize()).abs() / unit, nearest)
    again = quantize_mxfp4(codes.dequantize())
    assert torch.equal(again.dequantize(), codes.dequantize())


def test_rounding_is_never_worse_than_that_of_torchao() -> None:
    """torchao rounds as the specification says, with one scale for each group that it does not choose."""
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor", reason="needs torchao's MX formats")
    weight = torch.randn(64, 256)
    scale, data = mx.to_mx(weight, torch.float4_e2m1fn_x2, 32)
    packed = data.view(torch.uint8)
    q = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
    theirs, ours = Mxfp4Codes(q, scale.view(torch.uint8)), quantize_mxfp4(weight)

    def error(codes: Mxfp4Codes) -> torch.Tensor:
        return (codes.dequantize() - weight).unflatten(-1, (-1, 32)).square().sum(-1)

    same = theirs.scale == ours.scale
    assert 0.3 < same.float().mean() < 1
    assert torch.equal(error(theirs)[same], error(ours)[same])
    assert (error(ours)[~same] < error(theirs)[~same]).all()


def test_a_group_of_zeros_is_packed() -> None:
    weight = torch.zeros(2, 64)
    weight[1, 5] = 1e-38
    codes = quantize_mxfp4(weight)
    codes.check("weights")
    assert not codes.q.any()
    zeros = Mxfp4Codes(torch.full((1, 1, 32), 8, dtype=torch.uint8), torch.zeros(1, 1, 1, dtype=torch.uint8))
    zeros.check("negative zeros with the least scale of e8m0")
    assert not pack_e8m0(zeros.scale, 16, 128).eq(0).all()


def test_ptx_of_the_tensor_core_decoder() -> None:
    """All halfwords, in both halves of a word, with the smallest and the largest factor and one between."""
    half = np.arange(65536)
    word = half | (half[::-1] << 16)
    for exponents in ((121, 150, 200, 254), (254, 121, 127, 220)):
        factors = [bits << 7 | bits << 23 for bits in exponents]
        for quarter, out in enumerate(run_ptx(decode_e2m1, word, *factors)):
            for shift, halves in ((0, half), (16, half[::-1])):
                code = torch.from_numpy(halves >> 4 * QUARTERS[quarter] & 15)
                expected = e2m1_values(code).double() * 2.0 ** (exponents[quarter] - 127 - 126)
                found = torch.from_numpy(((out >> shift & 0xFFFF) << 16).astype(np.uint32).view(np.float32).copy())
                assert torch.equal(found.double(), expected)
                assert torch.equal(found.signbit(), code > 7)


def test_ptx_of_the_products_with_integers() -> None:
    generator = np.random.default_rng(0)
    half = np.arange(65536)
    word = half | (half[::-1] << 16)
    x = generator.integers(-32512, 32513, (4, 2, 65536))
    pairs = [(low & 0xFFFF) | (high & 0xFFFF) << 16 for low, high in x]
    for quarter, out in enumerate(run_ptx(dot_e2m1, word, *pairs, 5, 6, 7, 8)):
        total = np.full(65536, 5 + quarter)
        for shift, halves in ((0, half), (1, half[::-1])):
            value = 2 * e2m1_values(torch.from_numpy(halves >> 4 * QUARTERS[quarter] & 15)).numpy()
            total = total + x[quarter, shift] * (value.astype(np.int64) - 112)
        assert np.array_equal((out ^ 1 << 31) - (1 << 31), total)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (255, r"the scales of gate_up hold NaN \(255\): compare the file's checksum"),
        (MOST + 1, r"the scales of gate_up hold 2\^34, but scheme mxfp4 takes 2\^-100 to 2\^33: use scheme w4a16 or"),
        (LEAST - 1, r"the scales of gate_up hold 2\^-101, but scheme mxfp4"),
    ],
)
def test_scales_that_the_layout_cannot_hold(scale: int, message: str) -> None:
    gate_up = random_codes(64, 64)
    gate_up.scale[1, 3, 1] = scale
    with pytest.raises(ValueError, match=message):
        pack_codes(gate_up, random_codes(64, 32), scheme="mxfp4")


def test_weights_that_are_too_large() -> None:
    weight = torch.ones(1, 64, 64)
    weight[0, 0, 0] = 1e12
    with pytest.raises(ValueError, match=r"the scales of gate_up of expert 7 hold 2\^\d+, but scheme mxfp4 takes"):
        pack_experts(weight, torch.ones(1, 64, 32), scheme="mxfp4", first_expert=7)


def test_codes_of_another_kind() -> None:
    integers = Int4Codes(torch.zeros(2, 64, 64, dtype=torch.int8), torch.ones(2, 64, 2))
    with pytest.raises(ValueError, match="scheme=w4a16 with gate_up and down as MXFP4 and MXFP4: scheme mxfp4 takes"):
        pack_codes(random_codes(64, 64), random_codes(64, 32))
    with pytest.raises(ValueError, match="scheme=mxfp4 with gate_up and down as 4-bit integers and MXFP4"):
        pack_codes(integers, random_codes(64, 32), scheme="mxfp4")


def test_arguments_of_the_operator() -> None:
    args = make(Case("arguments", tokens=3), "mxfp4").args()
    torch.library.opcheck(fused_experts, args)
    assert args.w13_scale is not None and args.w2_scale is not None
    for change, message in (
        ({"w13_scale": args.w13_scale.bfloat16()}, "w13_scale has dtype bfloat16, expected uint8"),
        ({"w2_scale": args.w2_scale[..., :2].contiguous()}, r"w2_scale has shape .*, 2\], expected .*, 4\]"),
        ({"group_size": 64}, "group_size=64 is not supported by scheme mxfp4"),
    ):
        with pytest.raises(ValueError, match=message):
            check_fused_experts(args._replace(**change))
    zero = torch.zeros(8, 4, 256, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match="scheme=mxfp4 has no zero points: use w4a16"):
        check_fused_experts(args._replace(w13_zero=zero, w2_zero=zero[..., :128].contiguous()))
