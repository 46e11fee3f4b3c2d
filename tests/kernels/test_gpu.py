"""The kernels on a GPU: the interpreter's cases, error bounds on the qwen35 shape, and bit-exact schedules and PTX."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from executorch_moe.kernels import SCHEMES, fused_experts
from executorch_moe.kernels.experts.plan import Options
from executorch_moe.kernels.measure.timing import LayerInputs, make_layers
from executorch_moe.kernels.packing.mxfp4 import e2m1_values
from executorch_moe.kernels.reference import reference_experts
from executorch_moe.kernels.schemes import Scheme
from executorch_moe.kernels.shapes import SHAPES
from executorch_moe.kernels.tuning.configs import GemmConfig, MatvecConfig

from .cases import BOUNDS, CASES, ZERO_CASE, Case, make, relative_error

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("path", ["grouped", "few_tokens", None])
def test_operator_against_the_oracle(case: Case, scheme: str, path: str | None) -> None:
    from executorch_moe.kernels.experts.plan import run_fused_experts

    problem = make(case, scheme)
    args = problem.args("cuda")
    out = fused_experts(*args) if path is None else run_fused_experts(args, options=Options(path=path))
    assert relative_error(out, problem.expected) <= BOUNDS[scheme]


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s != "bf16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matvec_against_the_oracle(case: Case, scheme: str) -> None:
    from executorch_moe.kernels.experts.plan import run_fused_experts

    problem = make(case, scheme)
    out = run_fused_experts(problem.args("cuda"), options=Options(path="matvec"))
    assert relative_error(out, problem.expected) <= min(BOUNDS[scheme], 4.5e-3)


@pytest.mark.parametrize("path", ["grouped", "few_tokens", "matvec"])
def test_zero_points(path: str) -> None:
    from executorch_moe.kernels.experts.plan import run_fused_experts

    problem = make(ZERO_CASE, "w4a16")
    out = run_fused_experts(problem.args("cuda"), options=Options(path=path))
    assert relative_error(out, problem.expected) <= BOUNDS["w4a16"]


def layer_error(layer: LayerInputs, out: torch.Tensor) -> float:
    """Relative L2 error of one layer's output against the reference, computed expert by expert to save memory."""
    expected = torch.zeros_like(out, dtype=torch.float32)
    for expert in layer.topk_ids.unique().tolist():
        gate_up, down = layer.dequantized(expert)
        ids = torch.where(layer.topk_ids == expert, 0, -1)
        expected += reference_experts(layer.hidden_states, ids, layer.topk_weights, gate_up[None], down[None])
    return relative_error(out, expected.cpu())


@pytest.mark.parametrize("tokens", [1, 4, 16, 33, 64, 512, 1642])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_error_bounds_on_the_qwen35_shape(scheme: str, tokens: int) -> None:
    layer = make_layers(SHAPES["qwen35"], scheme, tokens, 1)[0]
    assert layer_error(layer, fused_experts(*layer.args())) <= BOUNDS[scheme]


@pytest.mark.parametrize("group_size_m", [1, 8, 16, 32])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_schedules_and_repeats_give_the_same_bits(scheme: str, group_size_m: int) -> None:
    layer = make_layers(SHAPES["qwen35"], scheme, 700, 1)[0]
    for block_m, block_n, warps in ((16, 128, 4), (64, 128, 4), (64, 256, 8)):
        if scheme == "bf16" and block_n == 256:
            continue
        config = GemmConfig(block_m, block_n, group_size_m, warps, 2)
        outs = [
            layer.run(Options(path="grouped", persistent=persistent, gemm1=config, gemm2=config))
            for persistent in (True, False, True)
        ]
        assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


@pytest.mark.parametrize(("block_n", "warps"), [(32, 2), (64, 2), (128, 4), (256, 4)])
@pytest.mark.parametrize("tokens", [1, 2, 8])
def test_few_token_tiles_of_any_height(tokens: int, block_n: int, warps: int) -> None:
    layer = make_layers(SHAPES["qwen35"], "w4a16", tokens, 1)[0]
    tile = GemmConfig(8, block_n, 1, warps, 3, 2, scale_after=True)
    out = layer.run(Options(path="few_tokens", gemm1=tile, gemm2=tile))
    assert layer_error(layer, out) <= BOUNDS["w4a16"]


@pytest.mark.parametrize("sizes", [(16, 8, 64), (16, 8, 8), (32, 8, 16), (32, 16, 64), (64, 8, 16)], ids=str)
@pytest.mark.parametrize(
    ("scheme", "group_size"), [*((s, g) for s in ("w4a16", "w4a8") for g in (32, 64, 128)), ("mxfp4", 32)]
)
def test_matvec_of_any_size(scheme: str, group_size: int, sizes: tuple[int, int, int]) -> None:
    shape = replace(SHAPES["qwen3"], group_size=group_size)
    layer = make_layers(shape, scheme, 2, 1)[0]
    out = layer.run(Options(path="matvec", matvec=(MatvecConfig(*sizes), MatvecConfig(*sizes))))
    assert layer_error(layer, out) <= BOUNDS["w4a16"]


@pytest.mark.parametrize("path", ["few_tokens", "matvec"])
def test_few_tokens_repeat_bit_for_bit(path: str) -> None:
    layer = make_layers(SHAPES["qwen35"], "w4a16", 4, 1)[0]
    options = Options(path=path)
    assert torch.equal(layer.run(options), layer.run(options))


@pytest.mark.parametrize("act_group", [128, 256, 1024])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_int8_activations_in_both_gemms(monkeypatch: pytest.MonkeyPatch, act_group: int, group_size: int) -> None:
    from executorch_moe.kernels import schemes
    from executorch_moe.kernels.experts.plan import run_fused_experts

    monkeypatch.setitem(schemes.SCHEMES, "all-int8", Scheme("all-int8", 4, act_group, act_group))
    case = Case("int8", tokens=70, hidden=384, intermediate=256, group_size=group_size)
    problem = make(case, "all-int8")
    out = run_fused_experts(problem.args("cuda"), options=Options(path="grouped"))
    assert relative_error(out, problem.expected) <= 2.5e-2


@pytest.mark.parametrize("zero", [False, True])
def test_ptx_decoding_equals_its_portable_twin_bit_for_bit(zero: bool) -> None:
    """All 65536 halfwords against every exponent of scale that quantization can produce."""
    import triton

    from .decode_kernel import decode_both

    half = torch.arange(65536, dtype=torch.int32, device="cuda").to(torch.int16)
    scale = (
        torch.randn(4, 65536, device="cuda") * torch.exp2(torch.randint(-20, 4, (4, 65536), device="cuda"))
    ).bfloat16()
    zeros = (torch.randn(4, 65536, device="cuda") * scale.float()).bfloat16()
    ptx = torch.empty(4, 65536, dtype=torch.bfloat16, device="cuda")
    twin = torch.empty_like(ptx)
    decode_both[(triton.cdiv(65536, 1024),)](half, scale, zeros, ptx, twin, HAS_ZERO=zero)
    if zero:  # the portable form rounds twice if an exact sum needs more than 24 bits: allow one step
        differs = ptx.view(torch.int16).int() - twin.view(torch.int16).int()
        assert differs.abs().max() <= 1 and (differs != 0).float().mean() < 1e-3
    else:
        assert torch.equal(ptx.view(torch.int16), twin.view(torch.int16))


def test_int8_decoding_equals_its_portable_twin_bit_for_bit() -> None:
    """All bytes and all multiples. Low nibbles are also compared with plain arithmetic."""
    from .decode_kernel import decode_bytes_both

    byte = torch.arange(256, dtype=torch.int32, device="cuda").to(torch.int8)
    out = torch.empty(4, 17, 256, dtype=torch.int8, device="cuda")
    decode_bytes_both[(17,)](byte, out)
    assert torch.equal(out[0], out[2]) and torch.equal(out[1], out[3])
    nibble = torch.arange(256, device="cuda") % 16
    codes = torch.where(nibble < 8, nibble, nibble - 16)
    assert torch.equal(out[0].long(), torch.arange(17, device="cuda")[:, None] * codes)


def test_mxfp4_decoding_equals_its_portable_twin_bit_for_bit() -> None:
    """All halfwords, with the factors of all scales that can be packed."""
    from .decode_kernel import decode_e2m1_both

    half = torch.arange(65536, dtype=torch.int32, device="cuda").to(torch.int16)
    exponent = torch.randint(121, 255, (4, 65536), dtype=torch.int32, device="cuda")
    factor = (exponent << 7).to(torch.int16).view(torch.bfloat16)
    ptx = torch.empty(4, 65536, dtype=torch.bfloat16, device="cuda")
    twin = torch.empty_like(ptx)
    decode_e2m1_both[(64,)](half, factor, ptx, twin)
    assert torch.equal(ptx.view(torch.int16), twin.view(torch.int16))
    values = e2m1_values(torch.arange(65536, device="cuda") >> 12).double() * torch.exp2(exponent[0].double() - 253)
    assert torch.equal(ptx[0].double(), values)


def test_mxfp4_products_with_integers_equal_their_portable_twin() -> None:
    from .decode_kernel import dot_e2m1_both

    g = torch.Generator("cuda").manual_seed(0)
    word = torch.randint(-(2**31), 2**31, (65536,), device="cuda", generator=g).to(torch.int32)
    x = torch.randint(-32512, 32513, (2, 4, 65536), device="cuda", generator=g)
    pairs = ((x[0] & 0xFFFF) | (x[1] << 16)).to(torch.int32)
    ptx = torch.empty(4, 65536, dtype=torch.int32, device="cuda")
    twin = torch.empty_like(ptx)
    dot_e2m1_both[(64,)](word, pairs, ptx, twin)
    assert torch.equal(ptx, twin)


@pytest.mark.parametrize("tokens", [1, 4, 16, 64, 512])
def test_mxfp4_on_the_gpt_oss_shape(tokens: int) -> None:
    layer = make_layers(SHAPES["gpt-oss"], "mxfp4", tokens, 1)[0]
    out = layer.run()
    assert layer_error(layer, out) <= BOUNDS["mxfp4"]
    assert torch.equal(out, layer.run())
    if tokens >= 64:
        assert torch.equal(layer.run(Options(path="grouped")), layer.run(Options(path="grouped", persistent=False)))


def test_no_tokens() -> None:
    args = make(Case("none", tokens=2), "w4a16").args("cuda")
    assert fused_experts(args[0][:0], args[1][:0], args[2][:0], *args[3:]).shape == (0, 128)  # type: ignore[index]


def test_opcheck_on_the_gpu() -> None:
    args = make(Case("opcheck", tokens=40), "w4a16").args("cuda")
    torch.library.opcheck(fused_experts, args)


def test_mixed_devices_are_refused() -> None:
    args = list(make(Case("mixed", tokens=3), "w4a16").args("cuda"))
    args[3] = args[3].cpu()  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="w13 is on cpu but hidden_states is on cuda"):
        fused_experts(*args)
