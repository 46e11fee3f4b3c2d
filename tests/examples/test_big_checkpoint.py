"""Streaming keeps its promise about memory, on a checkpoint small enough for a test."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from executorch_moe.examples.big_checkpoint import ModelShape, in_own_process, write_checkpoint

pytest.importorskip("transformers")


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory since a moment is known on Linux only")
def test_memory_stays_below_the_packed_model_and_one_layer(tmp_path: Path) -> None:
    shape = ModelShape(
        layers=5, num_experts=64, hidden_size=512, intermediate_size=256, heads=4, key_value_heads=2, head_dim=64,
        vocab_size=512,
    )  # fmt: skip
    write_checkpoint(shape, tmp_path / "model")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > shape.layers
    options = {"target": "cpu", "scheme": "w4a16", "group_size": 128, "dtype": "bf16"}
    found = in_own_process("load", tmp_path / "model", tmp_path / "x.pte", options)
    limit = found["packed"] + found["dense"] + shape.layer_bytes()
    # Loaded whole, it would not stay below.
    assert shape.layers * shape.layer_bytes() > 1.5 * limit
    assert 0 < found["loaded"] - found["start"] < limit, found
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
