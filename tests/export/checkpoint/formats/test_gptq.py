"""GPTQ: codes kept, for every group size and version; orders of groups; what is refused.

No library that packs GPTQ runs on a CPU without compiling. The tensors here are packed word by word, as
`QuantLinear.pack` of AutoGPTQ 0.7 does (github.com/AutoGPTQ/AutoGPTQ, nn_modules/qlinear/qlinear_cuda.py).
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from executorch_moe.export.checkpoint.formats import check_format
from executorch_moe.kernels import FusedExperts

from .stored import (
    GATE,
    LAYERS,
    H,
    Integers,
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


def words(columns: Tensor) -> Tensor:
    """int64 [R, 8C] -> int32 [R, C]: column 8c + i becomes bits 4i to 4i + 3 of word c."""
    packed = np.zeros((columns.shape[0], columns.shape[1] // 8), dtype=np.uint32)
    for i in range(8):
        packed |= columns[:, i::8].numpy().astype(np.uint32) << np.uint32(4 * i)
    return torch.from_numpy(packed.view(np.int32))


def pack(integers: Integers, version: int = 1, group_of: Tensor | None = None) -> dict[str, Tensor]:
    """The tensors of a weight whose columns have the order of the checkpoint."""
    k = integers.q.shape[1]
    zero = integers.zero.t() - (1 if version == 1 else 0)
    in_order = torch.arange(k) // (k // integers.scale.shape[1])
    return {
        "qweight": words(integers.q).t(),
        "qzeros": words(zero & 0xF),
        "scales": integers.scale.t(),
        "g_idx": (in_order if group_of is None else group_of).to(torch.int32),
    }


def declared(group_size: int = 32, **others: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": group_size, "desc_act": False, **others}


def save_gptq(folder: Path, group_size: int = 32, *, symmetric: bool = True, version: int = 1, **others: Any) -> Any:
    def quantize(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        size = weight.shape[1] if group_size == -1 else group_size
        integers = to_integers(weight, size, symmetric=symmetric)
        return pack(integers, version), integers.values()

    form = "gptq" if version == 1 else "gptq_v2"
    return save(folder, quantize, declared(group_size, sym=symmetric, checkpoint_format=form, **others))


@pytest.mark.transformers
@pytest.mark.parametrize(
    ("group_size", "symmetric", "version"),
    [(32, True, 1), (64, True, 2), (128, False, 1), (-1, True, 1), (32, False, 2), (64, False, 1)],
)
def test_codes_are_kept(group_size: int, symmetric: bool, version: int, tmp_path: Path) -> None:
    saved = save_gptq(tmp_path, group_size, symmetric=symmetric, version=version)
    model = streamed(tmp_path)
    (record,) = model.load()
    packed = experts_of(model)
    size = H if group_size == -1 else group_size
    assert packed.group_size == size and (packed.w13_zero is None) == symmetric
    assert record.algorithm == "kept" and record.group_size == size and 0 < (record.error or 0) < 4e-3

    def integers(prefix: str) -> Tensor:
        return to_integers(original[f"{prefix}weight"], size, symmetric=symmetric).q.float() - 8

    original = original_weights()
    for found, expected in zip(codes_of(packed), of_experts(integers), strict=True):
        assert torch.equal(found, expected)
    name = f"{LAYERS}self_attn.o_proj.weight"
    assert torch.equal(model.model.get_parameter(name), saved.values[name])
    assert logits_error(model.model, saved.reference) < 1e-2


def test_a_zero_point_of_0_in_version_1(tmp_path: Path) -> None:
    """It is stored as 15, because -1 does not fit."""
    integers = Integers(torch.arange(16).repeat(128, 8), torch.full((128, 4), 0.5).half(), torch.zeros(128, 4).long())
    assert (pack(integers)["qzeros"] == -1).all()
    saved = save(tmp_path, lambda _: (pack(integers), integers.values()), declared(sym=False), re.compile("o_proj"))
    model = streamed(tmp_path)
    model.load()
    name = f"{LAYERS}self_attn.o_proj.weight"
    assert torch.equal(model.model.get_parameter(name), saved.values[name])
    assert saved.values[name].min() == 0


@pytest.mark.parametrize(("scheme", "bound"), [("w4a8", 0.2), ("bf16", 5e-3)])
def test_schemes_without_these_codes_round_again(scheme: str, bound: float, tmp_path: Path) -> None:
    saved = save_gptq(tmp_path)
    model = streamed(tmp_path, scheme)
    (record,) = model.load()
    assert record.algorithm == ("minmax" if scheme == "w4a8" else "")
    assert 0 < (record.error or 0) < bound
    assert logits_error(model.model, saved.reference) < (0.2 if scheme == "w4a8" else 1e-2)


def test_w4a8_keeps_codes_with_one_scale_a_row(tmp_path: Path) -> None:
    saved = save_gptq(tmp_path, -1)
    model = streamed(tmp_path, "w4a8")
    (record,) = model.load()
    assert record.algorithm == "kept" and (record.error or 0) < 4e-3
    assert logits_error(model.model, saved.reference) < 4e-2


def save_ordered(folder: Path, group_of: Tensor, *, attention: bool = False) -> Any:
    """Saves weights whose groups are `group_of`; `attention`: only those of the attention."""
    order = torch.argsort(group_of, stable=True)

    def quantize(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        if weight.shape[1] != H:
            integers = to_integers(weight, 32, symmetric=False)
            return pack(integers), integers.values()
        integers = to_integers(weight[:, order], 32, symmetric=False)
        values = torch.empty_like(weight)
        values[:, order] = integers.values()
        q = torch.empty_like(integers.q)
        q[:, order] = integers.q
        return pack(Integers(q, integers.scale, integers.zero), group_of=group_of), values

    chosen = re.compile(r"self_attn.*_proj\.weight$" if attention else r"_proj\.weight$")
    return save(folder, quantize, declared(sym=False, desc_act=True), chosen)


def test_groups_in_another_order_are_folded(tmp_path: Path) -> None:
    saved = save_ordered(tmp_path, torch.tensor([2, 0, 3, 1]).repeat_interleave(32))
    model = streamed(tmp_path)
    (record,) = model.load()
    assert record.algorithm == "kept"
    assert logits_error(model.model, saved.reference) < 1e-2


def test_groups_that_cannot_be_folded(tmp_path: Path) -> None:
    mixed = torch.arange(H) % 4
    save_ordered(tmp_path / "experts", mixed)
    with pytest.raises(ValueError, match=r"gate_proj.qweight has groups .* not consecutive .*desc_act=false"):
        streamed(tmp_path / "experts")
    # Linear layers are dequantized, which takes any order.
    saved = save_ordered(tmp_path / "linears", mixed, attention=True)
    model = streamed(tmp_path / "linears")
    model.load()
    name = f"{LAYERS}self_attn.q_proj.weight"
    assert torch.equal(model.model.get_parameter(name), saved.values[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 8}, r"bits=8 of config.json, which is not supported yet \(only 4\)"),
        ({"bits": True}, "bits=True"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format='marlin' of config.json, which is not supported yet"),
        ({"group_size": 0}, "group_size=0 in .*config.json must be a whole number of at least 1, or -1"),
        ({"sym": "yes"}, "sym='yes' in .*config.json must be true or false"),
        ({"quant_method": "bitsandbytes"}, r"are quantized \(bitsandbytes\), which is not supported yet: config.json"),
        ({"quant_method": None}, r"are quantized \(no quant_method\)"),
    ],
)
def test_declarations_that_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    edit_json(tmp_path / "config.json", quantization_config=declared() | change)
    with pytest.raises((ValueError, NotImplementedError), match=message):
        check_format(tmp_path)


def pop(name: str) -> Any:
    return lambda weights: weights.pop(name)


def put(name: str, tensor: Any) -> Any:
    return lambda weights: weights.update({name: tensor(weights)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (pop(f"{GATE}.scales"), rf"GPTQ, 4 bits, .*, has {GATE}.qweight but lacks {GATE}.scales: download"),
        (pop(f"{GATE}.qweight"), rf"has {GATE}.g_idx, {GATE}.qzeros, {GATE}.scales, parts of quantized weights"),
        (
            put(f"{GATE}.qweight", lambda w: w[f"{GATE}.qweight"].repeat(2, 1)),  # as if it had 8 bits
            rf"{GATE}.\w+ of .* is F16 \[4, 128\], but GPTQ, 4 bits, groups of 32, symmetric asks for .* \[8, 128\]",
        ),
        (put(f"{GATE}.scales", lambda w: w[f"{GATE}.scales"].repeat(2, 1)), r"a mix of formats is not supported"),
        (put(f"{GATE}.qzeros", lambda w: w[f"{GATE}.qzeros"].float()), r"is F32 \[4, 16\].* asks for I32 \[4, 16\]"),
        (put(f"{GATE}.g_idx", lambda w: w[f"{GATE}.g_idx"] + 1), r"g_idx .* groups 1 to 4, but .* groups 0 to 3"),
        (put(f"{GATE}.qzeros", lambda w: w[f"{GATE}.qzeros"] + 1), "declared as symmetric, but has zero points other"),
        (put(f"{GATE}.scales", lambda w: w[f"{GATE}.scales"] * float("inf")), rf"{GATE}.scales in .* holds NaN or Inf"),
        (put("lm_head.weight_packed", lambda w: w["lm_head.weight"].int()), r"has lm_head.weight_packed, parts of"),
    ],
    ids=["no scales", "no codes", "8 bits", "other groups", "dtype", "g_idx", "not symmetric", "Inf", "other format"],
)
def test_damages_are_named(change: Any, message: str, gptq: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(gptq, tmp_path / "model"))
    edit(folder, change)
    with pytest.raises(ValueError, match=message):
        streamed(folder).load()


@pytest.fixture(scope="module")
def gptq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gptq") / "model"
    save_gptq(folder)
    return folder


def test_groups_that_do_not_divide(gptq: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(gptq, tmp_path / "model"))
    edit_json(folder / "config.json", quantization_config=declared(48))
    with pytest.raises(
        ValueError, match=r"K=128, which group_size=48 of config.json does not divide: use a checkpoint"
    ):
        streamed(folder)


def test_without_a_declaration(gptq: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(gptq, tmp_path / "model"))
    edit_json(folder / "config.json", quantization_config=None)
    with pytest.raises(ValueError, match=r"parts of quantized weights, but config.json does not declare a format"):
        streamed(folder)
    # AutoGPTQ's own file, from before transformers read config.json
    (folder / "quantize_config.json").write_text('{"bits": 4, "group_size": 32, "sym": true, "desc_act": false}')
    model = streamed(folder)
    model.load()
    assert isinstance(model.model.get_submodule(model.layers[0].name), FusedExperts)
    (folder / "quantize_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"quantize_config.json does not declare a format \(TypeError: a list\)"):
        streamed(folder)


def test_an_expert_in_another_format(gptq: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(gptq, tmp_path / "model"))

    def one_in_floats(weights: dict[str, Tensor]) -> None:
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            del weights[f"{GATE}.{part}"]
        weights[f"{GATE}.weight"] = torch.zeros(H, H)

    edit(folder, one_in_floats)
    with pytest.raises(ValueError, match=r"stored as GPTQ, but .* as F32 .*a mix of formats in one layer"):
        streamed(folder)


def test_other_layers_in_floats(tmp_path: Path) -> None:
    """Layers that the quantizer left out are read as they are."""

    def quantize(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        integers = to_integers(weight, 32, symmetric=True)
        return pack(integers), integers.values()

    saved = save(tmp_path, quantize, declared(sym=True), re.compile(r"experts\..*_proj\.weight$"))
    model = streamed(tmp_path)
    model.load()
    assert logits_error(model.model, saved.reference) < 1e-2
