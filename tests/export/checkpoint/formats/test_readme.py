"""README's table of formats: each row says what happens to the experts, and a checkpoint of each kind shows it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from executorch_moe.export.build import usual_scheme
from executorch_moe.export.checkpoint.gguf.blocks import CODED, FLOATS, TYPES

from . import test_gguf
from .stored import Saved, save_gpt_oss, streamed
from .test_awq import save_awq
from .test_compressed_tensors import save_packed
from .test_fp4 import save_fp4
from .test_fp8 import save_by_package, save_defined
from .test_gptq import save_gptq

README = Path(__file__).parents[4] / "README.md"
SAVED: dict[str, dict[str, Callable[[Path], Saved]]] = {
    "GPTQ": {"4 bits": save_gptq},
    "AWQ": {"4 bits, layout gemm": save_awq},
    "compressed-tensors": {"4-bit integers": save_packed},
    "fp8": {
        "block": lambda folder: save_by_package(folder, "block"),
        "row": lambda folder: save_by_package(folder, "channel"),
        "tensor": lambda folder: save_defined(folder, "fp8"),
    },
    "NVFP4": {
        "modelopt": lambda folder: save_fp4(folder, "nvfp4-pack-quantized", modelopt=True),
        "compressed-tensors": lambda folder: save_fp4(folder, "nvfp4-pack-quantized"),
    },
    "MXFP4": {
        "GPT-OSS as published": save_gpt_oss,
        "compressed-tensors": lambda folder: save_fp4(folder, "mxfp4-pack-quantized"),
    },
}
"""Row -> variant, as its cell names it -> how it is saved. Those of GGUF are in `test_gguf`."""


def rows() -> dict[str, str]:
    """The rows of formats of quantized checkpoints: name -> cell."""
    table = README.read_text(encoding="utf-8").partition("| formats | |")[2].partition("\n\n")[0]
    cells = [line.strip("| ").split(" | ", 1) for line in table.splitlines() if line.startswith("| ")]
    return {cell[0]: cell[1] for cell in cells if re.search("codes kept|rounded again", cell[1])}


def cases() -> Iterator[tuple[str, str]]:
    return ((row, variant) for row, variants in SAVED.items() for variant in variants)


def test_every_format_has_a_row_with_one_answer() -> None:
    found = rows()
    assert found.keys() == {*SAVED, "GGUF"}
    for row, variants in SAVED.items():
        assert ("codes kept" in found[row]) != ("rounded again" in found[row]), row
        assert all(variant in found[row] for variant in variants), row


def test_the_types_of_gguf() -> None:
    kept, again = rows()["GGUF"].split(" \u00b7 ")
    assert kept == f"{', '.join((*CODED, 'MXFP4'))}: codes kept"
    others = [kind for kind in TYPES if kind not in (*CODED, *FLOATS, "MXFP4")]
    assert again == f"{', '.join(others)}: rounded again"

    def tested(test: Callable[..., None]) -> set[str]:
        return {str(kind) for mark in test.pytestmark for kind in mark.args[1]}  # type: ignore[attr-defined]

    assert tested(test_gguf.test_codes_are_kept) == set(CODED)
    assert tested(test_gguf.test_other_types_are_rounded) == {"MXFP4", *others, *FLOATS}


@pytest.mark.parametrize(("row", "variant"), cases())
def test_what_happens_to_the_experts(row: str, variant: str, tmp_path: Path) -> None:
    SAVED[row][variant](tmp_path)
    records = streamed(tmp_path, usual_scheme(str(tmp_path))).load()
    kept = "codes kept" in rows()[row]
    assert {record.algorithm for record in records} == {"kept" if kept else "minmax"}
    for record in records:
        assert record.error is not None and (record.error < 1e-2) == kept
