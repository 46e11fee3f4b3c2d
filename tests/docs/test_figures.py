"""Figures and pictures of the pages agree with their sources."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from .pages import ROOT


def test_readme_has_at_most_150_lines() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", ["README.md", "docs/speed.md"])
def test_speeds_are_those_of_the_chart(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8").replace("*", "")
    figures = json.loads((ROOT / "docs" / "speed.json").read_text(encoding="utf-8"))
    assert figures["commit"] in text and figures["rows"][0]["date"] in text
    table = text.partition("| Qwen3-30B-A3B")[2].partition("\n\n")[0].splitlines()
    for row in figures["rows"]:
        (line,) = (x for x in table if x.startswith(f"| {row['name']}"))
        for speed in filter(None, row["speeds"]):
            assert f"{speed:,}" in line, (row["name"], speed)


def test_chart_shows_the_figures() -> None:
    chart = (ROOT / "docs" / "speed.svg").read_text(encoding="utf-8")
    figures = json.loads((ROOT / "docs" / "speed.json").read_text(encoding="utf-8"))
    for row in figures["rows"]:
        for text in (row["name"], *(f"{speed:,.0f}" for speed in row["speeds"] if speed is not None)):
            assert f">{text}<" in chart, text


def test_architecture_is_drawn_from_the_imports() -> None:
    script = ROOT / "docs" / "architecture.py"
    result = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
