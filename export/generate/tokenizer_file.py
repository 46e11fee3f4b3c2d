"""NAME.tokenizer.json beside an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from executorch_moe.backends.errors import said_in_one_line
from executorch_moe.export.report.metadata import TOKENIZER_DIGEST, tokenizer_digest

if TYPE_CHECKING:
    from executorch_moe.backends.artifact.pte import PteFile


def check_tokenizer(program: PteFile, path: Path) -> None:
    """Checks that a tokenizer.json belongs to the export; artifacts of older versions have no digest and pass.

    Raises:
        ValueError: it does not.
    """
    if TOKENIZER_DIGEST not in program.constant_names:
        return
    if program.constant(TOKENIZER_DIGEST) != tokenizer_digest(path.read_bytes()):
        raise ValueError(
            f"{path} is damaged or does not belong to the .pte beside it: its text differs from the tokenizer of that "
            "export. Copy the tokenizer.json of the same export"
        )


def read_tokenizer(path: Path) -> Any:
    """Reads a tokenizer.json as a `tokenizers.Tokenizer`.

    Raises:
        FileNotFoundError: the file is missing.
        ModuleNotFoundError: the tokenizers package is missing.
        ValueError: the file is not a tokenizer.
    """
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "text needs the package tokenizers, which is not installed: pip install 'executorch-moe[hf]'"
        ) from None
    check_exists(path)
    with said_in_one_line(f"{path} is not a tokenizer", "copy the tokenizer.json of the same export", ValueError):
        return Tokenizer.from_file(str(path))  # the bindings raise Exception itself


def check_exists(tokenizer: Path) -> None:
    """Checks that an artifact's tokenizer is there.

    Raises:
        FileNotFoundError: it is not.
    """
    if not tokenizer.is_file():
        raise FileNotFoundError(
            f"{tokenizer} is missing: copy it beside the .pte (an export writes .pte, .ptd and .tokenizer.json)"
        )
