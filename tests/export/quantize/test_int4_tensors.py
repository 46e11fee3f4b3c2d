"""4-bit weights of torchao and ExecuTorch: packed layers have exactly the values of their own dequantization."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from executorch.extension.llm.export import ExportableInt4Tensor
from executorch.extension.llm.export.quant.quantize import _to_int4_tensor
from executorch.extension.llm.export.quant.recipe import QuantConfig
from torch import Tensor, nn
from torchao.quantization import Int4Tensor, IntxUnpackedToInt8Tensor
from torchao.quantization.quant_primitives import MappingType

from executorch_moe.export.quantize.experts import ExecutorchExperts, holds_codes, quantize_experts_
from executorch_moe.export.quantize.int4_tensors import (
    executorch_codes,
    int4_codes,
    is_quantized,
    pack_executorch_experts,
)
from executorch_moe.kernels import FusedExperts, pack_codes, unpack_experts
from executorch_moe.kernels.reference import reference_experts

from ..families import by_name, tokens

E, H, WIDTH = 4, 64, 32


def nibbles(codes: Tensor) -> Tensor:
    """[..., K] integers -> [..., K/2] bytes, even k in the low nibble, one by one."""
    out = torch.zeros(*codes.shape[:-1], codes.shape[-1] // 2, dtype=torch.int32)
    for k in range(codes.shape[-1]):
        out[..., k // 2] += (codes[..., k].int() & 0xF) << (4 * (k % 2))
    return out.to(torch.uint8)


def torchao_int4(weight: Tensor, group_size: int) -> tuple[Int4Tensor, Tensor]:
    """torchao's asymmetric tensor and its values. The quantizer is in mslk, a package for CUDA.

    Its codes are 0 at the group's minimum, 8 is subtracted for storage, and zero_point is minimum + 8 * scale.
    """
    grouped = weight.float().unflatten(-1, (-1, group_size))
    low, high = grouped.amin(-1, True), grouped.amax(-1, True)
    scale = ((high - low) / 15).bfloat16().float()
    zero = (low + 8 * scale).bfloat16().float()
    codes = ((grouped - low) / scale).round().clamp(0, 15)
    values = codes * scale + (zero - 8 * scale)  # the dequantization of torchao/prototype/gptq/api.py
    tensor = Int4Tensor(
        nibbles((codes - 8).flatten(-2)).view(torch.int8),
        scale[..., 0].transpose(-1, -2).bfloat16().contiguous(),
        zero[..., 0].transpose(-1, -2).bfloat16().contiguous(),
        [1] * (weight.dim() - 1) + [group_size],
        weight.shape,
    )
    return tensor, values.flatten(-2)


def intx(weight: Tensor, group_size: int, bits: torch.dtype = torch.int4, **options: Any) -> IntxUnpackedToInt8Tensor:
    return IntxUnpackedToInt8Tensor.from_hp(weight, (1, group_size), bits, **options)


def executorch_int4(weight: Tensor, group_size: int, symmetric: bool) -> Int4Tensor:
    """torchao's class as ExecuTorch makes it: unsigned codes, zero points in units of a code."""
    grouped = weight.float().unflatten(-1, (-1, group_size))
    config = QuantConfig(bits=4, group_size=group_size, symmetric=symmetric, method="min_max")
    if symmetric:
        scale = (grouped.abs().amax(-1) / 7).bfloat16()
        zero = torch.zeros_like(scale)
    else:
        scale = ((grouped.amax(-1) - grouped.amin(-1)) / 15).bfloat16()
        zero = (-grouped.amin(-1) / scale.float()).round().bfloat16()
    low, high = (-8, 7) if symmetric else (0, 15)
    codes = (grouped / scale.float()[..., None] + zero.float()[..., None]).round().clamp(low, high)
    return _to_int4_tensor(codes.flatten(-2).to(torch.int8), scale, zero, config)


def test_torchao_int4_tensors_of_three_dimensions() -> None:
    weight = torch.randn(E, 2 * WIDTH, H) + 0.3
    tensor, values = torchao_int4(weight, 32)
    assert tensor.qdata.dtype == torch.int8 and (values - weight).norm() < 0.1 * weight.norm()
    codes = int4_codes(tensor)
    assert codes.q.shape == (E, 2 * WIDTH, H) and codes.zero is not None and codes.group_size == 32
    torch.testing.assert_close(codes.dequantize(), values, rtol=1e-6, atol=1e-6)
    assert torch.equal(codes.zero, tensor.zero_point.transpose(1, 2))


def test_the_codes_of_torchaos_own_unpacking() -> None:
    pack = pytest.importorskip("torchao.prototype.gptq.api")
    tensor, _ = torchao_int4(torch.randn(6, H), 32)
    codes = int4_codes(tensor)
    expected = pack._int4_row_dequantize_zp(codes.q, tensor.scale.float(), tensor.zero_point.float(), 32)
    torch.testing.assert_close(codes.dequantize(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("symmetric", [False, True])
def test_executorch_int4_tensors(symmetric: bool) -> None:
    tensor = executorch_int4(torch.randn(6, H) + 0.3, 32, symmetric)
    exportable = ExportableInt4Tensor.from_int4_tensor(tensor)
    expected = exportable.dequantize(torch.float32)
    for given in (tensor, exportable):
        codes = int4_codes(given)
        assert (codes.zero is None) == symmetric
        # A zero point in units of a code becomes a product, whose relative rounding error in bf16 is at most 2^-9.
        bound = 0.0 if symmetric else float((8 * tensor.scale.float()).max() * 2**-8)
        assert float((codes.dequantize() - expected).abs().max()) <= bound


@pytest.mark.parametrize("mapping", [MappingType.SYMMETRIC, MappingType.ASYMMETRIC])
def test_stacked_torchao_tensors(mapping: MappingType) -> None:
    experts = [intx(torch.randn(6, H).bfloat16() + 0.3, 32, mapping_type=mapping) for _ in range(E)]
    codes = int4_codes(experts)
    expected = torch.stack([expert.dequantize().float() for expert in experts])
    assert codes.q.shape == (E, 6, H) and (codes.zero is None) == (mapping == MappingType.SYMMETRIC)
    torch.testing.assert_close(codes.dequantize(), expected, rtol=0.01, atol=0.01)
    for stacked, expert in zip(codes.q, experts, strict=True):
        assert torch.equal(stacked, expert.qdata)


def test_stacked_tensors_of_several_group_sizes() -> None:
    one, one_values = torchao_int4(torch.randn(6, H), 64)
    other, other_values = torchao_int4(torch.randn(6, H), 32)
    codes = int4_codes([one, other])
    assert codes.group_size == 32
    torch.testing.assert_close(codes.dequantize(), torch.stack([one_values, other_values]), rtol=1e-6, atol=1e-6)


def executorch_matrix(n: int, k: int, group_size: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes, scales and values, by the formula of ExecuTorch's kernels: (nibble - 8) * scale."""
    unsigned = torch.randint(0, 16, (E, n, k))
    scale = (torch.rand(E, n, k // group_size) / 16).bfloat16()
    values = (unsigned - 8).float() * scale.float().repeat_interleave(group_size, -1)
    return nibbles(unsigned).view(torch.int8), scale, values


@pytest.mark.parametrize(("scheme", "group_size"), [("w4a16", 32), ("w4a8", H)])
def test_executorchs_packed_experts(scheme: str, group_size: int) -> None:
    w1, w1_scale, gate_up = executorch_matrix(2 * WIDTH, H, group_size)
    w2, w2_scale, down = executorch_matrix(H, WIDTH)
    packed = pack_executorch_experts(w1, w1_scale, w2, w2_scale, scheme=scheme)
    assert packed.w13_zero is None
    for stored, values in zip(unpack_experts(packed), (gate_up, down), strict=True):
        assert torch.equal(stored, values)


def test_w4a8_does_not_take_just_any_scales() -> None:
    w1, w1_scale, _ = executorch_matrix(2 * WIDTH, H)
    w2, w2_scale, _ = executorch_matrix(H, WIDTH)
    with pytest.raises(ValueError, match=r"1 to 16 times one scale of the row.*use w4a16, or the original weights"):
        pack_executorch_experts(w1, w1_scale, w2, w2_scale, scheme="w4a8")


def test_executorchs_experts_are_swapped_in_its_own_model() -> None:
    example = pytest.importorskip("executorch.examples.models.qwen3_5_moe.model")
    config = type("Config", (), {"num_experts": E, "moe_intermediate_size": WIDTH, "hidden_size": H})
    module = example.FusedMoEExperts(config)
    del module.w1_weight, module.w2_weight
    values = []
    for name, (n, k) in (("w1", (2 * WIDTH, H)), ("w2", (H, WIDTH))):
        packed, scale, dequantized = executorch_matrix(n, k)
        module.register_buffer(name, packed)
        module.register_buffer(f"{name}_scale", scale)
        values.append(dequantized)
    model = quantize_experts_(nn.ModuleDict({"experts": module}), "w4a16")
    assert isinstance(model["experts"], ExecutorchExperts)
    x, ids, weights = torch.randn(5, H).bfloat16(), torch.randint(0, E, (5, 2)), torch.rand(5, 2)
    actual = model["experts"](x, weights, ids, 2)
    expected = reference_experts(x, ids, weights, *values)
    assert (actual - expected).norm() / expected.norm() < 0.01


def quantized_model(quantize: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """A Mixtral whose experts are quantized tensors, and their values by name."""
    model, values = by_name("mixtral").model(), {}
    experts = model.model.layers[0].mlp.experts
    for name in ("gate_up_proj", "down_proj"):
        tensor, values[name] = quantize(torch.randn(getattr(experts, name).shape) / 8)
        setattr(experts, name, nn.Parameter(tensor, requires_grad=False))
    assert holds_codes(experts)
    return model, values


def test_a_model_with_quantized_experts_keeps_their_codes() -> None:
    model, values = quantized_model(lambda weight: torchao_int4(weight, 32))
    quantize_experts_(model, "w4a16", group_size=64)  # ignored: the tensors have groups
    (experts,) = (module for module in model.modules() if isinstance(module, FusedExperts))
    assert experts.group_size == 32
    for stored, name in zip(unpack_experts(experts.packed()), values, strict=True):
        torch.testing.assert_close(stored, values[name], rtol=1e-6, atol=1e-6)

    unquantized = by_name("mixtral").model()
    for name in values:
        getattr(unquantized.model.layers[0].mlp.experts, name).data = values[name]
    with torch.no_grad():
        actual, expected = (m(input_ids=tokens(9), use_cache=False).logits for m in (model, unquantized))
    assert (actual - expected).norm() / expected.norm() < 0.01


def test_w4a8_takes_symmetric_tensors_only() -> None:
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts: scheme=w4a8 multiplies in int8 and takes no zero"):
        quantize_experts_(quantized_model(lambda weight: torchao_int4(weight, 32))[0], "w4a8")

    def symmetric(weight: Tensor) -> tuple[IntxUnpackedToInt8Tensor, Tensor]:
        group_size = weight.shape[-1] if weight.shape[-1] == H else 32  # one scale for each row of gate and up
        experts = [intx(expert, group_size) for expert in weight]
        parts = [
            torch.stack([getattr(expert, part) for expert in experts]) for part in ("qdata", "scale", "zero_point")
        ]
        tensor = IntxUnpackedToInt8Tensor(*parts, torch.int4, (1, 1, group_size), weight.dtype, None)
        return tensor, torch.stack([expert.dequantize() for expert in experts])

    model, values = quantized_model(symmetric)
    quantize_experts_(model, "w4a8")
    (experts,) = (module for module in model.modules() if isinstance(module, FusedExperts))
    for stored, name in zip(unpack_experts(experts.packed()), values, strict=True):
        torch.testing.assert_close(stored, values[name], rtol=0.005, atol=0)


def test_some_weights_quantized_and_some_not() -> None:
    model, _ = quantized_model(lambda weight: torchao_int4(weight, 32))
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = nn.Parameter(torch.randn(experts.down_proj.shape))
    with pytest.raises(ValueError, match="down_proj is not quantized but other weights are"):
        quantize_experts_(model)


def test_gpt_oss_stores_groups_along_the_output() -> None:
    model = by_name("gpt_oss").model()
    experts = model.model.layers[0].mlp.experts
    for name in ("gate_up_proj", "down_proj"):
        tensor, _ = torchao_int4(getattr(experts, name).detach(), 32)
        setattr(experts, name, nn.Parameter(tensor, requires_grad=False))
    with pytest.raises(ValueError, match=r"down_proj is stored \[E, in, out\], so its groups do not run along K"):
        quantize_experts_(model)


def changed(**fields: Any) -> Int4Tensor:
    tensor, _ = torchao_int4(torch.randn(6, H), 32)
    for name, value in fields.items():
        setattr(tensor, name, value)
    return tensor


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (torch.randn(4, 4), NotImplementedError, "Tensor cannot be packed as a 4-bit tensor: use Int4Tensor"),
        (intx(torch.randn(4, H), 32, torch.int8), NotImplementedError, "target_dtype=torch.int8: use torch.int4"),
        (changed(act_pre_scale=torch.ones(H)), NotImplementedError, "act_pre_scale, a scale of its input"),
        (changed(block_size=[2, 32]), ValueError, r"block_size=\[2, 32\].*only groups along the last dimension"),
        ([changed(), torchao_int4(torch.randn(7, H), 32)[0]], ValueError, r"shapes \[6, 64\], \[7, 64\]: pass one"),
        ([], ValueError, "shapes none: pass one 2-D tensor for each expert"),
    ],
)
def test_what_cannot_be_packed(weight: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        int4_codes(weight)


def test_executorchs_packed_experts_of_the_wrong_shape() -> None:
    with pytest.raises(ValueError, match=r"are not ExecuTorch's packed experts: pass int8 \[E, N, K/2\]"):
        executorch_codes(torch.zeros(2, 4, 16, dtype=torch.int8), torch.zeros(2, 5, 1))
    codes = executorch_codes(torch.zeros(1, 4, 8, dtype=torch.int8), torch.zeros(1, 4, 1))
    with pytest.raises(ValueError, match="do not belong together"):
        pack_codes(codes, codes)
    assert not is_quantized(torch.zeros(1))
