"""What an artifact says of itself in constant methods, and the files beside it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .options import ExportOptions

MADE_FROM = "get_synthetic_options"
TOKENIZER_DIGEST = "get_tokenizer_digest"


def tokenizer_path(pte: Path) -> Path:
    """Where the tokenizer of an artifact lies: beside it, NAME.tokenizer.json."""
    return pte.with_suffix(".tokenizer.json")


def record_path(pte: Path) -> Path:
    """Where the record of an export lies: beside it, NAME.export.json."""
    return pte.with_suffix(".export.json")


def tokenizer_digest(text: str) -> str:
    """What an artifact keeps of its tokenizer.json, to know it again: SHA-256, hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def constant_methods(options: ExportOptions, config: Any, max_context: int, tokenizer: str) -> dict[str, Any]:
    """Constant methods: under the names that ExecuTorch's language model runners read, and a few of our own.

    Args:
        options: of the export.
        config: the model's configuration in transformers.
        max_context: positions in the cache.
        tokenizer: text of the tokenizer.json.
    """
    eos = config.eos_token_id
    constants = {
        "get_max_context_len": max_context,
        "get_max_seq_len": max_context,
        "get_vocab_size": config.vocab_size,
        "get_bos_id": -1 if config.bos_token_id is None else config.bos_token_id,
        "get_eos_ids": list(eos) if isinstance(eos, (list, tuple)) else [-1 if eos is None else eos],
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
