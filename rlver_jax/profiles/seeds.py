"""Seeds of new profiles, and how far texts resemble each other.

A seed is a persona, a topic and a hidden intention, each a line of text. No pair of persona and topic comes twice, and
a persona is either trained on or held out, so that a score on the held-out ones is one on strangers.
"""

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlver_jax.config.extras import install_command
from rlver_jax.profiles.held_out import choose_held_out
from rlver_jax.profiles.schema import Profile

SIMILAR = 85.0  # of 100: profiles at or above it are near-duplicates
_LISTS = ("personas", "topics", "intentions")


class SeedError(ValueError):
    """Seeds, or an installation, that no profiles can be made with."""


class Seed(NamedTuple):
    """What one profile is made of."""

    number: int
    persona: str
    topic: str
    intention: str  # as a profile's `task` names it
    held_out: bool


def read_seeds(path: str | Path, share: float, known: Sequence[str]) -> list[Seed]:
    """All seeds of a file {"personas": […], "topics": […], "intentions": […]}, in an order that its contents decide.

    Args:
        share: of personas that are held out.
        known: intentions where the file lists none.

    Raises:
        SeedError: no such file, or it has another form; the message says what was found.
    """
    try:
        lists: Any = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SeedError(f"{path}: cannot be read ({error}); expected a JSON object with {', '.join(_LISTS)}") from None
    lists = {"intentions": list(known)} | (lists if isinstance(lists, dict) else {})
    for name in _LISTS:
        texts = lists.get(name)
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise SeedError(f"{path}: {name} is {texts!r:.80}, expected a list of texts, at least one")
    personas, topics, intentions = (list(dict.fromkeys(text.strip() for text in lists[name])) for name in _LISTS)
    pairs = [(persona, topic) for persona in personas for topic in topics]
    order = np.argsort(np.random.Philox(key=len(pairs)).random_raw(len(pairs)), kind="stable")
    held_out = choose_held_out(personas, share)
    drawn = [pairs[pair] for pair in order.tolist()]
    return [
        Seed(number, persona, topic, intentions[number % len(intentions)], persona in held_out)
        for number, (persona, topic) in enumerate(drawn)
    ]


def text_of(profile: Profile) -> str:
    """What of a profile is compared."""
    return f"{profile.persona}\n{profile.background}"


def similarity(text: str, others: Sequence[str]) -> float:
    """How much a text resembles the most similar one of others, 0 to 100: the share of characters that an edit keeps.

    Raises:
        SeedError: the package rapidfuzz is missing.
    """
    try:
        from rapidfuzz import fuzz, process
    except ModuleNotFoundError:
        raise SeedError(f"near-duplicates are found by rapidfuzz: {install_command('generate')}") from None
    best = process.extractOne(text, others, scorer=fuzz.ratio) if others else None
    return best[1] if best else 0.0


def describe_profiles(profiles: Sequence[Profile]) -> str:
    """Length, balance of intentions and distinctness of a set, in words."""
    texts = [text_of(profile) for profile in profiles]
    nearest = [similarity(text, texts[:i] + texts[i + 1 :]) for i, text in enumerate(texts)]
    counts = list(_counts(profile.hidden_intention for profile in profiles).values())
    return (
        f"{len(profiles)} profiles, {statistics.median(map(len, texts)):.0f} characters in the median, "
        f"{len(counts)} intentions of {min(counts)} to {max(counts)} each, likeness to the most similar other: "
        f"{statistics.median(nearest):.0f} in the median, {max(nearest):.0f} at most (of 100)"
    )


def _counts(texts: Iterator[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for text in texts:
        counts[text] = counts.get(text, 0) + 1
    return counts
