"""Streaming tokens that end within characters: the pieces add up to the text of all tokens decoded together."""

from __future__ import annotations

import itertools

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from executorch_moe.export.generate.text_stream import TextStream

LONG = "日本語テキスト処理の例です。" * 12 + "Ünïcödé 🙂🙃 naïve — 文字" * 3


def byte_level(pieces: list[bytes]) -> tuple[Tokenizer, list[int]]:
    """A tokenizer with these byte strings as tokens, and their ids."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    # GPT-2's table: printable bytes map to themselves, others to the letters from 256 on, in order.
    others = iter(letter for letter in letters if ord(letter) >= 256)
    table = {byte: chr(byte) if byte in printable else next(others) for byte in range(256)}
    vocabulary = {"".join(table[byte] for byte in piece): index for index, piece in enumerate(dict.fromkeys(pieces))}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.decoder = decoders.ByteLevel()
    return made, [vocabulary["".join(table[byte] for byte in piece)] for piece in pieces]


def byte_fallback(words: list[str]) -> Tokenizer:
    """A tokenizer like Llama's and Mixtral's: words with their space, and a token for each byte."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocabulary |= {f"\u2581{word}": 256 + index for index, word in enumerate(words)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    made.add_special_tokens(["<s>"])
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(parts)
    return made


def streamed(tokenizer: Tokenizer, ids: list[int], prompt: int = 0) -> list[str]:
    """Pieces of text for the tokens after the prompt, and the text held back to the end."""
    stream = TextStream(tokenizer, ids[:prompt])
    return [*(stream.push(token) for token in ids[prompt:]), stream.end()]


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("first", [0, 1, 2])
def test_streaming_tokens_that_end_within_characters(width: int, first: int) -> None:
    data = LONG.encode()
    cuts = [0, *range(first or width, len(data), width), len(data)]
    tokenizer, ids = byte_level([data[a:b] for a, b in itertools.pairwise(cuts)])
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) == LONG
    # Each token completes a few characters, and no text is left for the end.
    assert max(map(len, pieces)) <= width + 1 and pieces[-1] == ""


def test_streaming_decodes_few_tokens_at_a_time() -> None:
    """If no token ends with a character, the window must not grow with the text."""
    data = ("語" * 400).encode()
    tokenizer, ids = byte_level([data[:1], *(data[at : at + 3] for at in range(1, len(data), 3))])
    stream, longest = TextStream(tokenizer), 0
    for token in ids:
        stream.push(token)
        longest = max(longest, len(stream.ids) - stream.start)
    assert longest <= 40


def test_streaming_bytes_that_fall_back() -> None:
    tokenizer = byte_fallback(["the", "word"])
    ids = [256, *"日本🙂".encode(), 257, *"é".encode(), 256]
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids) == "the日本🙂 wordé the"
    # Bytes that never complete a character: the decoder would change text that was shown.
    cut = [256, *"日".encode(), *"日".encode()[:2], 257]
    assert "".join(streamed(tokenizer, cut)).replace("\ufffd", "") == "the日 word"
    garbage = [256, *[0xFF] * 200, 257]
    assert "".join(streamed(tokenizer, garbage)).count("\ufffd") == 200


def test_the_first_word_after_a_prompt_or_a_special_token_keeps_its_space() -> None:
    tokenizer = byte_fallback(["the", "word"])
    special = tokenizer.token_to_id("<s>")
    assert "".join(streamed(tokenizer, [special, 256, 257], prompt=2)) == " word"
    assert "".join(streamed(tokenizer, [256, special, 257, 256])) == "the word the"
    whole = [*"日本語日本語".encode(), *"日".encode()]
    assert "".join(streamed(tokenizer, whole, prompt=18)) == "日"
