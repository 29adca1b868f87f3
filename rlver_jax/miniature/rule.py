"""The gold judge: what a reply is, by the world's grammar, and by how much it moves a person.

It scores finished dialogues in evaluations and labels the texts that the simulated user learns from. Training of the
policy never sees it.
"""

import dataclasses
import difflib
import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

from rlver_jax.miniature.world import (
    FAMILY,
    FEELINGS,
    FLATTERY,
    PLATITUDES,
    REMEMBERED,
    REPLIES,
    STYLES,
    TROUBLES,
    WHO,
    Person,
    Topic,
)

# A reply in the wished style, in another one of its family, in one of the other family.
LEVELS = {"serves": 10, "near": 1, "misses": -3}
WRONG_TOPIC, NO_TOPIC, AGAIN = -6, -3, -6  # what is added to it
FAULTS = {"empty": -8, "garbled": -8, "spliced": -6, "flattery": -5, "platitude": -5, "echo": -7, "injected": -10}
NOTHING = "nothing"
ALIKE = 0.8  # share of words in common from which a sentence counts as one of the grammar's

_FAULT_TEXTS = {
    "empty": "They say nothing.",
    "garbled": "They talk nonsense.",
    "spliced": "They jump between things.",
    "flattery": "They flatter me.",
    "platitude": "They brush me off.",
    "echo": "They repeat my words.",
    "injected": "They want to think for me.",
}
_NAMED = re.compile(r"\b(" + "|".join((*WHO, *TROUBLES)) + r")\b")
_INJECTED = re.compile(r"\d|change|emotion|they gave|i wish for|<|\||\{", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a reply is, and what it does to a person."""

    kind: str  # a style of STYLES or a fault of FAULTS
    mentions: tuple[str, ...]  # names in the reply, `who` before `what`
    again: bool
    change: int
    words: tuple[str, ...] = ()  # what it and the replies before it are remembered by, itself first


class Known(NamedTuple):
    """A sentence of the grammar."""

    kind: str  # style, flattery or platitude
    word: str  # that it is remembered by


@functools.cache
def _library() -> dict[str, Known]:
    """{sentence with its slots: what it is}."""
    faults = (("flattery", FLATTERY), ("platitude", PLATITUDES))
    known = {_words(sentence): Known(kind, NOTHING) for kind, sentences in faults for sentence in sentences}
    for kind, sentences in REPLIES.items():
        pairs = zip(sentences, REMEMBERED[kind], strict=True)
        known |= {_words(sentence): Known(kind, word) for sentence, word in pairs}
    return known


def _words(sentence: str) -> str:
    return " ".join(re.findall(r"\{\w+\}|\w+", sentence.lower()))


def masked(sentence: str) -> str:
    """A sentence with {who} and {what} for its names, without punctuation."""
    return _words(_NAMED.sub(lambda m: "{who}" if m[1] in WHO else "{what}", sentence.lower()))


@functools.lru_cache(maxsize=200_000)
def _nearest(sentence: str) -> Known:
    if sentence in _library():
        return _library()[sentence]
    words = sentence.split()
    likeness = lambda text: difflib.SequenceMatcher(None, words, text.split()).ratio()  # noqa: E731
    ratio, _, text = max((likeness(text), known.kind, text) for text, known in _library().items())
    return _library()[text] if ratio >= ALIKE else Known("garbled", NOTHING)


def kind_of(sentence: str) -> str:
    """Style or fault of one masked sentence: that of the grammar's sentence that it is most like."""
    return _nearest(sentence).kind


def sentences(text: str) -> list[str]:
    """A text's sentences."""
    return [part for part in re.split(r"(?<=[.?!])\s+", text.strip()) if part]


def judge(person: Person, reply: str, before: Sequence[str] = (), heard: str = "") -> Verdict:
    """Judges a reply to a person.

    Args:
        reply: of the policy.
        before: the policy's earlier replies in the dialogue.
        heard: the person's last words.
    """
    mentions = tuple(sorted(set(_NAMED.findall(reply.lower())), key=lambda name: (name not in WHO, name)))
    parts = [masked(part) for part in sentences(reply)]
    fault = _fault(reply, parts, heard)
    if fault:
        return Verdict(fault, mentions, False, FAULTS[fault])
    style = kind_of(parts[0])
    now, *earlier = (masked(text) for text in (reply, *reversed(before[-2:])))
    again = now in earlier
    change = LEVELS[_level(person, style)]
    change += {"right": 0, "wrong": WRONG_TOPIC, "none": NO_TOPIC}[topic_of(person.topic, mentions)] + again * AGAIN
    words = tuple(_nearest(text).word for text in (now, *earlier))
    return Verdict(style, mentions, again, max(-10, min(10, change)), words)


def _fault(reply: str, parts: Sequence[str], heard: str) -> str | None:
    if not any(parts):
        return "empty"
    if _INJECTED.search(reply):
        return "injected"
    if heard and difflib.SequenceMatcher(None, masked(reply).split(), masked(heard).split()).ratio() >= ALIKE:
        return "echo"
    kinds = {kind_of(part) for part in parts}
    for fault in ("garbled", "flattery", "platitude"):
        if fault in kinds:
            return fault
    return "spliced" if len(kinds) > 1 or len(parts) > 2 else None


def topic_of(topic: Topic, mentions: Sequence[str]) -> str:
    """right | wrong (a name of another topic) | none."""
    own = {topic.who, topic.what}
    return "none" if not mentions else "right" if set(mentions) <= own else "wrong"


def appraisal(person: Person, verdict: Verdict) -> dict[str, str]:
    """The verdict as the person's appraisal: the reply, the wish, and how well they match.

    What must be compared stands side by side, in one form for both comparisons: the reply's word beside those of the
    replies before it, its names beside the person's own; `again` follows what is equal. A model so small doesn't
    compare from line to line, and learns one such form late enough.
    """
    wish = f"I wish for {STYLES[person.intention]}"
    if verdict.kind in FAULTS:
        wish += f" about my {person.topic.who} and the {person.topic.what}."
        return {"heard": _FAULT_TEXTS[verdict.kind], "wish": wish, "feeling": "So it is no help at all."}
    names = " and ".join(f"my {name}" if name in WHO else f"the {name}" for name in verdict.mentions)
    word, *earlier = verdict.words
    phrase = f"{word} beside {' and '.join(earlier) or NOTHING}{' again' * verdict.again}"
    heard = f"They gave {STYLES[verdict.kind]} about {names or NOTHING}: {phrase}."
    wish += f": {_beside_own(person.topic, verdict.mentions)}."
    topic = {"right": "and my topic", "wrong": "but not my topic", "none": "without a topic"}
    feeling = f"{FEELINGS[_level(person, verdict.kind)]} {topic[topic_of(person.topic, verdict.mentions)]}"
    return {"heard": heard, "wish": wish, "feeling": f"So {feeling}{', said twice' * verdict.again}."}


def _beside_own(topic: Topic, mentions: Sequence[str]) -> str:
    """The names of a reply, each beside the person's own."""
    who = next((name for name in mentions if name in WHO), NOTHING)
    what = next((name for name in mentions if name not in WHO), NOTHING)
    pairs = ((who, topic.who), (what, topic.what))
    return ", ".join(f"{name} beside {own}{' again' * (name == own)}" for name, own in pairs)


def _level(person: Person, style: str) -> str:
    if style == person.intention:
        return "serves"
    return "near" if FAMILY[style] == FAMILY[person.intention] else "misses"


def terms(person: Person, verdict: Verdict) -> list[str]:
    """The terms that a verdict's change is made of: a fault alone, or its level, its topic if not right, again.

    Levels are those of LEVELS.
    """
    if verdict.kind in FAULTS:
        return [verdict.kind]
    topic = {"wrong": ["wrong topic"], "none": ["no topic"]}.get(topic_of(person.topic, verdict.mentions), [])
    return [_level(person, verdict.kind), *topic, *(["again"] if verdict.again else [])]


def score(
    person: Person, replies: Sequence[str], heard: Sequence[str], *, initial: int, floor: int, ceiling: int
) -> int:
    """The emotion at which the judge would have left a person after these replies, ends included.

    Args:
        heard: the person's words before each reply.
    """
    emotion = initial
    for turn, (reply, last) in enumerate(zip(replies, heard, strict=True)):
        emotion = max(0, min(100, emotion + judge(person, reply, replies[:turn], last).change))
        if emotion >= ceiling or emotion <= floor:
            break
    return emotion
