"""Decodes tokens to text as they are generated.

The text equals that of all tokens decoded together, with one exception: a byte-fallback decoder turns a whole run of
bytes into U+FFFD if the run is not valid UTF-8, but text that was returned before is not taken back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNKNOWN = "\ufffd"
_HELD = 3
"""Most bytes of an incomplete character; decoders write U+FFFD for each byte, or one for all."""
_LONGEST = 32
"""Most tokens without the end of a character before the window is cut."""
_CONTEXT = 8
"""Tokens to which the window is cut then."""


class TextStream:
    """Turns tokens into text one by one; holds back the bytes of an incomplete character.

    With each new token it decodes a window of the last tokens, because a token's text depends on those before it: a
    character may consist of several tokens, and some decoders drop the space before the first word.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int] = (), *, show_special: bool = False) -> None:
        """Starts after a prompt, whose text is not returned.

        Args:
            tokenizer: a `tokenizers.Tokenizer`.
            prompt_ids: token ids of the prompt; they must end with a complete character.
            show_special: also return the text of special tokens.
        """
        self.tokenizer, self.show_special = tokenizer, show_special
        self.ids: list[int] = list(prompt_ids)
        # The window starts at token `start`; the part `shown` of its text was returned. A character ends at `whole`.
        self.start = 0
        self.whole = len(self.ids)
        self.shown = self._decode(self.ids)

    def push(self, token: int) -> str:
        """Adds a token; returns the text that it completes, which may be empty."""
        self.ids.append(token)
        text = self._decode(self.ids[self.start :])
        settled = _settled(text)
        if not settled.startswith(self.shown):
            # Byte-fallback decoders write U+FFFD for all bytes of an incomplete run, including those shown before.
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
        """Returns the text that was held back."""
        text = self._decode(self.ids[self.start :])
        if not text.startswith(self.shown):
            self._restart()
            text = self._decode(self.ids[self.start :])
        new, self.shown = text[len(self.shown) :], text
        return new

    def _restart(self) -> None:
        """Restarts the window after the last complete character, without context."""
        self.start, self.shown = self.whole, ""

    def _move_window(self) -> None:
        """Makes the tokens since the last complete character the context, unless they have no text (special tokens)."""
        if last := self._decode(self.ids[self.whole :]):
            self.start, self.shown = self.whole, last
        self.whole = len(self.ids)

    def _cut_window(self, text: str) -> str:
        """Cuts the window to the last few tokens, if that does not change the end of its text; returns text to show."""
        start = len(self.ids) - _CONTEXT
        last = self._decode(self.ids[start:])
        known = last.lstrip(_UNKNOWN)
        if known and text.endswith(known):
            self.start = self.whole = start
            self.shown = _settled(last)
            return ""
        # So many bytes without a complete character are not text: show them as they are decoded.
        new = text[len(self.shown) :]
        self.start = self.whole = len(self.ids)
        self.shown = ""
        return new

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=not self.show_special)
        return text


def _settled(text: str) -> str:
    """The text without an incomplete character at its end."""
    end = len(text)
    while end > 0 and len(text) - end < _HELD and text[end - 1] == _UNKNOWN:
        end -= 1
    return text[:end]
