"""Chat templates: messages -> the text of a prompt."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from executorch_moe.export.report.metadata import CHAT_TEMPLATE

PLAIN = "{% for message in messages %}{{ message['content'] }}{{ '' if loop.last else '\\n' }}{% endfor %}"
"""Template for models without one: the contents of all messages, joined by line ends."""


def artifact_template(names: Collection[str], constant: Callable[[str], Any], file: Path | None = None) -> str:
    """The chat template to use with an artifact; empty if there is none.

    Args:
        names: constant methods of the artifact. constant: reads one.
        file: a file with a Jinja template that replaces the artifact's; None: the artifact's.

    Raises:
        ValueError: the file is not UTF-8.
        OSError: it cannot be read.
    """
    if file is not None:
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(
                f"chat_template={str(file)!r} is not UTF-8 text: give a file with a Jinja template"
            ) from None
    return str(constant(CHAT_TEMPLATE)) if CHAT_TEMPLATE in names else ""


def chat_tokenizer(tokenizer: Any, constant: Callable[[str], Any], template: str) -> Any:
    """A transformers tokenizer that applies a chat template.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
        constant: reads a constant method of the artifact, for its begin and end tokens.
        template: a Jinja template; empty: `PLAIN`.

    Raises:
        RuntimeError: see `require_transformers`.
    """
    from executorch_moe.export.models.pretrained import require_transformers

    transformers = require_transformers()

    def text(token: int) -> str | None:
        found: str | None = tokenizer.id_to_token(token) if token >= 0 else None
        return found

    eos = constant("get_eos_ids")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=text(int(constant("get_bos_id"))),
        eos_token=text(int(eos[0] if isinstance(eos, (list, tuple)) else eos)),
        chat_template=template or PLAIN,
    )


def render(chat: Any, messages: Sequence[Mapping[str, str]]) -> str:
    """The prompt of a conversation, which ends where the model's answer begins.

    Args:
        chat: from `chat_tokenizer`.
        messages: {"role": "system", "user" or "assistant", "content": text} each.

    Raises:
        ValueError: the template refuses the messages, or is not valid.
    """
    from jinja2 import TemplateError

    try:
        rendered: str = chat.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise ValueError(
            f"the chat template refuses these messages ({error}): change their order or roles, or use another template"
        ) from None
    return rendered
