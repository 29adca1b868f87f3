"""The text of a reply while it is being generated: whole characters only, and nothing of a stop string."""

import codecs
from collections.abc import Sequence

from rlver_jax.text.tokenizer import Tokenizer


class StreamingDetokenizer:
    """Takes tokens one by one and returns the text that is certain.

    A character that is not complete yet, and an end that may become a stop string, are held back until the next token
    or `finish` decides. All returned texts, joined, are the decoded text up to the first stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        """`stop`: strings, none empty, that end the reply and are not part of it."""
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False  # a stop string was found: what follows is dropped

    def add(self, token: int) -> str:
        """Text that a further token makes certain."""
        return self._release(self._bytes.decode(self._tokenizer.token_bytes(token)), final=False)

    def finish(self) -> str:
        """What was held back, once no token follows."""
        return self._release(self._bytes.decode(b"", final=True), final=True)

    def _release(self, new: str, final: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        starts = [start for start in (text.find(stop) for stop in self._stop) if start >= 0]
        if starts:
            self.stopped, self._held = True, ""
            return text[: min(starts)]
        overlap = 0 if final else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - overlap :]
        return text[: len(text) - overlap]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
