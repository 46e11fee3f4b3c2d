"""compressed-tensors, pack-quantized: weights packed by the package compressed-tensors itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from executorch_moe.export.checkpoint.formats import check_format

from .stored import (
    GATE,
    LAYERS,
    Saved,
    codes_of,
    edit,
    edit_json,
    experts_of,
    logits_error,
    of_experts,
    original_weights,
    save,
    streamed,
    to_integers,
)

pytest.importorskip("compressed_tensors", reason="needs the package compressed-tensors")


def scheme_of(form: str, **weights: Any) -> tuple[Any, dict[str, Any]]:
    """The package's scheme, and the `quantization_config` that it writes for it."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, format=form, quantization_status="compressed", ignore=["lm_head"]
    )
    return scheme, {"quant_method": "compressed-tensors", **config.model_dump(mode="json")}


def packed_by_package(weight: Tensor, scheme: Any, group_size: int, *, symmetric: bool) -> tuple[Any, Tensor]:
    """The package's tensors for a weight, and what it makes of them again."""
    from compressed_tensors.compressors import PackedQuantizationCompressor

    integers = to_integers(weight, group_size, symmetric=symmetric, dtype=torch.bfloat16)
    state = {"weight": weight, "weight_scale": integers.scale}
    if not symmetric:
        state["weight_zero_point"] = (integers.zero - 8).to(torch.int8)
    stored = PackedQuantizationCompressor.compress(state, scheme)
    values = PackedQuantizationCompressor.decompress(stored, scheme)["weight"]
    # The package rounds values to the scales' dtype; the integers and scales stand for more exact ones.
    assert torch.equal(values, integers.values().bfloat16())
    return stored, integers.values()


def save_packed(folder: Path, group_size: int = 32, *, symmetric: bool = True) -> Saved:
    strategy = {"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}
    scheme, declaration = scheme_of("pack-quantized", num_bits=4, symmetric=symmetric, **strategy)

    def quantize(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        size = weight.shape[1] if group_size == -1 else group_size
        return packed_by_package(weight, scheme, size, symmetric=symmetric)

    return save(folder, quantize, declaration)


@pytest.mark.transformers
@pytest.mark.parametrize(
    ("group_size", "symmetric"), [(32, True), (64, False), (128, True), (-1, True), (-1, False), (32, False)]
)
def test_codes_are_kept(group_size: int, symmetric: bool, tmp_path: Path) -> None:
    saved = save_packed(tmp_path, group_size, symmetric=symmetric)
    model = streamed(tmp_path)
    (record,) = model.load()
    packed, size = experts_of(model), 128 if group_size == -1 else group_size
    assert packed.group_size == size and (packed.w13_zero is None) == symmetric
    # Scales in bf16 are kept as they are; zero points are rounded.
    assert record.algorithm == "kept" and (record.error == 0) == symmetric and (record.error or 0) < 4e-3
    original = original_weights()

    def integers(prefix: str) -> Tensor:
        weight = original[f"{prefix}weight"]
        return to_integers(weight, size, symmetric=symmetric, dtype=torch.bfloat16).q.float() - 8

    for found, expected in zip(codes_of(packed), of_experts(integers), strict=True):
        assert torch.equal(found, expected)
    for projection in ("q", "k", "v", "o"):
        name = f"{LAYERS}self_attn.{projection}_proj.weight"
        assert torch.equal(model.model.get_parameter(name), saved.values[name])
    assert logits_error(model.model, saved.reference) < 1e-2


def test_zero_points_as_older_versions_stored_them(tmp_path: Path) -> None:
    saved = save_packed(tmp_path, symmetric=False)

    def unpacked(weights: dict[str, Tensor]) -> None:
        from compressed_tensors.compressors import unpack_from_int32

        for name in [name for name in weights if name.endswith("weight_zero_point")]:
            shape = weights[name.replace("zero_point", "scale")].shape
            weights[name] = unpack_from_int32(weights[name], 4, shape, packed_dim=0)

    edit(tmp_path, unpacked)
    model = streamed(tmp_path)
    model.load()
    name = f"{LAYERS}self_attn.o_proj.weight"
    assert torch.equal(model.model.get_parameter(name), saved.values[name])
    assert logits_error(model.model, saved.reference) < 1e-2


def test_the_declaration_of_older_versions(tmp_path: Path) -> None:
    """They called it `compression_config`."""
    save_packed(tmp_path)
    declared = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    edit_json(tmp_path / "config.json", quantization_config=None, compression_config=declared)
    (record,) = streamed(tmp_path).load()
    assert record.algorithm == "kept"
    edit_json(tmp_path / "config.json", compression_config={**declared, "format": "marlin-24"})
    with pytest.raises(NotImplementedError, match=r"format='marlin-24' of config\.json, which is not supported yet"):
        streamed(tmp_path)


def test_orders_of_groups(tmp_path: Path) -> None:
    """-1 means in order; other orders are as in GPTQ."""
    saved = save_packed(tmp_path)

    def order(group_of: Tensor) -> Any:
        names = [f"{LAYERS}mlp.experts.{e}.{p}_proj" for e in range(4) for p in ("gate", "up", "down")]
        return lambda weights: weights.update({f"{name}.weight_g_idx": group_of.clone() for name in names})

    edit(tmp_path, order(torch.full((128,), -1, dtype=torch.int32)))
    model = streamed(tmp_path)
    model.load()
    assert logits_error(model.model, saved.reference) < 1e-2
    edit(tmp_path, order((torch.arange(128) % 4).to(torch.int32)))
    with pytest.raises(ValueError, match="groups of weights that are not consecutive"):
        streamed(tmp_path)


GROUP = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "marlin-24"}, "format='marlin-24' of config.json, which is not supported yet"),
        ({"config_groups": {}}, "declares compressed-tensors without config_groups that have weights"),
        ({"config_groups": {"a": {"targets": ["Linear"]}}}, "without config_groups that have weights"),
        (
            {"config_groups": {"a": GROUP, "b": {**GROUP, "weights": {**GROUP["weights"], "num_bits": 8}}}},  # type: ignore[dict-item]
            "have 2 formats .*a mix of formats between layers is not supported",
        ),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "have a sparsity_config in config.json"),
        (
            {"transform_config": {"config_groups": {"u": {"type": "hadamard"}}}},
            "have a transform_config in config.json",
        ),
        (
            {"config_groups": {"a": {**GROUP, "weights": {**GROUP["weights"], "strategy": "tensor"}}}},  # type: ignore[dict-item]
            "strategy='tensor' of config.json, which is not supported yet",
        ),
    ],
    ids=["format", "no groups", "no weights", "two formats", "sparse", "rotated", "strategy"],
)
def test_declarations_that_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    declaration = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"a": GROUP}}
    edit_json(tmp_path / "config.json", quantization_config=declaration)
    check_format(tmp_path)
    edit_json(tmp_path / "config.json", quantization_config=declaration | change)
    with pytest.raises((ValueError, NotImplementedError), match=message):
        check_format(tmp_path)


@pytest.fixture(scope="module")
def packed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "model"
    save_packed(folder, symmetric=False)
    return folder


def put(name: str, tensor: Any) -> Any:
    return lambda weights: weights.update({name: tensor(weights)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(f"{GATE}.weight_scale"), rf"has {GATE}.weight_packed but lacks {GATE}.weight_scale: download"),
        (lambda w: w.pop(f"{GATE}.weight_zero_point"), rf"lacks {GATE}.weight_zero_point"),
        (lambda w: w.pop(f"{GATE}.weight_packed"), r"parts of quantized weights, but config.json declares compressed-"),
        (
            put(f"{GATE}.weight_scale", lambda w: w[f"{GATE}.weight_scale"][:, :2]),
            r"BF16 \[128, 2\], but .* \[128, 4\]",
        ),
        (
            put(f"{GATE}.weight_shape", lambda w: torch.tensor([128, 120])),
            r"its weight_shape says \[128, 120\]: download",
        ),
        (
            put(f"{GATE}.weight_scale", lambda w: w[f"{GATE}.weight_scale"] / 0),
            rf"{GATE}.weight_scale in .* holds NaN or",
        ),
    ],
    ids=["no scale", "no zero points", "no codes", "groups", "shape", "Inf"],
)
def test_damages_are_named(change: Any, message: str, packed_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed_folder, tmp_path / "model"))
    edit(folder, change)
    with pytest.raises(ValueError, match=message):
        streamed(folder).load()
