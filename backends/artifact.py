"""Writes and checks the artifact: a .pte and its .ptd, which always go together."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from executorch.exir import ExecutorchProgramManager
from executorch.exir._serialize._cord import Cord, CordBuffer, FileBackedData
from executorch.exir._serialize._named_data_store import NamedDataStore, NamedDataStoreOutput
from executorch.exir._serialize._serialize import serialize_for_executorch
from executorch.exir.capture._config import ExecutorchBackendConfig

from executorch_moe.backends.cuda.weight_metadata import CUDA_BACKEND, parse_delegate
from executorch_moe.backends.ptd import PtdFile
from executorch_moe.backends.pte import PteFile

# The same digest under two keys: the runtime merges the named data of both files and refuses a key that is in both.
PTE_IDENTITY_KEY = "executorch_moe.belongs_to"
PTD_IDENTITY_KEY = "executorch_moe.identity"
_TAG = "weights"


@dataclass(frozen=True)
class Artifact:
    """The two files of an exported program."""

    pte: Path
    ptd: Path


def artifact_paths(path: str | Path, ptd: str | Path | None = None) -> Artifact:
    """Both file names from a .pte or a name without suffix; `ptd` overrides the second."""
    text = os.fspath(path)
    stem = text[: -len(".pte")] if text.endswith(".pte") else text
    return Artifact(Path(stem + ".pte"), Path(ptd) if ptd is not None else Path(stem + ".ptd"))


def save(
    program_manager: ExecutorchProgramManager, path: str | Path, beside: Mapping[Path, bytes] | None = None
) -> Artifact:
    """Write `path`.pte and `path`.ptd: both, or neither.

    All external data goes into the one .ptd, and a digest of it into both files, so that a .ptd from another export is
    told apart even where keys and sizes agree. The program is serialised again for that, with ExecuTorch's defaults for
    alignment (segment alignment is kept).

    Args:
        program_manager: what `to_executorch()` returned.
        path: a .pte, or a name without suffix. The folder is made if it is not there.
        beside: other files of the same folder that are written with them, or not either.

    Raises:
        OSError: the files cannot be written; what was there before is left as it was.
    """
    artifact = artifact_paths(path)
    pte, ptd = _serialize(program_manager)
    artifact.pte.parent.mkdir(parents=True, exist_ok=True)
    others = {other: Cord(content) for other, content in (beside or {}).items()}
    _write_all({**others, artifact.ptd: ptd, artifact.pte: pte})
    return artifact


def open_artifact(pte: str | Path, ptd: str | Path | None = None) -> tuple[PteFile, PtdFile | None]:
    """Open both files and check that they belong together.

    Args:
        pte: the program.
        ptd: its weights; by default the file of the same name. None is returned for it if there is no such file and the
            program needs none (a program that was not written by `save`).

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file is damaged, or the .ptd belongs to another program; the message says which.
    """
    files = artifact_paths(pte, ptd)
    program = PteFile(Path(pte) if Path(pte).suffix == ".pte" or Path(pte).exists() else files.pte)
    needed = _needed(program)
    identity = program.named_data().get(PTE_IDENTITY_KEY)
    if ptd is None and not needed and identity is None and not files.ptd.exists():
        return program, None
    data = PtdFile(files.ptd)
    sizes = data.sizes()
    missing = [key for key in needed if key not in sizes]
    wrong = [key for key in needed if key in sizes and sizes[key] != needed[key] and not data.is_placeholder(key)]
    if missing or wrong:
        key = (missing or wrong)[0]
        detail = (
            f"lacks {key!r}" if missing else f"has {sizes[key]} bytes under {key!r}, the program needs {needed[key]}"
        )
        more = f" (and {len(missing) + len(wrong) - 1} more)" if len(missing) + len(wrong) > 1 else ""
        raise ValueError(
            f"{data.path} does not belong to {program.path}: it {detail}{more}. Pass the .ptd of the same export"
        )
    if identity is not None:
        found = bytes(data.data(PTD_IDENTITY_KEY)) if PTD_IDENTITY_KEY in sizes else b"none"
        if found != bytes(identity):
            raise ValueError(
                f"{data.path} does not belong to {program.path}: names and sizes agree, but the weights come from "
                f"another export (digest {found.decode()[:12]}, expected {bytes(identity).decode()[:12]}). "
                "Pass the .ptd of the same export"
            )
    return program, data


def check(pte: str | Path, ptd: str | Path | None = None, *, verify_bytes: bool = False) -> Artifact:
    """Check that an artifact is whole and its files belong together.

    Args:
        pte: the program.
        ptd: its weights; by default the file of the same name.
        verify_bytes: read every weight and compare with the digest taken at export; otherwise only names, sizes and
            the recorded digests are compared, which does not read the weights.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file is damaged, or the .ptd belongs to another program.
    """
    program, data = open_artifact(pte, ptd)
    if verify_bytes and data is not None and PTD_IDENTITY_KEY in data.sizes():
        digests = data.digests()
        recorded = bytes(data.data(PTD_IDENTITY_KEY))
        del digests[PTD_IDENTITY_KEY]
        if _identity(digests) != recorded:
            raise ValueError(
                f"{data.path} is damaged: its weights differ from what was exported: copy or export it again"
            )
    return Artifact(program.path, data.path if data is not None else artifact_paths(pte, ptd).ptd)


def _needed(program: PteFile) -> dict[str, int]:
    """Keys and sizes that the program takes from the .ptd, as far as they are written in it."""
    needed = program.external_tensors()
    inside = program.named_data()
    for method, delegate in program.delegates():
        if delegate.id == CUDA_BACKEND:
            parsed = parse_delegate(program.delegate_data(delegate), f"{program.path}, method {method}")
            needed.update({weight.storage_key: weight.storage_nbytes for weight in parsed.weights})
            if parsed.library_key not in inside:
                raise ValueError(f"{program.path}, method {method}: the delegate's library is missing: export it again")
    return {key: size for key, size in needed.items() if key not in inside}


def _identity(digests: Mapping[str, tuple[int, bytes]]) -> bytes:
    """Hexadecimal digest over names, sizes and contents, in any order of the keys."""
    total = hashlib.sha256()
    for key in sorted(digests):
        size, digest = digests[key]
        total.update(f"{len(key)} {key} {size} ".encode() + digest)
    return total.hexdigest().encode()


def _digest(buffer: CordBuffer) -> tuple[int, bytes]:
    return len(buffer), buffer.sha256() if isinstance(buffer, FileBackedData) else hashlib.sha256(buffer).digest()


def _serialize(program_manager: ExecutorchProgramManager) -> tuple[Cord, Cord]:
    """Both files in memory, all external data under one tag, the identity in both."""
    emitted = program_manager._emitter_output
    named = program_manager._named_data or NamedDataStoreOutput([], {}, {})
    store = NamedDataStore()
    store.merge_named_data_store(
        replace(named, external_data={_TAG: {k: v for part in named.external_data.values() for k, v in part.items()}})
    )
    constants = {fqn: index for part in emitted.external_constant_map.values() for fqn, index in part.items()}
    digests = {fqn: _digest(emitted.external_constant_buffer[index]) for fqn, index in constants.items()}
    for key, entry in store.external_data.get(_TAG, {}).items():
        digests[key] = _digest(store.buffers[entry.buffer_index])
    identity = _identity(digests)
    store.add_named_data(PTE_IDENTITY_KEY, identity)
    store.add_named_data(PTD_IDENTITY_KEY, identity, external_tag=_TAG)
    serializer = program_manager._data_serializer
    config = ExecutorchBackendConfig(segment_alignment=serializer.config.segment_alignment)
    emitted = replace(emitted, external_constant_map={_TAG: constants} if constants else {})
    pte, ptd = serialize_for_executorch(emitted, config, serializer, store.get_named_data_store_output())
    return pte, ptd[_TAG]


def _write_all(contents: dict[Path, Cord]) -> None:
    """Write aside, flush, then rename in the given order; undo the renames if one fails."""
    suffix = f".{uuid.uuid4().hex[:8]}"
    written = {path: path.with_name(f".{path.name}{suffix}.new") for path in contents}
    kept = {path: path.with_name(f".{path.name}{suffix}.old") for path in contents}
    done: list[Path] = []
    try:
        for path, cord in contents.items():
            with written[path].open("xb") as file:
                cord.write_to_file(file)
                file.flush()
                os.fsync(file.fileno())
        for path in contents:
            if path.exists():
                os.link(path, kept[path])
        for path in contents:
            os.replace(written[path], path)
            done.append(path)
        _sync_folder(next(iter(contents)).parent)
    except BaseException:
        for path in done:
            if kept[path].exists():
                os.replace(kept[path], path)
            else:
                path.unlink(missing_ok=True)
        raise
    finally:
        for path in (*written.values(), *kept.values()):
            path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
