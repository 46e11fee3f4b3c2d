"""Writes and checks the artifact: a .pte and its .ptd, which belong together."""

from __future__ import annotations

import hashlib
import operator
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from executorch.exir import ExecutorchProgramManager
from executorch.exir._serialize._cord import Cord, CordBuffer, FileBackedData
from executorch.exir._serialize._named_data_store import NamedDataStore, NamedDataStoreOutput
from executorch.exir._serialize._serialize import serialize_for_executorch
from executorch.exir.capture._config import ExecutorchBackendConfig

from executorch_moe.backends.atomic_files import atomic_files
from executorch_moe.backends.errors import said_in_one_line

from .digests import COPY_AGAIN, SEALED_KEY, file_digest, trailer_of
from .ptd import PtdFile
from .pte import PteFile, map_file
from .weight_metadata import CUDA_BACKEND, parse_delegate

# The same digest under two keys, because the runtime merges the named data of both files and refuses duplicate keys.
PTE_IDENTITY_KEY = "executorch_moe.belongs_to"
PTD_IDENTITY_KEY = "executorch_moe.identity"
_TAG = "weights"
_BLOCK = 1 << 20
_ZEROS = bytes(_BLOCK)
_DIGEST = re.compile(rb"[0-9a-f]{64}")


@dataclass(frozen=True)
class Artifact:
    """The two files of an exported program."""

    pte: Path
    ptd: Path


def artifact_paths(path: str | Path, ptd: str | Path | None = None) -> Artifact:
    """Both paths, from that of a .pte or one without suffix; `ptd` overrides the second."""
    text = os.fspath(path)
    stem = text[: -len(".pte")] if text.endswith(".pte") else text
    return Artifact(Path(stem + ".pte"), Path(ptd) if ptd is not None else Path(stem + ".ptd"))


def companion(pte: Path, suffix: str) -> Path:
    """The file with another suffix beside a .pte. If `pte` is a link, also beside each target of the link.

    Returns the first one that exists, or else the one beside `pte` itself.
    """
    places = [Path(_stem(place) + suffix) for place in _links(pte)]
    return next((place for place in places if place.exists()), places[0])


def _stem(path: Path) -> str:
    return os.fspath(path.with_suffix("") if path.suffix == ".pte" else path)


def _links(path: Path) -> Iterator[Path]:
    """A path, then the target of each link, one after the other."""
    for _ in range(40):  # Linux follows as many
        yield path
        if not path.is_symlink():
            return
        path = path.parent / path.readlink()


def save(
    program_manager: ExecutorchProgramManager, path: str | Path, beside: Mapping[Path, bytes] | None = None
) -> Artifact:
    """Write `path`.pte and `path`.ptd together: both, or neither.

    All external data goes into one .ptd, and a digest of it into both files, so that `open_artifact` recognizes a .ptd
    of another export even if keys and sizes agree. For this the program is serialized again, with ExecuTorch's default
    alignment except for segments, whose alignment is kept. Digests of both files follow the program; see `digests`.
    Long runs of zeros, such as empty KV caches, take no disk space where the file system has sparse files.

    Args:
        program_manager: the return value of `to_executorch()`.
        path: a .pte, or a name without suffix. A missing folder is created.
        beside: contents of other files in the same folder, written together with the two.

    Returns:
        The paths of both files.

    Raises:
        OSError: the files cannot be written; earlier files stay unchanged.
    """
    artifact = artifact_paths(path)
    pte, ptd = _serialize(program_manager)
    others = beside or {}
    with atomic_files(*others, artifact.ptd, artifact.pte) as aside:
        for other, content in others.items():
            aside[other].write_bytes(content)
        for name, cord in ((artifact.ptd, ptd), (artifact.pte, pte)):
            with open(aside[name], "wb") as file:
                cord.write_to_file(_WithHoles(file))
                file.truncate()
        trailer = trailer_of(aside[artifact.pte], aside[artifact.ptd])
        with open(aside[artifact.pte], "ab") as file:
            file.write(trailer.pack())
    return artifact


class _WithHoles:
    """A file in which blocks of zeros are skipped instead of written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def write(self, data: CordBuffer | memoryview) -> int:
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        for start in range(0, len(view), _BLOCK):
            part = view[start : start + _BLOCK]
            # Most blocks of weights differ in their first bytes, which takes no copy to find out.
            if len(part) == _BLOCK and bytes(part[:64]) == _ZEROS[:64] and bytes(part) == _ZEROS:
                self._file.seek(_BLOCK, os.SEEK_CUR)
            else:
                self._file.write(part)
        return len(view)


def open_artifact(
    pte: str | Path | PteFile, ptd: str | Path | None = None, *, verify: bool = True, verify_weights: bool | None = None
) -> tuple[PteFile, PtdFile | None]:
    """Open both files and check that they belong together.

    Args:
        pte: the program, a link to it, its name without suffix, or an opened program.
        ptd: its weights; by default the file of the same name, beside the program or beside the target of the link.
        verify: compare both files with the digests of the export before anything else reads them. A program without
            digests passes (its `trailer` is None). False: compare sizes and structure only.
        verify_weights: the same for the .ptd alone; by default equal to `verify`.

    Returns:
        The program and its weights; None for the weights if the file does not exist and the program needs none, which
        happens only for programs that `save` did not write.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file is damaged, or the .ptd belongs to another program; the message says which.
    """
    program = pte if isinstance(pte, PteFile) else PteFile(_pte_path(pte), verify=verify)
    weights = Path(ptd) if ptd is not None else companion(program.path, ".ptd")
    with said_in_one_line(
        f"{program.path} cannot be read", COPY_AGAIN, ValueError, keep=(OSError, NotImplementedError)
    ):
        needed = _needed(program)
        identity = program.named_data().get(PTE_IDENTITY_KEY)
        if program.trailer is not None:
            _check_whole(program, weights, needed, verify if verify_weights is None else verify_weights)
        elif ptd is None and not needed and identity is None and not weights.exists():
            return program, None
        data = PtdFile(weights)
        _check_pair(program, data, needed)
    return program, data


def _pte_path(pte: str | Path) -> Path:
    return Path(pte) if Path(pte).suffix == ".pte" or Path(pte).exists() else artifact_paths(pte).pte


def _check_whole(program: PteFile, ptd: Path, needed: Mapping[str, int], verify: bool) -> None:
    """Check the size of a .ptd, and with `verify` its digest, against the trailer of its program.

    Raises:
        FileNotFoundError: the .ptd does not exist.
        ValueError: the .ptd is damaged, or of another export.
    """
    trailer = program.trailer
    assert trailer is not None
    map_file(ptd, "weights").close()  # raises for a missing file, a folder, or an empty file
    size = ptd.stat().st_size
    if size == trailer.ptd_bytes and not (verify and file_digest(ptd) != trailer.ptd_digest):
        return
    # If its names can be read, they distinguish a file of another export from a damaged one.
    _check_pair(program, PtdFile(ptd), needed)
    detail = (
        f"it has {size} bytes, the export wrote {trailer.ptd_bytes}"
        if size != trailer.ptd_bytes
        else ("its bytes differ from those that were exported")
    )
    raise ValueError(f"{ptd} is damaged: {detail}: {COPY_AGAIN}")


def _check_pair(program: PteFile, data: PtdFile, needed: Mapping[str, int]) -> None:
    """Check that the .ptd contains the weights that the program needs and comes from the same export.

    Raises:
        ValueError: weights are missing or have other sizes, the .ptd is of another export, or one of them is damaged.
    """
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
    identity = program.named_data().get(PTE_IDENTITY_KEY)
    if identity is not None:
        _check_identity(program.path, bytes(identity), data)


def _check_identity(pte: Path, expected: bytes, data: PtdFile) -> None:
    """Compare the digest of the weights in a .pte with the one in its .ptd.

    Raises:
        ValueError: they differ; the message names the file that is damaged, or both if it is unknown which.
    """
    if PTD_IDENTITY_KEY not in data.sizes():
        raise ValueError(
            f"{data.path} does not belong to {pte}: it has no digest of the weights. Pass the .ptd of the same export"
        )
    found = bytes(data.data(PTD_IDENTITY_KEY))
    if found == expected:
        return
    for path, digest in ((pte, expected), (data.path, found)):
        if not _DIGEST.fullmatch(digest):
            raise ValueError(
                f"{path} is damaged: its digest of the weights is not a SHA-256 in hexadecimal: {COPY_AGAIN}"
            )
    # Digests of two exports have few characters in common, by chance.
    if sum(map(operator.eq, expected, found)) > len(expected) // 2:
        raise ValueError(
            f"{data.path} or {pte} is damaged: their digests of the weights differ in a few characters: {COPY_AGAIN}"
        )
    raise ValueError(
        f"{data.path} does not belong to {pte}: names and sizes agree, but the weights come from another export "
        f"(digest {found[:12].decode()}, expected {expected[:12].decode()}). Pass the .ptd of the same export"
    )


def check(pte: str | Path, ptd: str | Path | None = None, *, verify_bytes: bool = False) -> Artifact:
    """Check that an artifact is complete and its files belong together.

    Args:
        pte: the program.
        ptd: its weights; by default the file of the same name.
        verify_bytes: read both files and compare them with the digests of the export. Otherwise only names and sizes
            are compared, without reading the weights. In an artifact without digests of its files, the weights are
            compared with the digest that both files contain.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file is damaged, or the .ptd belongs to another program.
    """
    program, data = open_artifact(pte, ptd, verify=verify_bytes)
    if verify_bytes and program.trailer is None and data is not None and PTD_IDENTITY_KEY in data.sizes():
        digests = data.digests()
        recorded = bytes(data.data(PTD_IDENTITY_KEY))
        del digests[PTD_IDENTITY_KEY]
        if _identity(digests) != recorded:
            raise ValueError(f"{data.path} is damaged: its weights differ from those that were exported: {COPY_AGAIN}")
    return Artifact(program.path, data.path if data is not None else artifact_paths(pte, ptd).ptd)


def no_digests(program: PteFile) -> str:
    """A warning for a program without digests; empty for one with digests."""
    if program.trailer is not None:
        return ""
    return f"{program.path} carries no digests, damage to it may go unnoticed: export it again to have it checked"


def _needed(program: PteFile) -> dict[str, int]:
    """Keys and sizes in bytes that the program needs from the .ptd, as far as the program records them."""
    needed = program.external_tensors()
    inside = program.named_data()
    for method, delegate in program.delegates():
        if delegate.id == CUDA_BACKEND:
            parsed = parse_delegate(program.delegate_data(delegate), f"{program.path}, method {method}")
            needed.update({weight.storage_key: weight.storage_nbytes for weight in parsed.weights})
            if parsed.library_key not in inside:
                raise ValueError(f"{program.path}, method {method}: the delegate's library is missing: {COPY_AGAIN}")
    return {key: size for key, size in needed.items() if key not in inside}


def _identity(digests: Mapping[str, tuple[int, bytes]]) -> bytes:
    """Hexadecimal digest of names, sizes and contents, independent of the order of the keys."""
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
    store.add_named_data(SEALED_KEY, b"1")
    store.add_named_data(PTD_IDENTITY_KEY, identity, external_tag=_TAG)
    serializer = program_manager._data_serializer
    config = ExecutorchBackendConfig(segment_alignment=serializer.config.segment_alignment)
    emitted = replace(emitted, external_constant_map={_TAG: constants} if constants else {})
    pte, ptd = serialize_for_executorch(emitted, config, serializer, store.get_named_data_store_output())
    return pte, ptd[_TAG]
