"""Models with recurrent layers: the runtime refuses tokens that do not follow the ones before."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from executorch_moe.backends.runtime.loader import RECURRENT, LoadedProgram

CONSTANTS: dict[str, Any] = {"get_max_context_len": 64, RECURRENT: True}


def loaded(constants: dict[str, Any]) -> LoadedProgram:
    program: Any = SimpleNamespace(constant_names=list(constants), constant=constants.get, path="x.pte", digests=None)
    engine: Any = SimpleNamespace(run=lambda method, tensors: list(tensors), reset=lambda: None)
    return LoadedProgram(program, engine, "stand-in", torch.device("cpu"), {"prefill": "prefill", "decode": "decode"})


@pytest.fixture(autouse=True)
def without_digests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("executorch_moe.backends.runtime.loader.no_digests", lambda program: "")


def run(program: LoadedProgram, *positions: int) -> None:
    ids = torch.zeros(1, len(positions), dtype=torch.int64)
    program.run("prefill" if len(positions) > 1 else "decode", ids, torch.tensor(positions))


def test_a_text_may_go_on_or_start_again() -> None:
    program = loaded(CONSTANTS)
    for positions in ((0, 1, 2), (3,), (4, 5), (0,), (1, 2), (3,), (0, 1)):
        run(program, *positions)
    program.reset()
    run(program, 0)


@pytest.mark.parametrize("positions", [(2,), (4,), (1, 2), (3, 5), (4, 3), (63,)])
def test_other_positions_are_refused(positions: tuple[int, ...]) -> None:
    program = loaded(CONSTANTS)
    run(program, 0, 1, 2)
    with pytest.raises(ValueError, match=r"got positions .*, expected 3 and the following ones: .* from position 0"):
        run(program, *positions)
    run(program, 3)  # the refused call changed nothing


def test_after_a_reset_only_a_new_text() -> None:
    program = loaded(CONSTANTS)
    run(program, 0, 1, 2)
    program.reset()
    with pytest.raises(ValueError, match="got positions 3 to 3, expected 0"):
        run(program, 3)


def test_positions_on_a_gpu_are_not_read() -> None:
    program = loaded(CONSTANTS)
    program.run("decode", torch.zeros(1, 1, device="meta"), torch.zeros(1, dtype=torch.int64, device="meta"))
    run(program, 7)  # what came before is unknown
    with pytest.raises(ValueError, match="expected 8 and the following"):
        run(program, 7)


def test_other_models_may_go_back() -> None:
    program = loaded({"get_max_context_len": 64})
    for positions in ((0, 1, 2), (1,), (9,)):
        run(program, *positions)


def loaded_with_slots() -> LoadedProgram:
    program = loaded({**CONSTANTS, "get_max_batch": 3})
    program._methods = {name: name for name in ("decode", "decode_batch", "prefill")}
    return program


def prefill(program: LoadedProgram, slot: int, *positions: int) -> None:
    program.run("prefill", torch.zeros(1, len(positions)), torch.tensor(positions), torch.tensor([slot]))


def step(program: LoadedProgram, *positions: int) -> None:
    program.run("decode_batch", torch.zeros(len(positions), 1), torch.tensor(positions), torch.arange(len(positions)))


def test_each_slot_has_an_order_of_its_own() -> None:
    program = loaded_with_slots()
    prefill(program, 0, 0, 1, 2)
    prefill(program, 2, 0)
    step(program, 3, -1, 1)
    prefill(program, 1, 0, 1)
    program.run("decode", torch.zeros(1, 1), torch.tensor([4]))  # slot 0
    step(program, 5, 2, -1)
    step(program, -1, 0, 2)
    for positions in ((5, -1, -1), (-1, 3, -1), (-1, -1, 4)):
        with pytest.raises(ValueError, match="method 'decode_batch' got positions"):
            step(program, *positions)
    with pytest.raises(ValueError, match="method 'prefill' got positions 7 to 7, expected 3"):
        prefill(program, 2, 7)
    program.reset()
    with pytest.raises(ValueError, match="got positions 1 to 1, expected 0"):
        step(program, -1, 1, -1)


def test_slots_on_a_gpu_are_not_read() -> None:
    program = loaded_with_slots()
    prefill(program, 0, 0, 1)
    program.run("prefill", torch.zeros(1, 2), torch.tensor([0, 1]), torch.zeros(1, dtype=torch.int64, device="meta"))
    step(program, 9, 4, -1)  # what came before is unknown
