"""Shell commands of the pages: all are parsed by the real command line, those that are cheap on a CPU run.

A block that cannot run here has an HTML comment with the reason before it.
"""

from __future__ import annotations

import re

import pytest

from .commands import PROGRAM, all_options, check_line, check_mention
from .conftest import Workspace
from .pages import PAGES, ROOT, Block, all_blocks, code_spans, shell_lines

BLOCKS = all_blocks("sh")
OTHERS_OPTIONS = {"--chunk", "--clock-control", "--index-url", "--local-dir", "--tiles"}
"""Options of other programs that the text of a page names: those in examples, ncu, pip, hf."""


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_commands_are_known_to_the_parser(block: Block) -> None:
    targets = re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for line in shell_lines(block):
        words = line.split()
        if words[0] == PROGRAM:
            check_line(line)
        elif words[0] == "make":
            assert words[1] in targets, f"{line}: the Makefile has no such target"
        elif words[0] == "python" and words[1].endswith(".py"):
            assert (ROOT / words[1]).exists(), f"{line}: no such script"


@pytest.mark.parametrize("block", [block for block in BLOCKS if not block.reason], ids=str)
@pytest.mark.slow
@pytest.mark.xdist_group("docs")
def test_cheap_commands_run(block: Block, workspace: Workspace) -> None:
    for line in shell_lines(block):
        workspace.run(line)


def test_options_and_commands_in_sentences_exist() -> None:
    known = all_options() | OTHERS_OPTIONS
    wrong = []
    for page in PAGES:
        if page.name == "CHANGELOG.md":  # options as they were called then
            continue
        for span in code_spans(page):
            if span.startswith("--") and re.split(r"[ =]", span)[0] not in known:
                wrong.append(f"{page.name}: {span}")
            elif span.startswith(f"{PROGRAM} "):
                try:
                    check_mention(span)
                except ValueError as error:
                    wrong.append(f"{page.name}: {error}")
    assert not wrong


def test_an_unknown_option_is_found() -> None:
    with pytest.raises(ValueError, match="--no-such"):
        check_line(f"{PROGRAM} export demo -o demo.pte --no-such 1")
    with pytest.raises(ValueError, match="no command 'publish'"):
        check_line(f"{PROGRAM} publish demo")
    with pytest.raises(ValueError, match="has no option --no-such"):
        check_mention(f"{PROGRAM} inspect --no-such NAME.pte")
