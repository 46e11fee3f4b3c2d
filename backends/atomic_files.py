"""Files that are there whole or not at all: written under another name beside their own, then renamed.

A process that is killed leaves such files behind. Each is locked by the process that writes it, so the next one that
writes the same files removes those of which no lock is held, and no others.
"""

from __future__ import annotations

import contextlib
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

_NEW, _OLD = "new", "old"


@contextlib.contextmanager
def written_together(*paths: Path) -> Iterator[Mapping[Path, Path]]:
    """Yields for each of `paths` the file to write instead; at the end all are renamed, or none after an error.

    Folders are made if they are not there. The renames are done in the given order and undone if one fails. What a
    killed process left of the same files is removed first.

    Raises:
        OSError: a file cannot be written; what was there before is left as it was.
    """
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(paths)
    tag = uuid.uuid4().hex
    new = {path: _aside(path, tag, _NEW) for path in paths}
    old = {path: _aside(path, tag, _OLD) for path in paths} if len(paths) > 1 else {}
    with contextlib.ExitStack() as locks:
        try:
            for aside in new.values():
                locks.enter_context(_created(aside))
            yield new
            for aside in new.values():
                with open(aside, "rb") as file:
                    os.fsync(file.fileno())
            for path, kept in old.items():
                if path.exists():
                    os.link(path, kept)
            _rename(new, old)
        finally:
            for aside in (*new.values(), *old.values()):
                aside.unlink(missing_ok=True)


def is_aside(path: Path) -> bool:
    """True for the name of a file that `written_together` had not finished."""
    return path.name.startswith(".") and path.stem.endswith(f".{_NEW}")


def remove_leftovers(paths: Sequence[Path]) -> None:
    """Removes what killed processes left of these files; what a living one is writing stays."""
    left: dict[str, list[Path]] = {}
    for path in paths:
        name = re.compile(rf"\.{re.escape(path.stem)}\.([0-9a-f]{{32}})\.({_NEW}|{_OLD}){re.escape(path.suffix)}")
        for entry in path.parent.iterdir():
            if (match := name.fullmatch(entry.name)) and entry.is_file() and not entry.is_symlink():
                left.setdefault(match[1], []).append(entry)
    for files in left.values():
        # A living process holds the locks of what it has renamed as well.
        if not any(map(_in_use, (*files, *paths))):
            for file in files:
                file.unlink(missing_ok=True)


def _aside(path: Path, tag: str, role: str) -> Path:
    """A name beside `path`, with its ending: some writers go by that."""
    return path.with_name(f".{path.stem}.{tag}.{role}{path.suffix}")


def _created(path: Path) -> IO[bytes]:
    """The new file, open and locked until it is closed or the process ends, however it ends."""
    file = open(path, "xb")  # noqa: SIM115
    if fcntl is not None:
        with contextlib.suppress(OSError):  # some network file systems: nothing is ever removed there
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


def _in_use(path: Path) -> bool:
    """True if a process holds the lock of a file, or if that cannot be known."""
    if fcntl is None:
        return True
    try:
        if not path.is_file():
            return False
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _rename(new: Mapping[Path, Path], old: Mapping[Path, Path]) -> None:
    done: list[Path] = []
    try:
        for path, aside in new.items():
            os.replace(aside, path)
            done.append(path)
        for folder in {path.parent for path in new}:
            _sync_folder(folder)
    except BaseException:
        for path in done if old else ():
            if old[path].exists():
                os.replace(old[path], path)
            else:
                path.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
