"""AWQ in the layout "gemm".

AutoAWQ needs a GPU. The tensors here are packed word by word, as `WQLinear_GEMM.from_linear` of AutoAWQ 0.2 does
(github.com/casper-hansen/AutoAWQ, awq/modules/linear/gemm.py).
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

from .stored import (
    GATE,
    LAYERS,
    H,
    Integers,
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

ORDER_MAP = [0, 2, 4, 6, 1, 3, 5, 7]


def words(columns: Tensor) -> Tensor:
    """int64 [R, 8C] -> int32 [R, C]: column 8c + ORDER_MAP[i] becomes bits 4i to 4i + 3 of word c."""
    packed = np.zeros((columns.shape[0], columns.shape[1] // 8), dtype=np.uint32)
    for c in range(packed.shape[1]):
        for i, column in enumerate(ORDER_MAP):
            packed[:, c] |= columns[:, 8 * c + column].numpy().astype(np.uint32) << np.uint32(4 * i)
    return torch.from_numpy(packed.view(np.int32))


def pack(integers: Integers) -> dict[str, Tensor]:
    return {
        "qweight": words(integers.q.t()),
        "qzeros": words(integers.zero.t()),
        "scales": integers.scale.t(),
    }


def declared(group_size: int = 32, **others: Any) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm", **others}


def save_awq(folder: Path, group_size: int = 32) -> Saved:
    def quantize(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        integers = to_integers(weight, group_size, symmetric=False)
        return pack(integers), integers.values()

    return save(folder, quantize, declared(group_size))


@pytest.fixture(scope="module")
def awq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("awq") / "model"
    save_awq(folder)
    return folder


@pytest.mark.transformers
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_codes_are_kept(group_size: int, tmp_path: Path) -> None:
    saved = save_awq(tmp_path, group_size)
    model = streamed(tmp_path)
    (record,) = model.load()
    packed = experts_of(model)
    assert packed.group_size == group_size and packed.w13_zero is not None
    assert record.algorithm == "kept" and 0 < (record.error or 0) < 6e-3
    original = original_weights()

    def integers(prefix: str) -> Tensor:
        return to_integers(original[f"{prefix}weight"], group_size, symmetric=False).q.float() - 8

    for found, expected in zip(codes_of(packed), of_experts(integers), strict=True):
        assert torch.equal(found, expected)
    for projection in ("q", "k", "v", "o"):
        name = f"{LAYERS}self_attn.{projection}_proj.weight"
        assert torch.equal(model.model.get_parameter(name), saved.values[name])
    assert logits_error(model.model, saved.reference) < 1e-2


def test_groups_of_16_are_rounded_again(tmp_path: Path) -> None:
    saved = save_awq(tmp_path, 16)
    model = streamed(tmp_path)
    (record,) = model.load()
    assert record.algorithm == "minmax" and record.group_size == 32 and 0.03 < (record.error or 0) < 0.15
    assert logits_error(model.model, saved.reference) < 0.2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "bits=3 of config.json, which is not supported yet"),
        ({"version": "gemv"}, "version='gemv' of config.json, which is not supported yet \\(only 'gemm'\\)"),
        ({"zero_point": 1}, "zero_point=1 in .* must be true or false"),
        ({"group_size": "128"}, "group_size='128' in .* must be a whole number"),
    ],
)
def test_declarations_that_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    edit_json(tmp_path / "config.json", quantization_config=declared() | change)
    with pytest.raises((ValueError, NotImplementedError), match=message):
        check_format(tmp_path)


def put(name: str, tensor: Any) -> Any:
    return lambda weights: weights.update({name: tensor(weights)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(f"{GATE}.qzeros"), rf"AWQ, 4 bits, .*, has {GATE}.qweight but lacks {GATE}.qzeros: download"),
        (put(f"{GATE}.qweight", lambda w: w[f"{GATE}.qweight"].float()), "asks for I32"),
        (
            put(f"{GATE}.scales", lambda w: w[f"{GATE}.scales"][:2]),
            r"is F16 \[2, 128\], but AWQ.* asks for .* \[4, 128\]",
        ),
        # as GPTQ stores it
        (put(f"{GATE}.qweight", lambda w: torch.zeros(16, 128, dtype=torch.int32)), "K=16, which group_size=32"),
    ],
    ids=["no zeros", "dtype", "groups", "GPTQ"],
)
def test_damages_are_named(change: Any, message: str, awq: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(awq, tmp_path / "model"))
    edit(folder, change)
    with pytest.raises(ValueError, match=message):
        streamed(folder)


def test_groups_that_do_not_divide(awq: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(awq, tmp_path / "model"))
    edit_json(folder / "config.json", quantization_config=declared(96))
    with pytest.raises(ValueError, match=rf"K={H}, which group_size=96 of config.json does not divide"):
        streamed(folder)


def test_attention_in_floats(tmp_path: Path) -> None:
    def quantize(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        integers = to_integers(weight, 32, symmetric=False)
        return pack(integers), integers.values()

    saved = save(tmp_path, quantize, declared(modules_to_not_convert=["self_attn"]), re.compile(r"experts.*_proj\.w"))
    model = streamed(tmp_path)
    model.load()
    assert logits_error(model.model, saved.reference) < 1e-2
