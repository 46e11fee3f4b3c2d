"""Processes of pytest-xdist share the GPUs of a machine."""

from __future__ import annotations

from .conftest import gpus_in_turn


def test_each_process_begins_with_another_gpu_and_sees_all() -> None:
    assert [gpus_in_turn(f"gw{n}", 4) for n in (0, 1, 3, 4)] == ["0,1,2,3", "1,2,3,0", "3,0,1,2", "0,1,2,3"]
    assert gpus_in_turn("gw7", 1) == "0"
