"""Packed layers on disk while a model is exported, so that an interrupted export goes on where it was."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from executorch_moe.backends.fusion import FusedLayer
from executorch_moe.kernels import PackedExperts
from executorch_moe.kernels.packing import TENSORS
from executorch_moe.kernels.schemes import LAYOUT_VERSION

from .files import is_aside, write_aside, written_aside
from .shards import Shards

MANIFEST = "manifest.json"
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
    """A folder of packed layers, one safetensors file each, that belong to one manifest.

    A folder that was left by another checkpoint or by other options is emptied.

    Args:
        path: the folder; made if it is not there.
        manifest: see `manifest_of`.

    Raises:
        ValueError: there is something else at `path`.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        known = self._read_manifest()
        if known is None and path.exists() and not _is_empty(path):
            raise ValueError(
                f"{path} is in the way, it is no work folder of an export: remove it, or choose another -o"
            )
        if known is not None and known != manifest:
            self.remove()
        write_aside(path / MANIFEST, json.dumps(manifest, indent=2))

    def _read_manifest(self) -> Any:
        try:
            return json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError, UnicodeDecodeError):
            return None

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
        """Keeps a layer."""
        from safetensors.torch import save_file

        tensors = {name: tensor for name, tensor in packed.tensors().items() if tensor is not None}
        with written_aside(self._file(layer.module)) as aside:
            save_file(tensors, aside, metadata={"layer": json.dumps(asdict(layer))})

    def remove(self) -> None:
        """Removes the folder. Layers that were loaded from it stay usable."""
        shutil.rmtree(self.path, ignore_errors=True)


def _is_empty(path: Path) -> bool:
    """True for a folder without files, but for one that was not finished."""
    return path.is_dir() and all(map(is_aside, path.iterdir()))
