"""Text of an answer up to the first of several stop texts."""

from __future__ import annotations

from collections.abc import Sequence

from .text_stream import TextStream


class StopText:
    """A `TextStream` that ends at a stop text; what may be the beginning of one is held back.

    Attributes:
        stopped: a stop text was found; nothing follows.
    """

    def __init__(self, stream: TextStream, stop: Sequence[str] = ()) -> None:
        self._stream, self._stop, self._held = stream, [text for text in stop if text], ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Adds a token; returns the text that it completes, which may be empty."""
        return self._cut(self._stream.push(token), last=False)

    def end(self) -> str:
        """Returns the text that was held back."""
        return "" if self.stopped else self._cut(self._stream.end(), last=True)

    def _cut(self, new: str, *, last: bool) -> str:
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = 0 if last else max((_begun(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _begun(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` and is not all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
