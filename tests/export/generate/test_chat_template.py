"""Chat templates, from the model's folder to a prompt, and texts that stop an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from executorch_moe.export.generate.chat import artifact_template, chat_tokenizer, render
from executorch_moe.export.generate.stop_text import StopText
from executorch_moe.export.generate.text_stream import TextStream
from executorch_moe.export.generate.tokenizer_file import read_tokenizer
from executorch_moe.export.models.chat_template import read_chat_template
from executorch_moe.export.models.pretrained import resolve
from executorch_moe.export.options import ExportOptions, Target
from executorch_moe.export.report.metadata import CHAT_TEMPLATE, constant_methods

TOKENIZER = resolve("tiny") / "tokenizer.json"
TURNS = "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"


class Config:
    vocab_size, num_hidden_layers, max_position_embeddings, eos_token_id, bos_token_id = 264, 2, 512, 257, 256


def test_the_template_of_a_folder(tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    assert read_chat_template(tmp_path) == ""
    config.write_text("{}")
    assert read_chat_template(tmp_path) == ""
    config.write_text(json.dumps({"chat_template": [{"name": "tools", "template": "t"}]}))
    assert read_chat_template(tmp_path) == ""
    config.write_text(json.dumps({"chat_template": [{"name": "default", "template": "d"}, {"name": "tools"}]}))
    assert read_chat_template(tmp_path) == "d"
    config.write_text(json.dumps({"chat_template": TURNS}))
    assert read_chat_template(tmp_path) == TURNS
    (tmp_path / "chat_template.jinja").write_text("file")
    assert read_chat_template(tmp_path) == "file"


@pytest.mark.parametrize("content", [b"{broken", b"\xff", b'{"chat_template": 5}'])
def test_damaged_files(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(ValueError, match="download the model again"):
        read_chat_template(tmp_path)


def test_the_template_of_an_artifact(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = ExportOptions("tiny", target=Target("cpu"))
    assert CHAT_TEMPLATE not in constant_methods(options, Config, 64, "{}")
    monkeypatch.setattr("executorch_moe.export.report.metadata.read_chat_template", lambda folder: TURNS)
    constants = constant_methods(options, Config, 64, "{}")
    assert artifact_template(constants, constants.__getitem__) == TURNS
    file = tmp_path / "x.jinja"
    file.write_text("other")
    assert artifact_template(constants, constants.__getitem__, file) == "other"
    file.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        artifact_template(constants, constants.__getitem__, file)


def test_messages_become_a_prompt() -> None:
    constants: dict[str, Any] = {"get_eos_ids": [257], "get_bos_id": 256}
    tokenizer = read_tokenizer(TOKENIZER)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    chat = chat_tokenizer(tokenizer, constants.__getitem__, TURNS)
    assert render(chat, messages) == "<|bos|><system>Be brief.<|eos|><user>Hi<|eos|>"
    assert tokenizer.encode(render(chat, messages), add_special_tokens=False).ids[0] == 256
    assert render(chat_tokenizer(tokenizer, constants.__getitem__, ""), messages) == "Be brief.\nHi"
    refuses = chat_tokenizer(tokenizer, constants.__getitem__, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match=r"refuses these messages \(roles must alternate"):
        render(refuses, messages)


def pushed(text: str, stop: list[str]) -> tuple[list[str], bool]:
    """Pieces of a text of one-byte tokens, and whether it was stopped."""
    tokenizer = read_tokenizer(TOKENIZER)
    stream = StopText(TextStream(tokenizer), stop)
    pieces = []
    for token in tokenizer.encode(text).ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return [*pieces, stream.end()], stream.stopped


@pytest.mark.parametrize(
    ("text", "stop", "expected", "stopped"),
    [
        ("abcdef", [], "abcdef", False),
        ("abcdef", ["cd"], "ab", True),
        ("abcdef", ["xyz", "de", "bcd"], "a", True),
        ("aab", ["ab"], "a", True),  # the beginning of a stop text before another one
        ("abcd", ["cde"], "abcd", False),  # a begun stop text is text at the end
        ("abab", ["abc", ""], "abab", False),
        ("né!", ["é"], "n", True),
    ],
)
def test_stop_texts(text: str, stop: list[str], expected: str, stopped: bool) -> None:
    pieces, found = pushed(text, stop)
    assert ("".join(pieces), found) == (expected, stopped)


def test_text_is_held_back_no_longer_than_needed() -> None:
    assert pushed("a-b", ["-->"])[0] == ["a", "", "-b", ""]
