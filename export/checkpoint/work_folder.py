"""Packed layers on disk during an export, so that an interrupted export can resume."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout
from torch import Tensor

from executorch_moe.backends.atomic_files import atomic_file, is_temporary, write_text
from executorch_moe.backends.fusion import FusedLayer
from executorch_moe.kernels import PackedExperts
from executorch_moe.kernels.packing.experts import TENSORS
from executorch_moe.kernels.schemes import LAYOUT_VERSION

from .shards import Shards

MANIFEST = "manifest.json"
_LOCK = ".lock"
_LAYERS = "model.*.safetensors"
_FORMAT = 1
_NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS)


def work_folder_path(pte: Path) -> Path:
    """The folder that keeps packed layers while NAME.pte is exported: NAME.work, beside it."""
    return pte.with_suffix(".work")


def manifest_of(shards: Shards, fusion: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that packed layers depend on, as JSON values.

    These are the configuration, the source files by size and time, the packing options, and the layout version.
    """
    stats = {file: (shards.folder / file).stat() for file in shards.files}
    return {
        "format": _FORMAT,
        "layout_version": LAYOUT_VERSION,
        "fusion": dict(fusion),
        "config_sha256": hashlib.sha256((shards.folder / "config.json").read_bytes()).hexdigest(),
        "files": {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()},
    }


class WorkFolder:
    """A folder of packed layers, one safetensors file each, all of one manifest. Only one export can use it at a time.

    Layers of another checkpoint or of other options are removed. A context manager: it releases the folder at the end.
    The operating system does the same when the process ends in any way.

    Args:
        path: the folder; created if missing.
        manifest: see `manifest_of`.

    Raises:
        ValueError: `path` is something else, or contains files that no export wrote.
        RuntimeError: another export uses the folder.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self._lock: BaseFileLock | None = None
        ours = False
        with contextlib.suppress(OSError):
            ours = (path / _LOCK).stat().st_size == 0
        if not ours:  # check before anything is created; some versions of filelock truncate the file that they lock
            self._check_ours()
        self._lock = _locked(path / _LOCK)
        try:
            self._check_ours()
            for file in self._files() if self._read_manifest() != manifest else filter(_is_unfinished, path.iterdir()):
                file.unlink()
            write_text(path / MANIFEST, json.dumps(manifest, indent=2))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> WorkFolder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the folder; its files stay."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _read_manifest(self) -> Any:
        try:
            return json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _check_ours(self) -> None:
        """Check that the folder contains no files of anybody else: the export would remove them."""
        if (self.path.exists() or self.path.is_symlink()) and not self.path.is_dir():
            raise ValueError(f"{self.path} is in the way, it is not a folder: remove it, or choose another -o")
        present = sorted(self.path.glob("*"))  # before the manifest: another export may start in between
        manifest = self._read_manifest()
        ours = isinstance(manifest, dict) and {"format", "layout_version"} <= manifest.keys()
        known = _is_written_here if ours else _is_unfinished
        if others := [file for file in present if not known(file) and file.name != _LOCK]:
            raise ValueError(
                f"{self.path} is in the way, it is not the work folder of an export, or has other files in it "
                f"({others[0].name}): move them, or choose another -o"
            )

    def _files(self) -> list[Path]:
        """Files in the folder that this class wrote, the manifest last: without it, layers would belong to nobody."""
        return sorted(filter(_is_written_here, self.path.glob("*")), key=lambda file: file.name == MANIFEST)

    def _file(self, module: str) -> Path:
        return self.path / f"{module}.safetensors"

    def load(self, module: str) -> tuple[FusedLayer, PackedExperts] | None:
        """A layer that was packed before, or None. Its tensors are views of the mapped file."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._file(module), framework="pt", device="cpu") as file:
                record = json.loads(file.metadata()["layer"])
                tensors: dict[str, Tensor | None] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):  # missing, or cut short by a crash
            return None
        layer = FusedLayer(**record)
        packed = PackedExperts(
            **{name: tensors.get(name) for name in TENSORS},  # type: ignore[arg-type]
            scheme=layer.scheme,
            group_size=layer.group_size,
            hidden_size=layer.hidden_size,
            intermediate_size=layer.intermediate_size,
        )
        return layer, packed

    def save(self, layer: FusedLayer, packed: PackedExperts) -> None:
        """Write a layer to the folder.

        Raises:
            OSError: its file cannot be written.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        tensors = {name: tensor for name, tensor in packed.tensors().items() if tensor is not None}
        with atomic_file(path := self._file(layer.module)) as temporary:
            try:
                save_file(tensors, temporary, metadata={"layer": json.dumps(asdict(layer))})
            except SafetensorError as error:
                raise OSError(f"{path} cannot be written ({error}): make room, or choose another -o") from None

    def remove(self) -> None:
        """Remove the folder unless it contains other files. Layers that were loaded from it stay usable."""
        with contextlib.suppress(OSError):
            for file in (*self._files(), self.path / _LOCK):
                file.unlink()
            self.path.rmdir()
        self.close()


def _locked(path: Path) -> BaseFileLock:
    """The lock of a work folder, held by this process until it is released or the process ends in any way.

    Raises:
        RuntimeError: another export holds it.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=0, thread_local=False)
        try:
            lock.acquire()
        except FileNotFoundError:  # the export that held it removed the folder just now
            continue
        except Timeout:
            if not path.exists():  # the same, after this process had opened the file
                continue
            raise RuntimeError(
                f"another export is writing there, it has {path.parent}: wait until it is done, or choose another -o"
            ) from None
        except (NotImplementedError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
                raise
            return lock  # not held: this file system has no locks
        if path.exists():
            return lock
        lock.release()  # the file was removed between opening and locking it


def _is_unfinished(path: Path) -> bool:
    """True for a file of this class whose process was killed while writing it."""
    return is_temporary(path) and path.name.startswith((".manifest.", ".model."))


def _is_written_here(path: Path) -> bool:
    """True for layers, the manifest, and unfinished files."""
    return path.name == MANIFEST or path.match(_LAYERS) or _is_unfinished(path)
