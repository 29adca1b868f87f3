"""Dialogues cut down to a size, with marks that say how much is left out."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

MOST_CHARACTERS = 2_000_000  # of one dialogue; more makes a browser slow
_LEAST_TEXT, _MARK = 60, 40  # characters: of a text that is cut, and of what says so
_PER_MESSAGE = 300  # characters that a message takes at least, its notes included
_NOTES = 12  # of a message whose dialogue is cut, at most

Dialogue = dict[str, Any]  # as the page's script reads it, see `reports.dialogue_store`


def level(sizes: Sequence[int] | np.ndarray, room: float) -> float:
    """The height to which the tallest are cut so that all together take `room`; infinity where they do anyway."""
    ordered = np.sort(np.asarray(sizes, np.float64))
    below = np.concatenate([[0.0], np.cumsum(ordered)[:-1]])  # of those smaller than each
    heights = (room - below) / np.arange(len(ordered), 0, -1)
    cut = np.flatnonzero(heights < ordered)
    return float(heights[cut[0]]) if len(cut) else float("inf")


def shortened(dialogue: Dialogue, most: int) -> Dialogue:
    """A dialogue in about `most` characters: turns in its middle left out, then the middle of its longest texts."""
    messages = _fewer(dialogue["messages"], max(most // (2 * _PER_MESSAGE), 2))
    emotions = evenly(dialogue["emotions"], max(most // 40, 2))
    notes = min(_NOTES, max(most // 2000, 1))
    cut = {**dialogue, "emotions": emotions, "messages": [_fewer_notes(message, notes) for message in messages]}
    texts = [len(text) for text in _texts(cut)]
    height = level(texts, most - 50 * len(texts) - 100 * len(messages))
    return _mapped(cut, max(int(min(height, most)), _LEAST_TEXT + _MARK))


def evenly(items: Sequence[Any], most: int) -> Sequence[Any]:
    """At most `most` (2 or more), the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, most).round().astype(int)).tolist()]


def _fewer(messages: list[Dialogue], most: int) -> list[Dialogue]:
    """At most about `most` messages; in place of turns in the middle `{"skipped": turns}`."""
    if len(messages) <= most:
        return messages
    head = 1 + 2 * (most // 4)  # the user's first words, and turns of two messages
    tail = head + (len(messages) - head - most // 2) // 2 * 2
    skipped = sum("say" in message for message in messages[head:tail])
    return [*messages[:head], {"skipped": skipped}, *messages[tail:]] if skipped else messages


def _fewer_notes(message: Dialogue, most: int) -> Dialogue:
    def fewer(notes: list[list[str]]) -> list[list[str]]:
        rest = len(notes) - most
        return notes if rest <= 0 else [*notes[:most], ["…", f"{rest:,} notes left out"]]

    return {name: fewer(value) if isinstance(value, list) else value for name, value in message.items()}


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _mapped(value: Any, most: int) -> Any:
    """The same with every text in `most` characters."""
    if isinstance(value, dict):
        return {name: _mapped(part, most) for name, part in value.items()}
    if isinstance(value, list):
        return [_mapped(part, most) for part in value]
    return short_text(value, most) if isinstance(value, str) else value


def short_text(text: str, most: int) -> str:
    """The text's beginning and end, and between them how much is left out."""
    if len(text) <= most:
        return text
    shown = max(most - _MARK, 2)
    head = shown * 3 // 4
    return f"{text[:head]} […{len(text) - shown:,} characters left out…] {text[len(text) - shown + head :]}"
