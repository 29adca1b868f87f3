"""The dialogues of a report as the page's dialogue browser shows them: compressed, and on disk where they are many."""

import json
import tempfile
import weakref
import zlib
from typing import Any, NamedTuple

from rlver_jax.dialogues.log import Record
from rlver_jax.reports.shorten import MOST_CHARACTERS, Dialogue
from rlver_jax.text.console import plain

_IN_MEMORY = 32 * 2**20  # bytes
_DENSEST = 16  # characters that take at least one byte of the page: a browser holds them all


class StoredDialogue(NamedTuple):
    """Where a dialogue lies in the store, and how large it is."""

    offset: int
    length: int  # compressed
    characters: int

    @property
    def size(self) -> int:
        """About how many bytes of a page it takes by itself, in at most MOST_CHARACTERS."""
        share = min(1.0, MOST_CHARACTERS / self.characters)
        return page_size(self.length * share, self.characters * share)


class DialogueStore:
    """Compressed dialogues for the page's dialogue browser."""

    def __init__(self) -> None:
        """An empty store."""
        self._file = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._end = 0

    def add(self, record: Record) -> StoredDialogue:
        """Keeps a dialogue."""
        text = as_json(dialogue(record))
        data = zlib.compress(text, 1)
        self._file.seek(self._end)
        self._file.write(data)
        self._end += len(data)
        return StoredDialogue(self._end - len(data), len(data), len(text))

    def get(self, stored: StoredDialogue) -> bytes:
        """A kept dialogue, as JSON."""
        self._file.seek(stored.offset)
        return zlib.decompress(self._file.read(stored.length))


def as_json(value: Any) -> bytes:
    """Without white space, in UTF-8."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8")


def page_size(compressed: float, characters: float) -> int:
    """Bytes of a page that a text takes: in base 64, and more where few of them unpack to more than a browser bears."""
    return int(max(compressed * 4 / 3, characters / _DENSEST))


def dialogue(record: Record) -> Dialogue:
    """What the page shows of a record: no tokens or log-probabilities, and texts that are plain."""
    return {
        "number": record["dialogue"],
        "profile": plain(record["profile"]),
        "hidden": plain(record["hidden_intention"]),
        "end": plain(record["end_reason"]),
        "reward": round(record["reward"], 4),
        "emotions": record["emotions"],
        "messages": [_message(message) for message in record["messages"]],
    }


def _message(message: Record) -> dict[str, Any]:
    """What the page shows of a message: a reply has `say`, the user's words are `user`."""
    if message["role"] == "assistant":
        shown = {"thought": message["thought"], "say": message["content"], "violation": message["violation"]}
        return _present(shown)
    answered = message["content"] is not None  # else its considerations are of a reply that was never asked for
    return _present(
        {
            "user": message["content"] or "",
            "emotion": message["emotion"],
            "change": message.get("change"),
            "appraisal": _notes(message.get("appraisal")),
            "considered": _notes(message.get("considerations") if answered else None),
        }
    )


def _notes(fields: dict[str, Any] | None) -> list[list[str]] | None:
    return [[plain(name), plain(str(text))] for name, text in fields.items()] if fields else None


def _present(fields: dict[str, Any]) -> dict[str, Any]:
    """Without what is null; texts as text."""
    return {k: plain(v) if isinstance(v, str) else v for k, v in fields.items() if v is not None}
