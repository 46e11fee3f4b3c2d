"""NVFP4 and MXFP4: weights quantized by the package compressed-tensors; GPT-OSS against transformers' conversion."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from executorch_moe.export.options import ExportOptions
from executorch_moe.export.report.stored_weights import stored_weights
from executorch_moe.kernels import unpack_experts
from executorch_moe.kernels.packing.fragments import deinterleave_gate_up, unpack_int4
from executorch_moe.kernels.packing.mxfp4 import unpack_e8m0

from ...families import Logits, tokens
from .stored import GATE, LAYERS, Saved, edit, edit_json, experts_of, logits_error, save, save_gpt_oss, streamed

pytest.importorskip("compressed_tensors", reason="needs the package compressed-tensors")

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def by_package(weight: Tensor, form: str) -> tuple[dict[str, Tensor], Tensor, dict[str, Any]]:
    """The package's tensors for a weight, what it makes of them again, and its declaration."""
    from compressed_tensors.compressors import MXFP4PackedCompressor, NVFP4PackedCompressor
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    from .test_compressed_tensors import scheme_of

    nv = form.startswith("nvfp4")
    size, compressor = (16, NVFP4PackedCompressor) if nv else (32, MXFP4PackedCompressor)
    kind = {"strategy": "tensor_group", "scale_dtype": F8} if nv else {"strategy": "group", "scale_dtype": torch.uint8}
    scheme, declaration = scheme_of(form, num_bits=4, type="float", symmetric=True, group_size=size, **kind)
    grouped = weight.unflatten(-1, (-1, size))
    low, high = grouped.amin(-1), grouped.amax(-1)
    state: dict[str, Any] = {"weight": weight}
    if nv:
        state["weight_global_scale"] = generate_gparam(weight.min(), weight.max())
    state["weight_scale"], _ = calculate_qparams(low, high, scheme.weights, state.get("weight_global_scale"))
    stored = compressor.compress(state, scheme)
    made = compressor.decompress(stored, scheme)["weight"]
    return stored, made, declaration


F8 = torch.float8_e4m3fn


def save_fp4(folder: Path, form: str, *, modelopt: bool = False) -> Saved:
    declarations = []

    def quantize(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        stored, values, declaration = by_package(weight, form)
        declarations.append(declaration)
        if modelopt:
            whole = 1 / stored["weight_global_scale"].reshape(())
            stored = {
                "weight": stored["weight_packed"],
                "weight_scale": stored["weight_scale"],
                "weight_scale_2": whole,
            }
            stored["input_scale"] = torch.ones(())
        return stored, values

    saved = save(folder, quantize, {"quant_method": "modelopt", "quant_algo": "NVFP4"} if modelopt else {})
    if not modelopt:
        edit_json(folder / "config.json", quantization_config=declarations[0])
    return saved


@pytest.mark.parametrize(
    ("form", "modelopt"),
    [("nvfp4-pack-quantized", False), ("nvfp4-pack-quantized", True), ("mxfp4-pack-quantized", False)],
    ids=["NVFP4", "modelopt", "MXFP4"],
)
def test_values_are_those_of_the_package(form: str, modelopt: bool, tmp_path: Path) -> None:
    saved = save_fp4(tmp_path, form, modelopt=modelopt)
    model = streamed(tmp_path)
    (record,) = model.load()
    assert record.algorithm == "minmax" and 0.03 < (record.error or 0) < 0.15
    for projection in ("q", "k", "v", "o"):
        name = f"{LAYERS}self_attn.{projection}_proj.weight"
        found, expected = model.model.get_parameter(name), saved.values[name].float()
        # Products of three factors, in another order; and the package computes MXFP4 in bf16, which is exact.
        torch.testing.assert_close(found, expected, rtol=0 if form.startswith("mx") else 1e-2, atol=0)
    bf16 = streamed(tmp_path, "bf16")
    (record,) = bf16.load()
    assert (record.error == 0) == form.startswith("mx") and (record.error or 0) < 3e-3
    assert logits_error(bf16.model, saved.reference) < 1e-2
    if form.startswith("mx"):  # one matrix for each expert
        kept = streamed(tmp_path, "mxfp4")
        (record,) = kept.load()
        assert record.algorithm == "kept" and record.error == 0
        for value, exact in zip(*(unpack_experts(experts_of(model)) for model in (kept, bf16)), strict=True):
            assert torch.equal(value, exact)
        assert logits_error(kept.model, saved.reference) < 1e-2


@pytest.mark.transformers
def test_gpt_oss_as_published(tmp_path: Path) -> None:
    reference = save_gpt_oss(tmp_path).reference
    exact = streamed(tmp_path, "bf16")
    (record,) = exact.load()
    assert record.error == 0
    assert logits_error(exact.model, reference) < 1e-2
    from executorch_moe.export.check import dequantized

    experts = reference.get_submodule(exact.layers[0].name)
    for name, value in dequantized(exact.layers[0].layout, experts_of(exact)).items():
        assert torch.equal(value, experts.get_parameter(name)), name
    rounded = streamed(tmp_path)
    (record,) = rounded.load()
    assert record.algorithm == "minmax" and 0.03 < (record.error or 0) < 0.15
    ids = tokens(9)
    with torch.no_grad():
        assert (Logits(rounded.model)(ids) - Logits(reference)(ids)).norm() < 0.5 * Logits(reference)(ids).norm()


@pytest.mark.transformers
def test_gpt_oss_keeps_its_codes(tmp_path: Path) -> None:
    """Codes and scales of the packed layer are those of the file; gate and up rows alternate there."""
    reference = save_gpt_oss(tmp_path).reference
    stored = load_file(tmp_path / "model.safetensors")
    model = streamed(tmp_path, "mxfp4")
    (record,) = model.load()
    assert (record.algorithm, record.scheme, record.group_size, record.error) == ("kept", "mxfp4", 32, 0)
    packed = experts_of(model)
    e, h, i = packed.num_experts, packed.hidden_size, packed.intermediate_size
    gate_up, down = (unpack_int4(w, "mxfp4").to(torch.uint8) for w in (packed.w13, packed.w2))
    halves = deinterleave_gate_up(gate_up).unflatten(1, (2, -1))[:, :, :i, :h]
    for name, codes in (("gate_up_proj", halves.transpose(1, 2).reshape(e, 2 * i, h)), ("down_proj", down[:, :h, :i])):
        blocks = stored[f"{LAYERS}mlp.experts.{name}_blocks"].flatten(2)
        assert torch.equal(codes[..., 0::2] | codes[..., 1::2] << 4, blocks)
    scale = packed.w2_scale
    assert scale is not None and scale.dtype == torch.uint8
    exponents = unpack_e8m0(scale)[:, :h, : i // 32].log2() + 127
    assert torch.equal(exponents, stored[f"{LAYERS}mlp.experts.down_proj_scales"].float())
    assert logits_error(model.model, reference) < 1e-2
    (line,) = stored_weights(model, [record], ExportOptions(str(tmp_path)))
    assert "1 expert layer with codes kept as mxfp4, groups of 32, scales exact, relative error 0.0e+00" in line
    empty = streamed(tmp_path, "mxfp4")
    empty.load_placeholders()
    shapes = [{name: (t.shape, t.dtype) for name, t in m.model.state_dict().items()} for m in (model, empty)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (255, r"the scales of .* hold NaN \(255\)"),
        (161, r"hold 2\^34, but scheme mxfp4 takes 2\^-100 to 2\^33"),
        (26, "2.-101"),
    ],
)
def test_scales_that_cannot_be_packed_are_named(scale: int, message: str, gpt_oss: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(gpt_oss, tmp_path / "model"))
    edit(folder, put(f"{DOWN}_scales", lambda w: w[f"{DOWN}_scales"].fill_(scale)))
    with pytest.raises(ValueError, match=message):
        streamed(folder, "mxfp4").load()


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt_oss") / "model"
    save_gpt_oss(folder)
    return folder


@pytest.fixture(scope="module")
def nvfp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nvfp4") / "model"
    save_fp4(folder, "nvfp4-pack-quantized", modelopt=True)
    return folder


DOWN = f"{LAYERS}mlp.experts.down_proj"


def put(name: str, tensor: Any) -> Any:
    return lambda weights: weights.update({name: tensor(weights)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(f"{DOWN}_scales"), rf"MXFP4, groups of 32 .*, has {DOWN}_blocks but lacks {DOWN}_scales"),
        (
            lambda w: w.pop(f"{DOWN}_blocks"),
            r"has .*down_proj_scales, which|1 tensor .*down_proj_scales|parts of quantized",
        ),
        (put(f"{DOWN}_scales", lambda w: w[f"{DOWN}_scales"][:, :2]), r"is U8 \[4, 2, 1\], but MXFP4.* \[4, 64, 1\]"),
        (put(f"{DOWN}_blocks", lambda w: w[f"{DOWN}_blocks"][..., :8]), r"asks for U8 \[4, 64, 1, 16\]"),
        (put(f"{DOWN}_blocks", lambda w: w[f"{DOWN}_blocks"].flatten(2)), r"a mix of formats is not supported"),
        (
            put(f"{DOWN}_scales", lambda w: w[f"{DOWN}_scales"].fill_(255)),
            rf"the scales of {DOWN}_blocks hold NaN \(255\)",
        ),
        (put(f"{DOWN}_scales", lambda w: w[f"{DOWN}_scales"].fill_(254)), rf"{DOWN}_blocks in .* holds NaN or Inf"),
    ],
    ids=["no scales", "no blocks", "rows", "group", "flat", "NaN", "too large"],
)
def test_damages_of_gpt_oss_are_named(change: Any, message: str, gpt_oss: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(gpt_oss, tmp_path / "model"))
    edit(folder, change)
    with pytest.raises(ValueError, match=message):
        streamed(folder).load()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(f"{GATE}.weight_scale_2"), rf"NVFP4.* has {GATE}.weight but lacks {GATE}.weight_scale_2"),
        (
            put(f"{GATE}.weight_scale", lambda w: w[f"{GATE}.weight_scale"].float()),
            r"F32 \[128, 8\].* asks for F8_E4M3",
        ),
        (
            put(f"{GATE}.weight_scale_2", lambda w: torch.ones(2)),
            r"is F32 \[2\], but modelopt NVFP4.* asks for F32 \[1\]",
        ),
        (
            put(f"{GATE}.weight_scale_2", lambda w: torch.tensor(float("inf"))),
            rf"{GATE}.weight_scale_2 in .* holds NaN",
        ),
        (
            put(f"{GATE}.weight", lambda w: torch.zeros(128, 60, dtype=torch.uint8)),
            "K=120, which group_size=16 of config",
        ),
    ],
    ids=["no scale", "dtype", "shape", "Inf", "width"],
)
def test_damages_of_nvfp4_are_named(change: Any, message: str, nvfp4: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(nvfp4, tmp_path / "model"))
    edit(folder, change)
    with pytest.raises(ValueError, match=message):
        streamed(folder).load()


def test_a_truncated_file(gpt_oss: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(gpt_oss, tmp_path / "model"))
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is cut short or damaged"):
        streamed(folder)


def test_every_code_of_e2m1() -> None:
    from executorch_moe.export.checkpoint.formats.fp4 import e2m1

    every = torch.arange(256, dtype=torch.uint8)
    values = [*E2M1, *(-value for value in E2M1)]
    assert e2m1(every).tolist() == [values[byte >> shift & 0xF] for byte in range(256) for shift in (0, 4)]


def test_a_group_size_that_is_not_nvfp4s(tmp_path: Path) -> None:
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 32}
    groups = {"config_groups": {"a": {"targets": ["Linear"], "weights": weights}}}
    config = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", **groups}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    from executorch_moe.export.checkpoint.formats import check_format

    with pytest.raises(NotImplementedError, match=r"group_size=32 of config\.json, which is not supported yet"):
        check_format(tmp_path)
