"""benchmarks/results: every record is in the index, once."""

from __future__ import annotations

import re

from benchmarks.gpu_tests import ROOT


def test_the_index_lists_every_record_once() -> None:
    folder = ROOT / "benchmarks" / "results"
    listed = re.findall(r"^\| \[([^\]]+)\]\(([^)]+)\) \|", (folder / "README.md").read_text(), re.M)
    assert all(title == target for title, target in listed)
    files = sorted(path.name for path in folder.iterdir() if path.name != "README.md")
    assert sorted(title for title, _ in listed) == files, "add a row to benchmarks/results/README.md"
