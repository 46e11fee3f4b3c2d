"""What an artifact says of itself in constant methods, and the files beside it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from executorch_moe.backends.atomic_files import check_writable
from executorch_moe.export.checkpoint.work_folder import work_folder_path
from executorch_moe.export.models.pretrained import resolve, special_tokens
from executorch_moe.export.models.synthetic import is_synthetic
from executorch_moe.export.options import ExportOptions

MADE_FROM = "get_synthetic_options"
TOKENIZER_DIGEST = "get_tokenizer_digest"


RECORD_SUFFIX = ".export.json"
TOKENIZER_SUFFIX = ".tokenizer.json"


def tokenizer_path(pte: Path) -> Path:
    """Where the tokenizer of an artifact lies: beside it, NAME.tokenizer.json."""
    return pte.with_suffix(TOKENIZER_SUFFIX)


def record_path(pte: Path) -> Path:
    """Where the record of an export lies: beside it, NAME.export.json."""
    return pte.with_suffix(RECORD_SUFFIX)


def check_report(report: Path, options: ExportOptions) -> None:
    """Check the name of an export's report before anything is done: the report is written last, over what is there.

    Raises:
        ValueError: a place that cannot be written, or a file that the export reads or writes itself.
    """
    check_writable("report", report)
    pte, place = options.out, _place(report)
    folder = None if is_synthetic(options.model) else _place(resolve(options.model) / "config.json").parent
    if place in map(_place, (pte, pte.with_suffix(".ptd"), tokenizer_path(pte), record_path(pte))):
        whose = "is a file of the artifact"
    elif place.is_relative_to(_place(work_folder_path(pte) / "any").parent):
        whose = "lies in the folder of packed layers"
    elif options.kernel_configs is not None and place == _place(Path(options.kernel_configs)):
        whose = "is the file of kernel_configs"
    elif folder is not None and place.is_relative_to(folder) and place.exists() and not _is_report(place):
        whose = "is a file of the model"
    else:
        return
    raise ValueError(f"report={str(report)!r} {whose}: choose another, for example {pte.with_suffix('.report.json')}")


def _place(path: Path) -> Path:
    """What is replaced when `path` is written: links in its folder are followed, the file itself may be one."""
    return path.parent.resolve() / path.name


def _is_report(path: Path) -> bool:
    """True for a report of another export."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"compiled", "sizes"} <= content.keys()


def tokenizer_digest(content: str | bytes) -> str:
    """What an artifact keeps of its tokenizer.json, to know it again: SHA-256, hexadecimal."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def constant_methods(options: ExportOptions, config: Any, max_context: int, tokenizer: str) -> dict[str, Any]:
    """Constant methods: under the names that ExecuTorch's language model runners read, and a few of our own.

    Args:
        options: of the export.
        config: the model's configuration in transformers.
        max_context: positions in the cache.
        tokenizer: text of the tokenizer.json.

    Raises:
        ValueError: see `special_tokens`.
    """
    ends, begins = special_tokens(None if is_synthetic(options.model) else resolve(options.model), config)
    constants = {
        "get_max_context_len": max_context,
        "get_max_seq_len": max_context,
        "get_vocab_size": config.vocab_size,
        "get_bos_id": -1 if begins is None else begins,
        "get_eos_ids": ends or [-1],
        "get_n_layers": config.num_hidden_layers,
        "use_kv_cache": True,
        "enable_dynamic_shape": True,
        "get_method_output": options.output,
        TOKENIZER_DIGEST: tokenizer_digest(tokenizer),
    }
    if options.thin:
        constants[MADE_FROM] = made_from(options)
    return constants


def made_from(options: ExportOptions) -> str:
    """The options that decide what the weights of a synthetic model are, as JSON for `build.made_again`."""
    others = ("out", "target", "max_context", "kernel_configs")
    choices = {name: value for name, value in asdict(options).items() if name not in others}
    return json.dumps(choices | {"dtype": options.resolved_dtype()})
