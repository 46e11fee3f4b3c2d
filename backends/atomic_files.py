"""Atomic writes: a file is complete or absent, and several files change together or not at all.

Each file is written under a temporary name in the same folder and then renamed. A process that is killed leaves its
temporary files behind. The process that writes such a file holds a lock on it, so the next writer of the same files
removes exactly the temporary files that nobody has locked.
"""

from __future__ import annotations

import contextlib
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

# The lock is flock on the temporary file itself, not the package `filelock`. `filelock` locks a file of its own: one
# more file beside every output, which a killed process leaves behind; and some of its versions truncate the file that
# they try to lock, which here is somebody's output.
try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

_NEW, _OLD = "new", "old"


def check_writable(what: str, path: Path, suffixes: Sequence[str] = ()) -> None:
    """Check that a file can be written, before minutes of work. Its folder may be missing: it is created later.

    Args:
        what: the option that gave `path`, for messages. suffixes: accepted endings; empty accepts any.

    Raises:
        ValueError: another ending, a folder, or no writable folder above `path`.
    """
    if suffixes and path.suffix not in suffixes:
        example = f": give for example {path.with_suffix(suffixes[0])}" if path.name else ": give a file name"
        raise ValueError(f"{what}={str(path)!r} must end in {' or '.join(suffixes)}{example}")
    if path.is_dir():
        raise ValueError(f"{what}={str(path)!r} is a folder: give a file name")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise ValueError(f"{what}={str(path)!r} cannot be written, {folder} is not a writable folder: choose another")


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically; see `atomic_files` for errors."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """`atomic_files` for one file: yields the temporary path, which has the ending of `path`."""
    with atomic_files(path) as temporary:
        yield temporary[path]


@contextlib.contextmanager
def atomic_files(*paths: Path) -> Iterator[Mapping[Path, Path]]:
    """Write several files together. At the end all of them are renamed into place; after an error none is changed.

    Missing folders are created. Leftovers of killed writers of the same files are removed first. The renames happen in
    the order of `paths` and are undone if one fails.

    Yields:
        path -> temporary path to write instead, an empty file in the same folder with the same ending.

    Raises:
        OSError: a file cannot be written; earlier files stay unchanged. An error without a file name, such as a full
            disk, gets that of the last path.
    """
    with named(paths[-1]):
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(paths)
        tag = uuid.uuid4().hex
        new = {path: _temporary(path, tag, _NEW) for path in paths}
        old = {path: _temporary(path, tag, _OLD) for path in paths} if len(paths) > 1 else {}
        with contextlib.ExitStack() as locks:
            try:
                for temporary in new.values():
                    locks.enter_context(_create_locked(temporary))
                yield new
                for temporary in new.values():
                    with open(temporary, "rb") as file:
                        os.fsync(file.fileno())
                for path, kept in old.items():
                    if path.exists():
                        os.link(path, kept)
                _rename(new, old)
            finally:
                for temporary in (*new.values(), *old.values()):
                    temporary.unlink(missing_ok=True)


def is_temporary(path: Path) -> bool:
    """True if the name is that of a file that `atomic_files` has not finished."""
    return path.name.startswith(".") and path.stem.endswith(f".{_NEW}")


def remove_leftovers(paths: Sequence[Path]) -> None:
    """Remove temporary files that killed processes left of these files. Those of running processes stay."""
    left: dict[str, list[Path]] = {}
    for path in paths:
        name = re.compile(rf"\.{re.escape(path.stem)}\.([0-9a-f]{{32}})\.({_NEW}|{_OLD}){re.escape(path.suffix)}")
        for entry in path.parent.iterdir():
            if (match := name.fullmatch(entry.name)) and entry.is_file() and not entry.is_symlink():
                left.setdefault(match[1], []).append(entry)
    for files in left.values():
        # A running process also holds the locks of files that it has already renamed.
        if not any(map(_in_use, (*files, *paths))):
            for file in files:
                file.unlink(missing_ok=True)


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Context that gives system errors without a file name, such as those of a full disk, the name `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def _temporary(path: Path, tag: str, role: str) -> Path:
    """A name in the folder of `path`, with its ending: some writers choose the format by it."""
    return path.with_name(f".{path.stem}.{tag}.{role}{path.suffix}")


def _create_locked(path: Path) -> IO[bytes]:
    """The new file, open and locked. The lock ends when the file is closed or the process ends in any way."""
    file = open(path, "xb")  # noqa: SIM115
    if fcntl is not None:
        with contextlib.suppress(OSError):  # file systems without locks: leftovers are never removed there
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


def _in_use(path: Path) -> bool:
    """True if a process holds the lock of a file, or if that is unknown."""
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
        for path, temporary in new.items():
            os.replace(temporary, path)
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
