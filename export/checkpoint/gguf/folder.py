"""Makes a model folder for a GGUF file, whose metadata has configuration and tokenizer."""

from __future__ import annotations

import functools
import json
import re
import tempfile
from pathlib import Path

from executorch_moe.export.models.pretrained import resolve

from .files import read_configuration, read_tables
from .tokenizer import tokenizer_json

_SPLIT = re.compile(r"^(?P<name>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")
_folders: list[tempfile.TemporaryDirectory[str]] = []
"""Folders that this process made; they are removed when it ends."""


def is_gguf(model: str | Path) -> bool:
    """True if a model's name is that of a GGUF file."""
    return str(model).lower().endswith(".gguf")


def find_folder(model: str) -> Path:
    """The folder of a model: `model_folder` for GGUF files, `resolve` for all others.

    Raises:
        FileNotFoundError, ValueError, NotImplementedError, RuntimeError: see these two.
    """
    return model_folder(Path(model)) if is_gguf(model) else resolve(model)


def model_folder(path: Path) -> Path:
    """A folder with the config.json and the tokenizer.json of a file, and links to the file and its other parts.

    Raises:
        FileNotFoundError: the file or a part of it is missing.
        ValueError: a damaged file, or a tokenizer that cannot be converted.
        NotImplementedError: see `read_tables` and `configuration`.
        RuntimeError: the packages gguf or transformers are missing, or too old to convert tokenizers.
    """
    if not path.is_file():
        raise FileNotFoundError(f"model={str(path)!r} is not a file: give a GGUF file, or a folder with safetensors")
    stat = path.stat()
    return _made(path.absolute(), stat.st_size, stat.st_mtime_ns)


@functools.cache
def _made(path: Path, size: int, changed: int) -> Path:
    parts = _parts(path)
    path = parts[0]  # the part with the metadata
    metadata, tensors = read_tables(path.parent, [part.name for part in parts])
    config = read_configuration(path, metadata, tensors)
    tokenizer = tokenizer_json(path, metadata)
    # Messages name the folder, so its name has that of the file.
    holder = tempfile.TemporaryDirectory(prefix=f"executorch-moe-{path.name[-100:]}-")
    _folders.append(holder)
    folder = Path(holder.name)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    for part in parts:
        (folder / part.name).symlink_to(part)
    return folder


def _parts(path: Path) -> list[Path]:
    """All files of a model that is split into several."""
    match = _SPLIT.match(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    parts = [path.with_name(f"{match['name']}-{n:05}-of-{match['count']}.gguf") for n in range(1, count + 1)]
    if absent := [part.name for part in parts if not part.is_file()]:
        raise FileNotFoundError(f"{path.parent} lacks {', '.join(absent[:3])}: download all {count} parts")
    return parts
