"""Markdown pages of the project as data: fenced blocks, links, headings, code spans."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *sorted(ROOT.glob("docs/*.md"))]

_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"<!-- (.*) -->")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([^`\n]+)`")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: its file. line: number of its first line of content.
        language: after the fence. text: the content.
        reason: why it is not run, from the HTML comment in the line before the fence; empty for a block that runs.
    """

    page: Path
    line: int
    language: str
    text: str
    reason: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path, language: str) -> list[Block]:
    """The blocks of a page in a language."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        before = text[: match.start()].rstrip("\n").rpartition("\n")[2]
        comment = _COMMENT.fullmatch(before.strip())
        line = text[: match.start(3)].count("\n") + 1
        found.append(Block(page, line, match[2], match[3], comment[1] if comment else ""))
    return [block for block in found if block.language == language]


def all_blocks(language: str) -> list[Block]:
    """The blocks of all pages in a language, page by page."""
    return [block for page in PAGES for block in blocks(page, language)]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def links(page: Path) -> list[str]:
    """Targets of the links and pictures of a page."""
    return _LINK.findall(prose(page))


def code_spans(page: Path) -> list[str]:
    """Texts between backticks in a page; a text may continue on the next line."""
    text = re.sub(r"(?<=\S)\n(?=\S)", " ", prose(page))
    return _CODE.findall(text)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        text = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        found.add(next(a for a in (text, *(f"{text}-{n}" for n in range(1, 99))) if a not in found))
    return found


def shell_lines(block: Block) -> list[str]:
    """The commands of a shell block: continued lines joined, comments removed, `$NAME` replaced by its value."""
    values: dict[str, str] = {}
    lines = []
    for line in block.text.replace("\\\n", " ").splitlines():
        line = re.sub(r"(^|\s)#.*$", "", line).strip()
        line = re.sub(r"\$(\w+)", lambda match: values.get(match[1], match[0]), line)
        if assigned := re.fullmatch(r'(\w+)="(.*)"', line):
            values[assigned[1]] = assigned[2]
        elif line:
            lines.append(line)
    return lines
