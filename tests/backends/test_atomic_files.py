"""Atomic writes: killed at each step, beside files of others, and beside another writer."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from executorch_moe.backends.atomic_files import atomic_files, is_temporary, remove_leftovers

NAMES = ("model.tokenizer.json", "model.ptd", "model.pte")
# Kills itself before its n-th call of one of these functions. Arguments: n, the folder, and the file names.
KILLED = """
import os, signal, sys
from pathlib import Path
from executorch_moe.backends.atomic_files import atomic_files

steps = int(sys.argv[1])

def counted(call):
    def counting(*args, **kwargs):
        global steps
        if steps == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        steps -= 1
        return call(*args, **kwargs)
    return counting

for name in ("fsync", "link", "replace", "unlink"):
    setattr(os, name, counted(getattr(os, name)))
paths = [Path(sys.argv[2]) / name for name in sys.argv[3:]]
with atomic_files(*paths) as aside:
    for path in paths:
        aside[path].write_bytes(b"second")
        os.fsync(os.open(aside[path], os.O_RDONLY))
"""


def write(folder: Path, content: bytes) -> None:
    with atomic_files(*(folder / name for name in NAMES)) as aside:
        for path in aside.values():
            path.write_bytes(content)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def others(folder: Path) -> dict[str, bytes]:
    """Create files whose names resemble those of unfinished files."""
    tag = "0123456789abcdef" * 2
    names = (
        f".model.{tag}.new.ptd.bak", f".model.{tag[1:]}.new.ptd", f".other.{tag}.new.ptd", f"model.{tag}.new.ptd",
        f".model.{tag}.newer.ptd", f".model.{tag.upper()}.new.ptd", ".model.backup.new.ptd", "model.ptd.old",
    )  # fmt: skip
    for name in names:
        (folder / name).write_bytes(b"somebody's")
    return dict.fromkeys(names, b"somebody's")


@pytest.mark.parametrize("existing", [False, True])
def test_killed_at_each_step(tmp_path: Path, existing: bool) -> None:
    left_behind = set()
    for step in range(100):
        folder = tmp_path / str(step)
        folder.mkdir()
        if existing:
            write(folder, b"first")
        kept = others(folder)
        code = subprocess.run([sys.executable, "-c", KILLED, str(step), str(folder), *NAMES]).returncode
        found = contents(folder)
        for name in NAMES:  # complete, at whatever step the process was killed
            assert found.get(name, b"first" if existing else None) in (b"first", b"second", None)
        left_behind.update(found.keys() - kept.keys() - set(NAMES))
        write(folder, b"third")
        assert contents(folder) == {**dict.fromkeys(NAMES, b"third"), **kept}, step
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert step > 9 and left_behind, "nothing was left behind: nothing was tested"
    assert any(".old." in name for name in left_behind) == existing


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in NAMES]
    with atomic_files(*paths) as outer:
        for path in outer.values():
            path.write_bytes(b"outer")
        write(tmp_path, b"inner")
        assert all(path.read_bytes() == b"outer" for path in outer.values())
    assert contents(tmp_path) == dict.fromkeys(NAMES, b"outer")


def test_what_a_living_process_has_renamed_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may still have to undo its renames with the earlier files that it kept."""
    from executorch_moe.backends import atomic_files as module

    paths, seen = [tmp_path / name for name in NAMES], []
    write(tmp_path, b"first")

    def failing(folder: Path) -> None:
        remove_leftovers(paths)  # as another process would, after all renames
        seen.extend(path.name for path in folder.iterdir())
        raise OSError("disk failure")

    monkeypatch.setattr(module, "_sync_folder", failing)
    with pytest.raises(OSError, match="disk failure"):
        write(tmp_path, b"second")
    assert sum(".old." in name for name in seen) == len(NAMES)
    assert contents(tmp_path) == dict.fromkeys(NAMES, b"first")


def test_writers_of_one_file_do_not_share_what_they_write_aside(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with atomic_files(path) as first, atomic_files(path) as second:
        assert first[path] != second[path] and is_temporary(first[path]) and is_temporary(second[path])
        assert first[path].suffix == ".json" and not is_temporary(path)


def test_a_link_in_the_place_of_an_unfinished_file_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"x")
    link = tmp_path / f".model.{'0' * 32}.new.ptd"
    link.symlink_to(tmp_path / "precious")
    remove_leftovers([tmp_path / "model.ptd"])
    assert link.is_symlink()
