"""Half-quadratic quantization: errors of groups, scales for int8 products, and packing of its codes."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest
import torch

from executorch_moe.kernels import (
    Int4Codes,
    PackedExperts,
    fused_experts,
    pack_codes,
    pack_experts,
    stack_experts,
    unpack_experts,
)
from executorch_moe.kernels.packing import rounding
from executorch_moe.kernels.packing.rounding import HQQ_NORM, quantize_hqq, round_weights
from executorch_moe.kernels.reference import reference_experts
from executorch_moe.kernels.schemes import max_scale_ratio

from . import cases

ZEROS = [False, True]


def heavy_tailed(*shape: int) -> torch.Tensor:
    return torch.distributions.StudentT(4.0).sample(shape) * 0.02


def loss(codes: Int4Codes, weight: torch.Tensor) -> torch.Tensor:
    """The l_p norm of each group's residual, raised to the power p."""
    return (codes.dequantize() - weight).unflatten(-1, (-1, codes.group_size)).abs().pow(HQQ_NORM).sum(-1)


@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_no_group_is_worse_than_min_max_and_the_whole_is_better(
    zeros: bool, group_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = heavy_tailed(48, 256)
    better = quantize_hqq(weight, group_size, zeros)
    monkeypatch.setattr(rounding, "HQQ_ROUNDS", 1)  # one round gives min-max
    start = quantize_hqq(weight, group_size, zeros)
    assert (loss(better, weight) <= loss(start, weight) * (1 + 1e-5)).all()
    assert loss(better, weight).sum() < 0.97 * loss(start, weight).sum()
    assert (better.dequantize() - weight).norm() < 0.97 * (start.dequantize() - weight).norm()


def test_one_round_without_zeros_is_min_max(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "HQQ_ROUNDS", 1)
    weight = heavy_tailed(16, 128)
    codes, nearest = quantize_hqq(weight, 32, False), round_weights(weight, 32)
    assert torch.equal(codes.q, nearest.q) and torch.equal(codes.scale, nearest.scale) and codes.zero is None


@pytest.mark.parametrize("zeros", ZEROS)
def test_codes_are_the_nearest_ones_for_what_is_stored(zeros: bool) -> None:
    weight = heavy_tailed(8, 128)
    codes = quantize_hqq(weight, 32, zeros)
    assert codes.scale.dtype == torch.bfloat16 and (codes.zero is not None) == zeros
    grouped = weight.unflatten(-1, (-1, 32))[..., None]
    grid = torch.arange(-8, 8).float() * codes.scale.float()[..., None, None]
    if codes.zero is not None:
        grid = grid + codes.zero.float()[..., None, None]
    error = (codes.dequantize() - weight).abs().unflatten(-1, (-1, 32))
    torch.testing.assert_close(error, (grouped - grid).abs().amin(-1), atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("zeros", ZEROS)
def test_the_scale_of_the_weights_does_not_matter(zeros: bool) -> None:
    weight = heavy_tailed(8, 128)
    one, other = quantize_hqq(weight, 32, zeros), quantize_hqq(weight * 2.0**-9, 32, zeros)
    assert torch.equal(one.q, other.q) and torch.equal(one.scale * 2.0**-9, other.scale)


@pytest.mark.parametrize("zeros", ZEROS)
def test_groups_without_a_range(zeros: bool) -> None:
    weight = torch.zeros(2, 64)
    weight[0, 32:] = 0.75
    codes = quantize_hqq(weight, 32, zeros)
    torch.testing.assert_close(codes.dequantize(), weight, atol=0.003, rtol=0)
    assert not codes.dequantize()[1].any()


@pytest.mark.parametrize(("zeros", "row_scaled"), [(True, False), (False, True)])
def test_rows_in_blocks_are_rows_at_once(zeros: bool, row_scaled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = heavy_tailed(11, 128)
    whole = round_weights(weight, 32, "hqq", zeros, row_scaled)
    monkeypatch.setattr(rounding, "_CHUNK_ELEMENTS", 300)
    parts = round_weights(weight, 32, "hqq", zeros, row_scaled)
    assert (whole.zero is not None) == zeros and (whole.row_scale is not None) == row_scaled
    for a, b in zip(vars(whole).values(), vars(parts).values(), strict=True):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("algorithm", ["minmax", "hqq"])
def test_scales_of_int8_products_are_multiples_of_their_rows(algorithm: str) -> None:
    weight = heavy_tailed(64, 512)
    weight[3], weight[5, :64] = 0, 0
    codes = round_weights(weight, 64, algorithm, row_scaled=True)
    assert codes.scale.dtype == torch.bfloat16 and codes.row_scale is not None and codes.row_scale.shape == (64, 1)
    assert torch.equal(codes.scale, codes.scale.round().clamp(1, 16))
    assert codes.scale.amax(-1).ge(13).float().mean() > 0.9  # the range is used
    products = codes.q.float().unflatten(-1, (-1, 64)) * codes.scale.float()[..., None]
    assert products.abs().max() <= 128 and products.max() <= 127
    assert not codes.dequantize()[3].any() and not codes.dequantize()[5, :64].any()
    free = round_weights(weight, 64, algorithm)
    assert (codes.dequantize() - weight).norm() < (free.dequantize() - weight).norm()


@pytest.mark.parametrize("k_pad", [128, 384, 2048, 2944, 4096, 7168, 8192, 8320, 16384, 131072])
def test_no_sum_overflows_in_any_units(k_pad: int) -> None:
    """The largest sum (activations 127, products 128) fits int32 in units of the smallest scale; twice it does not."""
    largest = k_pad * 127 * 128 * max_scale_ratio(k_pad)
    assert largest < 2**31 <= 2 * largest


def test_codes_whose_scales_are_multiples_of_their_rows_keep_their_values() -> None:
    q = torch.randint(-8, 8, (2, 128, 256), dtype=torch.int8)
    row = torch.rand(2, 128, 1).bfloat16()
    multiples = torch.randint(1, 17, (2, 128, 4))
    for scale in (row, multiples * 2.0 ** (-8 * row).round(), torch.zeros(2, 128, 1)):
        codes = Int4Codes(q, scale.bfloat16())
        found = codes.row_scaled()
        assert found.row_scale is not None and found.row_scale.shape == (2, 128, 1)
        assert torch.equal(found.dequantize(), codes.dequantize())
    down = Int4Codes(torch.randint(-8, 8, (2, 256, 64), dtype=torch.int8), torch.rand(2, 256, 1).bfloat16())
    gate_up = Int4Codes(q, row)
    packed = pack_codes(gate_up, down, scheme="w4a8")
    for stored, given in zip(unpack_experts(packed), (gate_up, down), strict=True):
        assert torch.equal(stored, given.dequantize())
    with pytest.raises(
        ValueError, match=r"1 to 16 times one scale of the row, and \d+ of 256 rows have others: use w4a16"
    ):
        pack_codes(Int4Codes(q, torch.rand(2, 128, 4).bfloat16()), down, scheme="w4a8")


@pytest.mark.parametrize(("scheme", "zeros"), [("w4a16", True), ("w4a8", False)])
def test_a_packed_layer_holds_what_was_chosen(scheme: str, zeros: bool) -> None:
    gate_up, down = heavy_tailed(3, 2 * 96, 160), heavy_tailed(3, 160, 96)
    packed = pack_experts(gate_up, down, scheme=scheme, group_size=32, algorithm="hqq")
    assert (packed.w13_zero is not None) == (packed.w2_zero is not None) == zeros
    for stored, weight in zip(unpack_experts(packed), (gate_up, down), strict=True):
        row_scaled = scheme == "w4a8" and weight is gate_up
        expected = round_weights(weight, 32, "hqq", zeros, row_scaled).dequantize()
        torch.testing.assert_close(stored, expected, rtol=0, atol=0)


@pytest.mark.parametrize("scheme", ["w4a16", "w4a8"])
def test_the_operator_runs_on_it(scheme: str) -> None:
    gate_up, down = torch.randn(4, 2 * 128, 128) / 12, torch.randn(4, 128, 128) / 12
    packed = pack_experts(gate_up, down, scheme=scheme, group_size=32, algorithm="hqq")
    x, ids = torch.randn(9, 128).bfloat16(), torch.stack([torch.randperm(4)[:2] for _ in range(9)])
    weights = torch.rand(9, 2)
    actual = fused_experts(*packed.arguments(x, ids, weights))
    expected = reference_experts(x, ids, weights, *unpack_experts(packed))
    assert cases.relative_error(actual, expected) < (0.02 if scheme == "w4a8" else 0.006)


def test_codes_are_packed_without_rounding() -> None:
    def codes(n: int, k: int, group_size: int, zeros: bool) -> Int4Codes:
        scale = torch.rand(2, n, k // group_size).bfloat16()
        zero = torch.randn(2, n, k // group_size).bfloat16() if zeros else None
        return Int4Codes(torch.randint(-8, 8, (2, n, k), dtype=torch.int8), scale, zero)

    gate_up, down = codes(128, 128, 128, True), codes(128, 64, 32, False)
    packed = pack_codes(gate_up, down)
    assert packed.group_size == 32  # divides both
    for stored, given in zip(unpack_experts(packed), (gate_up, down), strict=True):
        assert torch.equal(stored, given.dequantize())
    with pytest.raises(ValueError, match=r"scheme=w4a8 multiplies in int8 and takes no zero points.*use w4a16"):
        pack_codes(gate_up, down, scheme="w4a8")
    with pytest.raises(ValueError, match="scheme=bf16 holds no 4-bit codes: use w4a16"):
        pack_codes(gate_up, down, scheme="bf16")


def test_stacking_keeps_one_part_at_a_time() -> None:
    gate_up, down = heavy_tailed(6, 128, 64), heavy_tailed(6, 64, 64)
    made: list[weakref.ref[torch.Tensor]] = []

    def parts() -> Iterator[PackedExperts]:
        for expert in range(6):
            assert sum(ref() is not None for ref in made) <= 1
            part = pack_experts(gate_up[expert : expert + 1], down[expert : expert + 1], group_size=32)
            made.append(weakref.ref(part.w13))
            yield part

    stacked, whole = stack_experts(parts(), 6), pack_experts(gate_up, down, group_size=32)
    for name, tensor in whole.tensors().items():
        assert tensor is None or torch.equal(stacked.tensors()[name], tensor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"algorithm": "gptq"}, "algorithm='gptq' is unknown: use one of minmax, hqq"),
        ({"gate_up": torch.zeros(0, 128, 64), "down": torch.zeros(0, 64, 64)}, "pass at least one expert"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_experts(**{"gate_up": torch.zeros(1, 128, 64), "down": torch.zeros(1, 64, 64), "group_size": 32, **change})
