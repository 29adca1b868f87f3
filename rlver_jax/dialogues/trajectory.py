"""The emotions of a logged dialogue, and checks of their arithmetic; no model is needed."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from rlver_jax.user.emotion import CHANGES, HIGHEST, EmotionRules

RLVER = "RLVER"  # `source` of a record that comes from a log of RLVER's simulator
Message = Mapping[str, Any]


def reactions(record: Mapping[str, Any]) -> Iterator[tuple[int, Message, Message]]:
    """(turn, policy's message, user's message) of every turn that the user appraised."""
    turn = -1
    for message, after in itertools.pairwise([*record["messages"][1:], None]):
        turn += message["role"] == "assistant"
        if message["role"] == "assistant" and after is not None and after["role"] == "user":
            yield turn, message, after


def emotions_of(record: Mapping[str, Any]) -> list[int]:
    """The initial emotion and the one after each reply, as the messages give them.

    A reply that nobody appraised moves nothing: one that broke the format, SAGE's last one at the turn limit, or one to
    which an endpoint gave no appraisal that could be read.
    """
    emotions = [record["messages"][0]["emotion"]] + [user["emotion"] for _, _, user in reactions(record)]
    elsewhere = record["seed"] is None or "remote" in record
    unappraised = record["violation"] or (elsewhere and record["turns"] == len(emotions))
    return emotions + emotions[-1:] * unappraised


def emotion_faults(record: Mapping[str, Any], rules: EmotionRules) -> Iterator[str]:
    """Where an emotion is not the one before plus the change, or the totals are not those of the messages.

    RLVER's simulator bounds neither a change nor an emotion's fall: it takes min(emotion + change, 100).
    """
    unbounded = record.get("source") == RLVER
    emotion = record["messages"][0]["emotion"]
    for turn, _, user in reactions(record):
        change = user["change"]
        if not unbounded and not CHANGES[0] <= change <= CHANGES[-1]:
            yield f"turn {turn + 1}: change {change:+d}, expected {CHANGES[0]} to +{CHANGES[-1]}"
        expected = min(emotion + change, HIGHEST) if unbounded else int(rules.update(emotion, change))
        if user["emotion"] != expected:
            yield f"turn {turn + 1}: emotion {user['emotion']}, but {emotion} {change:+d} makes {expected}"
        emotion = user["emotion"]
    emotions = emotions_of(record)
    if list(record["emotions"]) != emotions:
        yield f"emotions {record['emotions']} are not those after each turn, {emotions}"
    if record["emotion"] != emotions[-1]:
        yield f"final emotion {record['emotion']}, but the last turn's is {emotions[-1]}"
