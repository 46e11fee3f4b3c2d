"""The messages that docs/troubleshooting.md quotes are messages of the package."""

from __future__ import annotations

import ast
import re

from .pages import ROOT

LAYERS = ("kernels", "backends", "export")


def messages() -> list[str]:
    """All strings of the package; what a format string fills in is "...", neighbors are one string."""
    found = []
    for layer in LAYERS:
        for file in (ROOT / layer).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [str(v.value) if isinstance(v, ast.Constant) else "..." for v in node.values]
                    found.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def test_quoted_messages_exist() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = [row[1] for row in re.finditer(r"^\| `(.*?)` \|", page, re.MULTILINE)]
    assert len(quoted) > 20
    known = messages()
    unknown = []
    for quote in quoted:
        fragments = [part.strip() for part in quote.split("...") if len(part.strip()) > 2]
        if not any(all(fragment in message for fragment in fragments) for message in known):
            unknown.append(quote)
    assert not unknown
