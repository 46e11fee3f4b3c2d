"""Work folders: an interrupted export resumes, and files of others are left alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from executorch_moe.backends.fusion import FusedLayer
from executorch_moe.export.checkpoint.streaming import StreamedModel
from executorch_moe.export.checkpoint.work_folder import MANIFEST, WorkFolder

from .checkpoints import GATE, cut, edit_shard, stream


class Interrupted(Exception):
    pass


def interrupt(record: FusedLayer) -> None:
    raise Interrupted


def packed_layers(streamed: StreamedModel, work: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Loads a model; returns the names of the layers that were packed, not found in the work folder."""
    packed = []
    real = StreamedModel._pack

    def pack(self: StreamedModel, layer: Any) -> Any:
        packed.append(layer.name)
        return real(self, layer)

    monkeypatch.setattr(StreamedModel, "_pack", pack)
    with WorkFolder(work, streamed.manifest()) as folder:
        streamed.load(folder)
    monkeypatch.setattr(StreamedModel, "_pack", real)
    return packed


def test_an_interrupted_run_goes_on(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "x.work"
    first = stream(sharded)
    with pytest.raises(Interrupted), WorkFolder(work, first.manifest()) as folder:
        first.load(folder, interrupt)
    names = [layer.name for layer in first.layers]
    assert {path.name for path in work.iterdir()} == {".lock", MANIFEST, f"model.{names[0]}.safetensors"}

    second = stream(sharded)
    assert packed_layers(second, work, monkeypatch) == names[1:]
    whole = stream(sharded)
    whole.load()
    for key, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[key], value), key

    # A truncated file, other options or another source: the layer is packed again.
    cut(work / f"model.{names[1]}.safetensors")
    assert packed_layers(stream(sharded), work, monkeypatch) == names[1:]
    assert packed_layers(stream(sharded, scheme="w4a8"), work, monkeypatch) == names
    other = Path(shutil.copytree(sharded, tmp_path / "other"))
    edit_shard(other, GATE, lambda weights: weights[GATE].add_(1))
    assert packed_layers(stream(other, scheme="w4a8"), work, monkeypatch) == names


@pytest.mark.parametrize("manifest", [None, "{}", "[]", '{"name": "my extension", "format": 3}'])
def test_a_folder_of_someone_else_is_left_alone(sharded: Path, tmp_path: Path, manifest: str | None) -> None:
    work = tmp_path / "x.work"
    work.mkdir()
    (work / "notes.txt").write_text("mine")
    if manifest == "[]":
        (work / ".lock").write_text("mine too")
    if manifest is not None:
        (work / MANIFEST).write_text(manifest)
    before = {path.name: path.read_text() for path in work.iterdir()}
    with pytest.raises(ValueError, match=r"x.work is in the way, it is not the work folder"):
        WorkFolder(work, stream(sharded).manifest())
    assert {path.name: path.read_text() for path in work.iterdir()} == before


def test_only_our_own_files_leave_a_work_folder(sharded: Path, tmp_path: Path) -> None:
    work = tmp_path / "x.work"
    with WorkFolder(work, stream(sharded).manifest()) as folder:
        (work / "notes.txt").write_text("mine")
        folder.remove()
    assert [path.name for path in work.iterdir()] == ["notes.txt"]
    # A foreign file that appears between two runs stops the second one, whatever it has to remove.
    (work / "notes.txt").unlink()
    with WorkFolder(work, stream(sharded).manifest()):
        (work / "notes.txt").write_text("mine")
    for scheme in ("w4a16", "w4a8"):
        with pytest.raises(ValueError, match=r"has other files in it \(notes.txt\): move them"):
            WorkFolder(work, stream(sharded, scheme=scheme).manifest())
    assert {path.name for path in work.iterdir()} == {".lock", MANIFEST, "notes.txt"}


def test_a_work_folder_without_a_manifest_is_never_left(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a process is killed while it removes the folder, the next export still recognizes the folder."""
    work, streamed = tmp_path / "x.work", stream(sharded)
    real, removed = Path.unlink, []

    def killed(self: Path, missing_ok: bool = False) -> None:
        if self.parent == work and self.name in (MANIFEST, ".lock"):
            removed.append(sorted(path.name for path in work.iterdir()))
        real(self, missing_ok)

    with WorkFolder(work, streamed.manifest()) as folder:
        streamed.load(folder)
        monkeypatch.setattr(Path, "unlink", killed)
        folder.remove()
    assert removed == [[".lock", MANIFEST], [".lock"]] and not work.exists()
    work.mkdir()
    (work / ".lock").touch()
    (work / f".manifest.{os.getpid()}.new.json").touch()
    with WorkFolder(work, streamed.manifest()):
        assert {path.name for path in work.iterdir()} == {".lock", MANIFEST}


def test_one_export_at_a_time_has_a_work_folder(sharded: Path, tmp_path: Path) -> None:
    work, manifest = tmp_path / "x.work", stream(sharded).manifest()
    code = (
        "import json, os, pathlib, signal, sys\n"
        "from executorch_moe.export.checkpoint.work_folder import WorkFolder\n"
        "work = WorkFolder(pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]))\n"
        "print('mine', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(work), json.dumps(manifest)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "mine\n"
        before = sorted(path.name for path in work.iterdir())
        for asked in (manifest, stream(sharded, scheme="w4a8").manifest()):
            with pytest.raises(RuntimeError, match=r"another export is writing there, it has .*x.work: wait until"):
                WorkFolder(work, asked)
        assert sorted(path.name for path in work.iterdir()) == before
        other.kill()
    with WorkFolder(work, manifest) as folder:  # the system released the lock
        folder.remove()
    assert not work.exists()
