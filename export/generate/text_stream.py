"""Text of tokens as they come. It equals the text of all tokens decoded at once, except that a byte-fallback decoder
turns a whole run of bytes into U+FFFD if the run is not valid UTF-8: bytes already returned stay as they were."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNKNOWN = "\ufffd"
_HELD = 3
"""Bytes that a character may lack its end after; decoders write each, or all of them together, as U+FFFD."""
_LONGEST = 32
_CONTEXT = 8
"""After _LONGEST tokens none of which ends with a character, the window is cut to the last _CONTEXT."""


class TextStream:
    """Turns tokens into text as they come; holds back bytes of a character that is not whole yet.

    A window of the last tokens is decoded with each new one, because a token's text depends on those before it:
    a character may be cut into several tokens, and some decoders drop the space of the first word.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int] = ()) -> None:
        """Starts after a prompt, whose text is not returned.

        Args:
            tokenizer: a `tokenizers.Tokenizer`.
            prompt_ids: tokens of the prompt, whole characters.
        """
        self.tokenizer = tokenizer
        self.ids: list[int] = list(prompt_ids)
        # The window starts at `start`; `shown` of its text was returned. A character ends at `whole`.
        self.start = 0
        self.whole = len(self.ids)
        self.shown = self._decode(self.ids)

    def push(self, token: int) -> str:
        """The new text that `token` completes, often a part of a word, sometimes nothing yet."""
        self.ids.append(token)
        text = self._decode(self.ids[self.start :])
        settled = _settled(text)
        if not settled.startswith(self.shown):
            # Byte-fallback decoders write U+FFFD for all bytes of a run that is not whole, those shown before too.
            if text.endswith(_UNKNOWN) and len(self.ids) - self.whole <= _HELD:
                return ""
            self._restart()
            text = self._decode(self.ids[self.start :])
            settled = _settled(text)
        new, self.shown = settled[len(self.shown) :], settled
        if settled == text:
            self._move_window()
        elif len(self.ids) - max(self.start, self.whole) > _LONGEST:
            new += self._cut_window(text)
        return new

    def end(self) -> str:
        """What was held back."""
        text = self._decode(self.ids[self.start :])
        if not text.startswith(self.shown):
            self._restart()
            text = self._decode(self.ids[self.start :])
        new, self.shown = text[len(self.shown) :], text
        return new

    def _restart(self) -> None:
        """A window without context, after the last whole character that was shown."""
        self.start, self.shown = self.whole, ""

    def _move_window(self) -> None:
        """The text since the last whole character becomes the context, unless it is empty: special tokens have none."""
        if last := self._decode(self.ids[self.whole :]):
            self.start, self.shown = self.whole, last
        self.whole = len(self.ids)

    def _cut_window(self, text: str) -> str:
        """The window becomes the last few tokens, if their text ends as its own does; returns what is shown now."""
        start = len(self.ids) - _CONTEXT
        last = self._decode(self.ids[start:])
        known = last.lstrip(_UNKNOWN)
        if known and text.endswith(known):
            self.start = self.whole = start
            self.shown = _settled(last)
            return ""
        # Bytes without any character among so many are no text.
        new = text[len(self.shown) :]
        self.start = self.whole = len(self.ids)
        self.shown = ""
        return new

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text


def _settled(text: str) -> str:
    """The text without what may become another character with the next token."""
    end = len(text)
    while end > 0 and len(text) - end < _HELD and text[end - 1] == _UNKNOWN:
        end -= 1
    return text[:end]
