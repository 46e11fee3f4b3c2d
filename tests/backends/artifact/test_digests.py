"""Digests of an artifact's files: damaged files never reach native code, older ones load with a note, links work."""

from __future__ import annotations

import itertools
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from executorch.exir._serialize._named_data_store import NamedDataStore
from tiny_artifacts import export_linear

from executorch_moe.backends.artifact import digests
from executorch_moe.backends.artifact import files as artifact_module
from executorch_moe.backends.artifact.digests import SEALED_KEY, TRAILER_BYTES, file_digest
from executorch_moe.backends.artifact.files import (
    PTD_IDENTITY_KEY,
    PTE_IDENTITY_KEY,
    Artifact,
    artifact_paths,
    check,
    companion,
    no_digests,
    open_artifact,
)
from executorch_moe.backends.artifact.inspect import inspect_artifact
from executorch_moe.backends.artifact.ptd import PtdFile
from executorch_moe.backends.artifact.pte import PteFile
from executorch_moe.backends.runtime import loader as runtime_module
from executorch_moe.backends.runtime.loader import load


class Reached(BaseException):
    """Native code would have been called. Not an Exception, so that no handler turns it into a message."""


@pytest.fixture
def no_native_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*_: object, **__: object) -> None:
        raise Reached

    monkeypatch.setattr(runtime_module.ExecutorchEngine, "__init__", reached)
    monkeypatch.setattr(runtime_module, "why_not_executorch", lambda backends: "")


@pytest.fixture
def copied(linear: Artifact, tmp_path: Path) -> Artifact:
    return copy(linear, tmp_path / "copy.pte")


def copy(artifact: Artifact, pte: Path) -> Artifact:
    pte.parent.mkdir(exist_ok=True)
    made = artifact_paths(pte)
    shutil.copy(artifact.pte, made.pte)
    shutil.copy(artifact.ptd, made.ptd)
    return made


@pytest.fixture(scope="module")
def unsealed(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """An artifact without digests of its files, as older versions wrote it."""

    class NoTrailer:
        def pack(self) -> bytes:
            return b""

    real = NamedDataStore.add_named_data

    def add(self: Any, key: str, *args: Any, **kwargs: Any) -> None:
        if key != SEALED_KEY:
            real(self, key, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifact_module, "trailer_of", lambda pte, ptd: NoTrailer())
        patch.setattr(NamedDataStore, "add_named_data", add)
        return export_linear(tmp_path_factory.mktemp("unsealed") / "model")


def flip(ptd: Path, key: str) -> None:
    """Flip one bit of the data under a key of a .ptd."""
    raw = bytearray(ptd.read_bytes())
    raw[raw.index(bytes(PtdFile(ptd).data(key)))] ^= 1
    ptd.write_bytes(raw)


def damaged(data: bytes, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yield (kind of damage, result): fixed ones, then `count` random ones, each different from `data`."""
    rand = random.Random(seed)
    size = len(data)

    def flipped(at: int) -> bytes:
        return data[:at] + bytes([data[at] ^ 1 << rand.randrange(8)]) + data[at + 1 :]

    def replaced(at: int, new: bytes) -> bytes:
        return (data[:at] + new + data[at + len(new) :])[:size]

    def swapped(a: int, b: int, n: int) -> bytes:
        return replaced(b, data[a : a + n])[:a] + data[b : b + n] + replaced(b, data[a : a + n])[a + n :]

    yield from {
        "empty": b"",
        "another kind": b"PK\x03\x04" + bytes(1000),
        "one byte less": data[:-1],
        "without its digests": data[:-TRAILER_BYTES],
        "one byte more": data + b"\0",
        "a page more": data + bytes(4096),
        "twice": data + data,
        "one byte before": b"\0" + data,
        "zeros": bytes(size),
        **{f"flip {at}": flipped(at) for at in (*range(64), *range(size - TRAILER_BYTES, size, 7), size - 1)},
    }.items()
    kinds: dict[str, Callable[[int], bytes]] = {
        "flip": flipped,
        "cut": lambda at: data[:at],
        "zero": lambda at: replaced(at, bytes(rand.choice((1, 16, 256, 4096, 65536)))),
        "noise": lambda at: replaced(at, rand.randbytes(rand.randrange(1, 64))),
        "swap": lambda at: swapped(at // 3, at // 3 + size // 2, rand.choice((1, 32, 512))),
        "insert": lambda at: data[:at] + rand.randbytes(3) + data[at:],
    }
    made = 0
    for name, damage in itertools.cycle(kinds.items()):
        if made == count:
            return
        at = rand.randrange(size)
        if (result := damage(at)) != data:
            made += 1
            yield f"{name} {at}", result


@pytest.mark.parametrize("kind", ["pte", "ptd"])
def test_no_damaged_file_reaches_native_code(copied: Artifact, no_native_code: None, kind: str) -> None:
    path: Path = getattr(copied, kind)
    whole = path.read_bytes()
    with pytest.raises(Reached):  # the intact file does reach native code
        load(copied.pte)
    tried = 0
    for what, content in damaged(whole, 120, 7):
        path.write_bytes(content)
        with pytest.raises(ValueError) as refused:  # not Reached
            load(copied.pte)
        message = str(refused.value)
        assert "\n" not in message and path.name in message, (what, message)
        tried += 1
    assert tried > 190


@pytest.mark.parametrize("kind", ["pte", "ptd"])
def test_without_verifying_the_structure_is_still_checked(copied: Artifact, no_native_code: None, kind: str) -> None:
    path: Path = getattr(copied, kind)
    whole = path.read_bytes()
    for what, content in damaged(whole, 60, 8):
        path.write_bytes(content)
        with pytest.raises((ValueError, Reached, NotImplementedError)) as result:
            load(copied.pte, verify=False)
        assert "\n" not in str(result.value), what
        if len(content) != len(whole) or content[:64] == bytes(64):
            assert isinstance(result.value, ValueError), (what, result.value)


def test_inspect_reads_no_damaged_program(copied: Artifact) -> None:
    whole = copied.pte.read_bytes()
    for what, content in damaged(whole, 60, 9):
        copied.pte.write_bytes(content)
        with pytest.raises(ValueError) as refused:
            inspect_artifact(copied.pte)
        assert "\n" not in str(refused.value), what


def test_files_of_two_exports(copied: Artifact, tmp_path: Path, no_native_code: None) -> None:
    other = export_linear(tmp_path / "other" / "model", seed=3)
    for kind in ("pte", "ptd"):
        mixed = copy(copied, tmp_path / kind / "mixed.pte")
        shutil.copy(getattr(other, kind), getattr(mixed, kind))
        for verify in (True, False):
            with pytest.raises(ValueError, match=r"mixed\.ptd does not belong to .*mixed\.pte: .* from another export"):
                load(mixed.pte, verify=verify)


def test_stock_executorch_loads_the_files(linear: Artifact, executorch_runtime: None) -> None:
    """The digests are where its loaders do not read."""
    from executorch.runtime import Runtime

    program = PteFile(linear.pte)
    assert program.trailer is not None
    assert program.trailer.pte_bytes + TRAILER_BYTES == linear.pte.stat().st_size
    method = Runtime.get().load_program(linear.pte, data_path=linear.ptd).load_method("forward")
    assert method is not None
    x = torch.randn(2, 4)
    torch.testing.assert_close(method.execute([x])[0], load(linear.pte).run("forward", x)[0])


def test_older_artifacts_load_with_a_note(unsealed: Artifact, tmp_path: Path, executorch_runtime: None) -> None:
    assert PteFile(unsealed.pte).trailer is None
    with pytest.warns(UserWarning, match=r"model\.pte carries no digests, .*: export it again") as notes:
        program = load(unsealed.pte)
    assert program.note in [str(note.message) for note in notes]
    assert check(unsealed.pte, verify_bytes=True) == unsealed
    bad = copy(unsealed, tmp_path / "bad.pte")
    flip(bad.ptd, "weight")
    open_artifact(bad.pte)
    with pytest.raises(ValueError, match=r"bad\.ptd is damaged: its weights differ"):
        check(bad.pte, verify_bytes=True)
    bad = copy(unsealed, tmp_path / "bad.pte")
    flip(bad.ptd, PTD_IDENTITY_KEY)
    with pytest.raises(ValueError, match=r"bad\.ptd (or .*bad\.pte )?is damaged: .* digests? of the weights"):
        open_artifact(bad.pte)


@pytest.mark.parametrize("kind", ["pte", "ptd"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: bytes(len(data)), r"^.*copy\.{kind} is damaged: its digest of the weights is not a SHA-256"),
        (lambda data: b"\xff\n" + data[2:], r"^.*copy\.{kind} is damaged: its digest of the weights is not a SHA-256"),
        (
            lambda data: b"0123" + data[4:],
            r"^.*copy\.ptd or .*copy\.pte is damaged: their digests of the weights differ",
        ),
        (
            lambda data: b"0123" * 16,
            r"copy\.ptd does not belong to .*copy\.pte: .*\(digest [0-9a-f]{{12}}, expected [0-9a-f]",
        ),
    ],
    ids=["zeros", "two bytes", "four digits", "all digits"],
)
def test_a_damaged_identity_blames_the_right_file(
    copied: Artifact, no_native_code: None, kind: str, damage: Callable[[bytes], bytes], message: str
) -> None:
    program, data = open_artifact(copied.pte)
    assert data is not None
    identity = bytes(program.named_data()[PTE_IDENTITY_KEY])
    path: Path = getattr(copied, kind)
    raw = path.read_bytes()
    assert raw.count(identity) == 1
    path.write_bytes(raw.replace(identity, damage(identity)))
    with pytest.raises(ValueError, match=message.format(kind=kind)) as refused:
        load(copied.pte, verify=False)
    assert str(refused.value).isprintable()


def test_a_whole_artifact_has_no_note(linear: Artifact, executorch_runtime: None) -> None:
    assert load(linear.pte).note == "" == no_digests(PteFile(linear.pte))


SMALL = 4096


@pytest.mark.parametrize("size", [0, 1, SMALL - 1, SMALL, SMALL + 1, 2 * SMALL + 5])
def test_each_byte_of_each_chunk_counts(tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "CHUNK", SMALL)
    monkeypatch.setattr(digests, "_BLOCK", 1000)
    path = tmp_path / "x"
    path.write_bytes(bytes(size))
    whole = file_digest(path)
    assert whole == file_digest(path, size)
    with open(path, "r+b") as file:
        for at in sorted({0, 999, 1000, SMALL - 1, SMALL, size - 1} & set(range(size))):
            file.seek(at)
            file.write(b"\1")
            file.flush()
            assert file_digest(path) != whole
            file.seek(at)
            file.write(b"\0")
            file.flush()
    assert file_digest(path) == whole
    path.write_bytes(bytes(size + 1))
    assert file_digest(path) != whole and file_digest(path, size) == whole


def test_a_file_that_becomes_shorter_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(1000))
    with pytest.raises(ValueError, match="became shorter"):
        file_digest(path, 1001)


def test_the_weights_are_read_only_where_they_are_asked_for(linear: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    real = digests.file_digest

    def noted(path: Path, size: int | None = None) -> bytes:
        read.append(path.suffix)
        return real(path, size)

    for module in ("files", "pte"):
        monkeypatch.setattr(f"executorch_moe.backends.artifact.{module}.file_digest", noted)
    open_artifact(linear.pte)
    assert read == [".pte", ".ptd"]
    inspect_artifact(linear.pte)
    assert read == [".pte", ".ptd", ".pte"]
    open_artifact(linear.pte, verify=False)
    check(linear.pte)
    assert read == [".pte", ".ptd", ".pte"]


def test_links(linear: Artifact, tmp_path: Path, no_native_code: None) -> None:
    """The weights are beside a link to the program, or beside its target; or the folder is a link."""
    for name in ("program", "both", "chain", "bare", "away"):
        (tmp_path / name).mkdir()
    (tmp_path / "program" / "a.pte").symlink_to(linear.pte)
    (tmp_path / "both" / "a.pte").symlink_to(os.path.relpath(linear.pte, tmp_path / "both"))
    (tmp_path / "both" / "a.ptd").symlink_to(linear.ptd)
    (tmp_path / "chain" / "b.pte").symlink_to(tmp_path / "program" / "a.pte")
    (tmp_path / "bare" / "latest").symlink_to(linear.pte)
    (tmp_path / "folder").symlink_to(linear.pte.parent)
    for pte in ("program/a.pte", "both/a.pte", "chain/b.pte", "bare/latest", "folder/model.pte", "folder/model"):
        with pytest.raises(Reached):
            load(tmp_path / pte)
    # Weights beside the link take precedence over those beside the program.
    shutil.copy(export_linear(tmp_path / "other" / "model", seed=4).ptd, tmp_path / "program" / "a.ptd")
    with pytest.raises(ValueError, match=r"program/a\.ptd does not belong to .*program/a\.pte"):
        load(tmp_path / "program" / "a.pte")
    (tmp_path / "away" / "a.pte").symlink_to(tmp_path / "nothing.pte")
    with pytest.raises(FileNotFoundError, match=r"a\.pte does not exist \(it is a link to .*nothing\.pte\)"):
        load(tmp_path / "away" / "a.pte")
    assert companion(tmp_path / "both" / "a.pte", ".none") == tmp_path / "both" / "a.none"


@pytest.mark.parametrize("moment", ["load", "run", "reset"])
def test_what_executorch_raises_is_one_line(
    linear: Artifact, monkeypatch: pytest.MonkeyPatch, executorch_runtime: None, moment: str
) -> None:
    def broken(*_: object) -> None:
        torch.zeros(2).reshape(3)  # raises in another package

    program = None if moment == "load" else load(linear.pte)
    where = {"load": "__init__", "run": "run", "reset": "reset"}[moment]
    monkeypatch.setattr(runtime_module.ExecutorchEngine, where, broken)
    what = "cannot run forward of" if moment == "run" else "cannot load"
    with pytest.raises(
        RuntimeError, match=rf"^executorch \(CPU\) {what} .*model\.pte \(.*\): .*inspect --verify"
    ) as one:
        if program is None:
            load(linear.pte)
        elif moment == "run":
            program.run("forward", torch.randn(2, 4))
        else:
            program.reset()
    assert "\n" not in str(one.value) and one.value.__cause__ is not None


def test_what_this_package_says_itself_stays(linear: Artifact, executorch_runtime: None) -> None:
    with pytest.raises(ValueError, match=r"^input 0 of forward has shape"):
        load(linear.pte).run("forward", torch.randn(3, 4))


def test_native_code_that_is_called_directly_is_not_taken_for_this_package(
    linear: Artifact, executorch_runtime: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Native code has no frame in a traceback."""
    program = load(linear.pte)

    class Native:
        execute = staticmethod(torch._C._nn.gelu)  # raises TypeError for these arguments

    monkeypatch.setattr(program._engine, "_methods", {"forward": Native()})
    with pytest.raises(RuntimeError, match=r"^executorch \(CPU\) cannot run forward of .*: check the file") as refused:
        program.run("forward", torch.randn(2, 4))
    assert "\n" not in str(refused.value)
