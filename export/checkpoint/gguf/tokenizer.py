"""The tokenizer.json of a GGUF file, by transformers' conversion, with some more ways to split text.

Source of the expressions: `llama_vocab_pre_type` in llama.cpp's llama-vocab.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from executorch_moe.export.models.pretrained import require_transformers

_GLM = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS: Mapping[str, tuple[str, ...]] = {
    "deepseek-v3": (r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", _DEEPSEEK),
    "glm4": (_GLM,),
    "chatglm-bpe": (_GLM,),
}
"""`tokenizer.ggml.pre` -> expressions that split text one after the other."""
_AS_GPT2 = ("gpt-2", "olmo")
"""Those that split text as GPT-2 does, which is what transformers does without an expression."""


def tokenizer_json(path: Path, metadata: Mapping[str, Any]) -> str:
    """Text of tokenizer.json.

    Raises:
        ValueError: a tokenizer that cannot be converted, or one that splits text in another way.
        RuntimeError: transformers is too old to convert tokenizers.
    """
    transformers = require_transformers()
    folder = (
        "put config.json and tokenizer.json of the original model into a folder with the GGUF file, and give the folder"
    )
    try:
        from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:
        # Earlier conversions leave out control tokens.
        raise RuntimeError(
            f"transformers {transformers.__version__} does not convert the tokenizer in {path} exactly: install "
            f"transformers 5.24, or {folder}"
        ) from None
    kind, split = metadata.get("tokenizer.ggml.model"), str(metadata.get("tokenizer.ggml.pre"))
    known = (*SPLITS, *_AS_GPT2, *GGUF_PRE_TOKENIZER_SPLITS)
    if kind == "gpt2" and split not in known:  # with another split, the same text would be other tokens
        raise ValueError(
            f"the tokenizer in {path} cannot be converted (tokenizer.ggml.pre={split!r}, supported: "
            f"{', '.join(known)}): {folder}"
        )
    try:
        architecture, tokenizer, _ = get_gguf_tokenizer(str(path))
        made = convert_gguf_tokenizer(architecture, tokenizer)[0]
        if kind == "gpt2" and split in SPLITS:
            made.pre_tokenizer = _splitting(SPLITS[split])
        text: str = made.to_str()
    except Exception as error:  # transformers and tokenizers raise their own classes
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"the tokenizer in {path} ({kind}) cannot be converted ({reason}): {folder}") from error
    return text


def _splitting(expressions: tuple[str, ...]) -> Any:
    from tokenizers import Regex, pre_tokenizers

    splits = [pre_tokenizers.Split(Regex(expression), behavior="isolated") for expression in expressions]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
