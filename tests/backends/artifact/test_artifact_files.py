""".pte and .ptd: both are written or neither, and each kind of wrong file has its own message."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
from tiny_artifacts import CONSTANTS, export_linear
from torch.export import export

from executorch_moe.backends import atomic_files as aside_module
from executorch_moe.backends.artifact.files import (
    _BLOCK,
    Artifact,
    _WithHoles,
    artifact_paths,
    check,
    open_artifact,
    save,
)
from executorch_moe.backends.artifact.ptd import PtdFile
from executorch_moe.backends.artifact.pte import PteFile
from executorch_moe.backends.runtime.loader import load


@pytest.fixture
def copied(linear: Artifact, tmp_path: Path) -> Artifact:
    copy = artifact_paths(tmp_path / "copy.pte")
    shutil.copy(linear.pte, copy.pte)
    shutil.copy(linear.ptd, copy.ptd)
    return copy


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_written_together_and_readable(linear: Artifact) -> None:
    assert {path.name for path in linear.pte.parent.iterdir()} == {"model.pte", "model.ptd"}
    assert check(linear.pte, verify_bytes=True) == linear
    program, data = open_artifact(linear.pte)
    assert program.method_names == ["forward"]
    assert {name: program.constant(name) for name in program.constant_names} == CONSTANTS
    assert data is not None
    assert {"weight", "bias"} <= data.sizes().keys()


@pytest.mark.parametrize("name", ["model", "model.pte", "qwen-1.5", "qwen-1.5.pte"])
def test_paths(name: str) -> None:
    stem = name.removesuffix(".pte")
    assert artifact_paths(f"some/{name}") == Artifact(Path(f"some/{stem}.pte"), Path(f"some/{stem}.ptd"))


def test_same_export_same_bytes(linear: Artifact, tmp_path: Path) -> None:
    again = export_linear(tmp_path / "model")
    assert again.ptd.read_bytes() == linear.ptd.read_bytes()
    assert again.pte.read_bytes() == linear.pte.read_bytes()


def test_umask_decides_the_mode(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        written = export_linear(tmp_path / "model")
    finally:
        os.umask(old)
    assert written.pte.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.parametrize("existing", [False, True])
def test_a_failing_rename_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int, existing: bool
) -> None:
    if existing:
        export_linear(tmp_path / "model", seed=1)
    before, calls, replace = contents(tmp_path), 0, os.replace

    def failing_replace(source, target) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError("no space left on device")
        replace(source, target)

    monkeypatch.setattr(aside_module.os, "replace", failing_replace)
    with pytest.raises(OSError, match="no space left"):
        export_linear(tmp_path / "model", seed=2)
    assert contents(tmp_path) == before


def test_files_beside_an_artifact_are_written_with_it_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from executorch_moe.backends.lower import lower

    manager = lower({"forward": export(torch.nn.ReLU(), (torch.randn(3),))}, "cpu")
    beside = tmp_path / "relu.tokenizer.json"
    save(manager, tmp_path / "relu", {beside: b"first"})
    assert beside.read_bytes() == b"first"
    before = contents(tmp_path)
    monkeypatch.setattr(aside_module, "_sync_folder", lambda folder: os.stat(folder / "none"))
    with pytest.raises(FileNotFoundError):
        save(manager, tmp_path / "relu", {beside: b"second"})
    assert contents(tmp_path) == before


@pytest.mark.parametrize("kind", [bytes, memoryview])
def test_blocks_of_zeros_become_holes(tmp_path: Path, kind: type) -> None:
    zeros, ones = bytes(5 * _BLOCK), b"\1" * (_BLOCK + 7)
    late = bytes(_BLOCK - 1) + b"\1"
    parts = (b"head", zeros, ones, zeros[: _BLOCK - 1], late, zeros)
    path = tmp_path / "file"
    with open(path, "wb") as file:
        assert [_WithHoles(file).write(kind(part)) for part in parts] == [len(part) for part in parts]
        file.truncate()
    assert path.read_bytes() == b"".join(parts)
    assert 512 * path.stat().st_blocks < 6 * _BLOCK < path.stat().st_size


def test_a_failing_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing_sync(descriptor: int) -> None:
        raise OSError("disk failure")

    monkeypatch.setattr(aside_module.os, "fsync", failing_sync)
    with pytest.raises(OSError, match="disk failure"):
        export_linear(tmp_path / "model")
    assert contents(tmp_path) == {}


def test_weights_of_another_export_are_told_apart(copied: Artifact, tmp_path: Path) -> None:
    other = export_linear(tmp_path / "other", seed=1)
    shutil.copy(other.ptd, copied.ptd)
    assert PtdFile(copied.ptd).sizes() == PtdFile(other.ptd).sizes()
    with pytest.raises(
        ValueError, match=r"copy\.ptd does not belong to .*copy\.pte: names and sizes agree, but the weights"
    ):
        load(copied.pte)


def test_weights_of_another_shape(copied: Artifact, tmp_path: Path) -> None:
    shutil.copy(export_linear(tmp_path / "other", width=5).ptd, copied.ptd)
    with pytest.raises(ValueError, match=r"does not belong to .*: it has \d+ bytes under '\w+', the program needs \d+"):
        load(copied.pte)


def test_weights_of_another_model(copied: Artifact, emulated: Artifact) -> None:
    with pytest.raises(ValueError, match=r"does not belong to .*: it lacks '\w+' \(and 1 more\)"):
        load(copied.pte, emulated.ptd)


def test_a_flipped_bit_of_a_weight_is_found(copied: Artifact) -> None:
    data = PtdFile(copied.ptd)
    raw = bytearray(copied.ptd.read_bytes())
    at = raw.index(bytes(data.data("weight")))
    raw[at] ^= 1
    copied.ptd.write_bytes(raw)
    check(copied.pte)  # sizes and structure only
    for reads in (load, open_artifact, lambda pte: check(pte, verify_bytes=True)):
        with pytest.raises(ValueError, match=r"copy\.ptd is damaged: its bytes differ from those that were exported: "):
            reads(copied.pte)


def test_missing_files(copied: Artifact, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"program .*nothing\.pte does not exist"):
        load(tmp_path / "nothing.pte")
    copied.ptd.unlink()
    with pytest.raises(FileNotFoundError, match=r"weights .*copy\.ptd does not exist"):
        load(copied.pte)


@pytest.mark.parametrize("kind", ["pte", "ptd"])
def test_truncated_anywhere(linear: Artifact, tmp_path: Path, kind: str) -> None:
    for path in (linear.pte, linear.ptd):
        shutil.copy(path, tmp_path / path.name)
    whole = (tmp_path / f"model.{kind}").read_bytes()
    for length in [0, 4, 8, 20, 48, 100, len(whole) // 3, len(whole) // 2, len(whole) - 200, len(whole) - 1]:
        (tmp_path / f"model.{kind}").write_bytes(whole[:length])
        with pytest.raises(
            ValueError, match=rf"model\.{kind} (is cut short|is empty|is not an ExecuTorch|cannot be read|is damaged)"
        ):
            load(tmp_path / "model.pte")


@pytest.mark.parametrize("kind", ["pte", "ptd"])
def test_not_the_format(copied: Artifact, kind: str) -> None:
    path = copied.pte if kind == "pte" else copied.ptd
    path.write_bytes(b"PK\x03\x04" + bytes(500))
    with pytest.raises(ValueError, match=rf"copy\.{kind} is not an ExecuTorch"):
        load(copied.pte)


@pytest.mark.parametrize("kind", ["pte", "ptd"])
def test_damaged_table(copied: Artifact, kind: str) -> None:
    path = copied.pte if kind == "pte" else copied.ptd
    raw = bytearray(path.read_bytes())
    raw[64:200] = b"\xff" * 136
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=rf"copy\.{kind} (cannot be read|is cut short|is damaged|does not belong)"):
        load(copied.pte)


def test_swapped_names(copied: Artifact) -> None:
    with pytest.raises(ValueError, match=r"copy\.ptd is not an ExecuTorch program"):
        open_artifact(copied.ptd, copied.pte)


def test_a_program_without_weights_still_has_both_files(tmp_path: Path, executorch_runtime: None) -> None:
    from executorch_moe.backends.lower import lower

    written = save(lower({"forward": export(torch.nn.ReLU(), (torch.randn(3),))}, "cpu"), tmp_path / "deep" / "relu")
    assert check(written.pte, verify_bytes=True) == written
    (y,) = load(written.pte).run("forward", torch.tensor([-1.0, 0.0, 2.0]))
    assert y.tolist() == [0.0, 0.0, 2.0]


def test_programs_of_plain_executorch_load_too(tmp_path: Path, executorch_runtime: None) -> None:
    """Written without `save`: no digests, and weights inside the .pte."""
    model = torch.nn.Linear(4, 3)
    x = torch.randn(2, 4)
    manager = to_edge_transform_and_lower(export(model, (x,))).to_executorch(ExecutorchBackendConfig())
    with open(tmp_path / "plain.pte", "wb") as file:
        manager.write_to_file(file)
    assert PteFile(tmp_path / "plain.pte").external_tensors() == {}
    torch.testing.assert_close(load(tmp_path / "plain.pte").run("forward", x)[0], model(x).detach())
