"""Packed layers on disk while a model is exported, so that an interrupted export goes on where it was."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from executorch_moe.backends.atomic_files import is_aside
from executorch_moe.backends.fusion import FusedLayer
from executorch_moe.export.files import write_aside, written_aside
from executorch_moe.kernels import PackedExperts
from executorch_moe.kernels.packing.experts import TENSORS
from executorch_moe.kernels.schemes import LAYOUT_VERSION

from .shards import Shards

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

MANIFEST = "manifest.json"
_LOCK = ".lock"
_LAYERS = "model.*.safetensors"
_FORMAT = 1


def work_folder_path(pte: Path) -> Path:
    """Where packed layers are kept while NAME.pte is made: beside it, NAME.work."""
    return pte.with_suffix(".work")


def manifest_of(shards: Shards, fusion: Mapping[str, Any]) -> dict[str, Any]:
    """What packed layers depend on: configuration, source files by size and time, packing options, layout version."""
    stats = {file: (shards.folder / file).stat() for file in shards.files}
    return {
        "format": _FORMAT,
        "layout_version": LAYOUT_VERSION,
        "fusion": dict(fusion),
        "config_sha256": hashlib.sha256((shards.folder / "config.json").read_bytes()).hexdigest(),
        "files": {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()},
    }


class WorkFolder:
    """A folder of packed layers, one safetensors file each, that belong to one manifest; one export has it at a time.

    Layers that were left by another checkpoint or by other options are removed. A context manager: the folder is free
    for others after it, or when the process ends, however it ends.

    Args:
        path: the folder; made if it is not there.
        manifest: see `manifest_of`.

    Raises:
        ValueError: there is something else at `path`, or files in it that no export wrote.
        RuntimeError: another export has the folder.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self._lock: IO[str] | None = None
        if not (path / _LOCK).exists():
            self._check_ours()  # before anything is made in it
        self._lock = _locked(path / _LOCK)
        try:
            self._check_ours()
            for file in self._files() if self._read_manifest() != manifest else filter(_is_unfinished, path.iterdir()):
                file.unlink()
            write_aside(path / MANIFEST, json.dumps(manifest, indent=2))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> WorkFolder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the folder to others; what is in it stays."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _read_manifest(self) -> Any:
        try:
            return json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _check_ours(self) -> None:
        """Check that nobody else keeps anything here: it would not survive the export."""
        if (self.path.exists() or self.path.is_symlink()) and not self.path.is_dir():
            raise ValueError(f"{self.path} is in the way, it is no folder: remove it, or choose another -o")
        present = sorted(self.path.glob("*"))  # before the manifest, for another export may begin at this moment
        manifest = self._read_manifest()
        ours = isinstance(manifest, dict) and {"format", "layout_version"} <= manifest.keys()
        known = _is_written_here if ours else _is_unfinished
        if others := [file for file in present if not known(file) and file.name != _LOCK]:
            raise ValueError(
                f"{self.path} is in the way, it is no work folder of an export or has other files in it "
                f"({others[0].name}): move them, or choose another -o"
            )

    def _files(self) -> list[Path]:
        """What is in the folder of what is written here, the manifest last: layers without it would be no one's."""
        return sorted(filter(_is_written_here, self.path.glob("*")), key=lambda file: file.name == MANIFEST)

    def _file(self, module: str) -> Path:
        return self.path / f"{module}.safetensors"

    def load(self, module: str) -> tuple[FusedLayer, PackedExperts] | None:
        """A layer that was packed before, None otherwise. Its tensors lie in the mapped file, not in memory."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._file(module), framework="pt", device="cpu") as file:
                record = json.loads(file.metadata()["layer"])
                tensors: dict[str, Tensor | None] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):  # not there, or cut short by a crash
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
        """Keeps a layer.

        Raises:
            OSError: its file cannot be written.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        tensors = {name: tensor for name, tensor in packed.tensors().items() if tensor is not None}
        with written_aside(path := self._file(layer.module)) as aside:
            try:
                save_file(tensors, aside, metadata={"layer": json.dumps(asdict(layer))})
            except SafetensorError as error:
                raise OSError(f"{path} cannot be written ({error}): make room, or choose another -o") from None

    def remove(self) -> None:
        """Removes the folder, if nobody put anything else there. Layers that were loaded from it stay usable."""
        with contextlib.suppress(OSError):
            for file in (*self._files(), self.path / _LOCK):
                file.unlink()
            self.path.rmdir()
        self.close()


def _locked(path: Path) -> IO[str]:
    """The open lock file of a work folder, which this process alone has; the system frees it when the process ends.

    Raises:
        RuntimeError: another one has it.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = open(path, "a")  # noqa: SIM115
        except FileNotFoundError:  # whoever had it removed the folder just now
            continue
        try:
            _lock(file)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
            file.close()  # the same, between opening and locking
        except BlockingIOError:
            file.close()
            raise RuntimeError(
                f"another export is writing there, it has {path.parent}: wait until it is done, or choose another -o"
            ) from None
        except BaseException:
            file.close()
            raise


def _lock(file: IO[str]) -> None:
    """Raises BlockingIOError if another process has it; does nothing where files cannot be locked."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # some network file systems
        pass


def _is_unfinished(path: Path) -> bool:
    """True for a file of ours that was being written when its process was killed."""
    return is_aside(path) and path.name.startswith((".manifest.", ".model."))


def _is_written_here(path: Path) -> bool:
    """True for layers, the manifest, and files that were not finished."""
    return path.name == MANIFEST or path.match(_LAYERS) or _is_unfinished(path)
