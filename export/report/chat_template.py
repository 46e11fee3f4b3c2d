"""The chat template of a Hugging Face model folder: a Jinja text that turns messages into a prompt."""

from __future__ import annotations

import json
from pathlib import Path

TEMPLATE_FILE, CONFIG_FILE = "chat_template.jinja", "tokenizer_config.json"


def read_chat_template(folder: Path) -> str:
    """The default template of `chat_template.jinja`, or else of `tokenizer_config.json`; empty if there is none.

    Raises:
        ValueError: a file that cannot be read, or a template that is not text.
    """
    path = folder / TEMPLATE_FILE
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8")
        path = folder / CONFIG_FILE
        if not path.is_file():
            return ""
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}): download the model again") from None
    found = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(found, list):  # several templates by name
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    if found is None:
        return ""
    if not isinstance(found, str):
        raise ValueError(f"chat_template of {path} must be text: correct it, or download the model again")
    return found
