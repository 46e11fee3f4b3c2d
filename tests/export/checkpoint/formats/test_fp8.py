"""fp8 with one scale per tensor, row or block: weights quantized by compressed-tensors, or by the definition.

Blocks as DeepSeek and Qwen publish them are in `test_streaming`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from executorch_moe.export.checkpoint.formats import check_format, read_format

from .stored import GATE, LAYERS, Saved, edit, edit_json, logits_error, save, streamed

LARGEST = 448  # of float8 e4m3
F8 = torch.float8_e4m3fn


def scale_of(weight: Tensor, strategy: str) -> Tensor:
    if strategy == "tensor":
        return (weight.abs().max() / LARGEST).reshape(1)
    if strategy == "channel":
        return weight.abs().amax(1, keepdim=True) / LARGEST
    blocks = weight.unflatten(0, (-1, 64)).unflatten(2, (-1, 32))
    return blocks.abs().amax((1, 3)) / LARGEST


def save_by_package(folder: Path, strategy: str) -> Saved:
    pytest.importorskip("compressed_tensors", reason="needs the package compressed-tensors")
    from compressed_tensors.compressors import FloatQuantizationCompressor

    from .test_compressed_tensors import scheme_of

    sizes = {"block_structure": [64, 32]} if strategy == "block" else {}
    scheme, declaration = scheme_of("float-quantized", num_bits=8, type="float", strategy=strategy, **sizes)

    def quantize(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        state = {"weight": weight, "weight_scale": scale_of(weight, strategy).bfloat16()}
        stored = FloatQuantizationCompressor.compress(state, scheme)
        return stored, FloatQuantizationCompressor.decompress(stored, scheme)["weight"]

    return save(folder, quantize, declaration)


DECLARED: dict[str, tuple[str, dict[str, Any]]] = {
    "fp8": ("weight_scale", {"quant_method": "fp8", "activation_scheme": "static"}),
    "transformers": ("weight_scale_inv", {"quant_method": "fp8", "weight_block_size": None}),
    "fbgemm_fp8": ("weight_scale", {"quant_method": "fbgemm_fp8"}),
    "modelopt": ("weight_scale", {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "modelopt's file": ("weight_scale", {}),
}


def save_defined(folder: Path, declared: str, strategy: str = "tensor") -> Saved:
    """The definition: value = code * scale."""
    end, declaration = DECLARED[declared]

    def quantize(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        scale = scale_of(weight, strategy)
        codes = (weight / scale).to(F8)
        stored = scale.reshape(()) if strategy == "tensor" else scale
        parts = {"weight": codes, end: stored, "input_scale": torch.ones(())}
        return parts, (codes.float() * scale).bfloat16()

    saved = save(folder, quantize, declaration)
    if not declaration:
        content = {
            "producer": {"name": "modelopt"},
            "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"},
        }
        (folder / "hf_quant_config.json").write_text(json.dumps(content))
    return saved


def check(saved: Saved) -> None:
    model = streamed(saved.folder)
    (record,) = model.load()
    assert record.algorithm == "minmax" and 0.03 < (record.error or 0) < 0.15
    for projection in ("q", "k", "v", "o"):
        name = f"{LAYERS}self_attn.{projection}_proj.weight"
        assert torch.equal(model.model.get_parameter(name), saved.values[name].float())
    bf16 = streamed(saved.folder, "bf16")
    (record,) = bf16.load()
    assert record.error == 0
    assert logits_error(bf16.model, saved.reference) < 1e-2


@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
def test_by_compressed_tensors(strategy: str, tmp_path: Path) -> None:
    check(save_by_package(tmp_path, strategy))


@pytest.mark.parametrize("declared", DECLARED)
def test_other_declarations(declared: str, tmp_path: Path) -> None:
    check(save_defined(tmp_path, declared, "channel" if declared == "fbgemm_fp8" else "tensor"))


@pytest.mark.parametrize("scale", [(), (1,), (4,), (4, 1, 1), (4, 96, 1), (4, 96)])
def test_stacked_experts(scale: tuple[int, ...], tmp_path: Path) -> None:
    """One tensor for all experts, of which few are read at a time."""
    from safetensors.torch import save_file

    from executorch_moe.export.checkpoint.shards import Shards

    codes = torch.randn(4, 96, 32, generator=torch.Generator().manual_seed(0)).to(F8)
    factors = torch.rand(scale) + 0.5
    stored = {"experts.gate_up_proj": codes, "experts.gate_up_proj_scale": factors}
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "fp8"}}))
    whole = factors if len(scale) in (0, 3) else factors.reshape(*scale, *(1,) * (3 - len(scale)))
    expected = (codes.float() * whole).bfloat16()
    shards = Shards(tmp_path)
    with shards.reader() as reader:
        assert torch.equal(reader.read("experts.gate_up_proj"), expected)
        for run in (slice(0, 1), slice(1, 4), slice(3, 4)):
            assert torch.equal(reader.read("experts.gate_up_proj", run), expected[run])


@pytest.mark.parametrize(
    ("declaration", "message"),
    [
        (
            {"quant_method": "fp8", "weight_block_size": [128]},
            r"weight_block_size=\[128\] in .* must be two whole numbers",
        ),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, "must be two whole numbers of at least 1"),
        (
            {"quant_method": "fp8", "fmt": "e5m2"},
            r"fmt='e5m2' of config.json, which is not supported yet \(only 'e4m3'\)",
        ),
        ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, "quant_algo='mixed_precision' of config.json"),
    ],
)
def test_declarations_that_are_refused(declaration: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": declaration}))
    with pytest.raises((ValueError, NotImplementedError), match=message):
        check_format(tmp_path)


def test_another_file_of_modelopt(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "W4A8_AWQ"}}')
    with pytest.raises(
        NotImplementedError, match=r"quant_algo='w4a8_awq' of hf_quant_config\.json, which is not supported"
    ):
        check_format(tmp_path)
    (tmp_path / "hf_quant_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"hf_quant_config.json does not declare a format \(JSONDecodeError"):
        check_format(tmp_path)


def test_files_that_contradict_each_other(tmp_path: Path) -> None:
    """config.json often still has the declaration of the checkpoint that was quantized again."""
    old = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    new = {"quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": old}))
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(new))
    contradiction = r"config\.json of .* declares fp8, blocks of 128 x 128, but hf_quant_config\.json declares modelopt"
    with pytest.raises(ValueError, match=contradiction):
        check_format(tmp_path)
    same = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": same}))
    check_format(tmp_path)
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32, "sym": True}))
    with pytest.raises(ValueError, match=r"but quantize_config\.json declares GPTQ, 4 bits, groups of 32, symm"):
        check_format(tmp_path)


def test_only_the_cache_is_quantized(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    content = {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(content))
    assert read_format(tmp_path) is None


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp8") / "model"
    save_defined(folder, "fp8")
    return folder


def put(name: str, tensor: Any) -> Any:
    return lambda weights: weights.update({name: tensor(weights)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(f"{GATE}.weight_scale"), rf"{GATE}.weight of .* is stored as F8_E4M3, expected BF16"),
        (
            put(f"{GATE}.weight_scale", lambda w: torch.ones(3)),
            r"needs one scale, or one for each of 128 rows: check that",
        ),
        (put(f"{GATE}.weight_scale", lambda w: torch.ones(1).int()), r"is stored as I32, expected F16, BF16, F32"),
        (
            put(f"{GATE}.weight_scale", lambda w: torch.tensor(float("nan"))),
            rf"^{GATE}.weight_scale in .* holds NaN or",
        ),
        (put(f"{GATE}.weight", lambda w: w[f"{GATE}.weight"].float()), r"parts of quantized weights, but config.json"),
    ],
    ids=["no scale", "shape", "dtype", "NaN", "floats with a scale"],
)
def test_damages_are_named(change: Any, message: str, fp8: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(fp8, tmp_path / "model"))
    edit(folder, change)
    with pytest.raises(ValueError, match=message):
        streamed(folder).load()


def test_a_declaration_without_such_weights(tmp_path: Path) -> None:
    save_defined(tmp_path, "fp8")

    def as_floats(weights: dict[str, Tensor]) -> None:
        for name in [name for name in weights if name.endswith("_scale")]:
            del weights[name]
        weights |= {name: tensor.float() for name, tensor in weights.items()}

    edit(tmp_path, as_floats)
    with pytest.raises(ValueError, match=r"has no weights in fp8, .* \(declared in config.json\): use the file of"):
        streamed(tmp_path)
    edit_json(tmp_path / "config.json", quantization_config=None)
    streamed(tmp_path)
