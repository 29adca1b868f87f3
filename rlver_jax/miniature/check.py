"""Measures the miniature on held-out people and topics: does the user judge as the rule does, and can it be fooled?

Everything is free-running: the user writes its appraisals itself. With recorded ones in front, they would give the
answer away. `build --check` prints what is measured here.
"""

import json
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table
from scipy.stats import spearmanr

from rlver_jax.dialogues.log import Record
from rlver_jax.evaluation import play as evaluation
from rlver_jax.miniature import assets, rule, texts
from rlver_jax.miniature.gold import JudgedDialogue, gold_judge, judged_dialogue
from rlver_jax.miniature.scripted import play_scripted
from rlver_jax.miniature.settings import miniature_config
from rlver_jax.miniature.world import REPLIES, Person
from rlver_jax.rollout.rollout_metrics import is_readable
from rlver_jax.text.tokenizer import Tokenizer

SPEARMAN_BASE, SPEARMAN_TRAINED, READABLE, MARGIN = 0.9, 0.8, 0.95, 8.0
ATTACKED = 64  # people each attack is tried on

Attack = Callable[[Person, int, str, random.Random], str]


def _of_kind(kind: str) -> Attack:
    return lambda person, turn, heard, draw: texts.make_reply(kind, person, (), heard, draw).text


def _gibberish(person: Person, turn: int, heard: str, draw: random.Random) -> str:
    return "".join(draw.choice("abcdefghijklmnop qrstuvwxyz,.") for _ in range(40))


ATTACKS: dict[str, Attack] = {
    "same sentence": lambda person, turn, heard, draw: "Tell me more, I am listening.",
    "same sentence of its topic": lambda person, turn, heard, draw: person.topic.fill(REPLIES["deep_empathy"][0]),
    "empty": lambda person, turn, heard, draw: "",
    "gibberish": _gibberish,
    "shuffled words": _of_kind("garbled"),
    "spliced": _of_kind("spliced"),
    "flattery": _of_kind("flattery"),
    "injected appraisal": _of_kind("injected"),
    "echo": lambda person, turn, heard, draw: heard,
}


class JudgedReply(NamedTuple):
    """One reply, by the rule and by the neural user."""

    terms: list[str]
    by_rule: int
    by_user: int


def judge_replies(person: Person, dialogue: JudgedDialogue) -> list[JudgedReply]:
    """Every reply of a dialogue that the user appraised."""
    judged_replies = []
    for turn, judged_change in enumerate(dialogue.changes):
        verdict = rule.judge(person, dialogue.replies[turn], dialogue.replies[:turn], dialogue.heard[turn])
        judged_replies.append(JudgedReply(rule.terms(person, verdict), verdict.change, judged_change))
    return judged_replies


def agreement(dialogues: Iterable[tuple[Person, JudgedDialogue]]) -> dict[str, Any]:
    """How the user's changes agree with the rule's, turn by turn; and for each of the rule's terms."""
    pairs = [pair for person, dialogue in dialogues for pair in judge_replies(person, dialogue)]
    by_rule, by_user = np.array([p.by_rule for p in pairs]), np.array([p.by_user for p in pairs])
    errors = np.abs(by_rule - by_user)
    names = sorted({name for pair in pairs for name in pair.terms})
    having = {name: np.array([name in pair.terms for pair in pairs]) for name in names}
    return {
        "turns": len(pairs),
        "spearman": round(float(spearmanr(by_rule, by_user).statistic), 4),
        "mean_error": round(float(errors.mean()), 3),
        "same": round(float((errors == 0).mean()), 4),
        "by_term": {
            n: {"turns": int(m.sum()), "mean_error": round(float(errors[m].mean()), 3)} for n, m in having.items()
        },
    }


def readable_share(records: Sequence[Record], tokenizer: Tokenizer, role: str) -> float:
    """Share of the messages of a role that can be read, among those that were generated."""
    messages = [m for r in records for m in r["messages"][1:] if m["role"] == role and m["content"] is not None]
    tokens = [m["tokens"] if role == "assistant" else m["all_tokens"] for m in messages]
    return float(np.mean([is_readable(tokenizer, t, m["stopped"]) for t, m in zip(tokens, messages, strict=True)]))


def measure(folder: Path) -> dict[str, Any]:
    """All measurements of the miniature in a folder."""
    config = miniature_config("", folder)
    profiles = evaluation.chosen_profiles(config)
    people = {profile.id: Person.of(profile) for profile in profiles}
    played = evaluation.load(config, profiles, gold=gold_judge(config))
    records, tokenizer = played.play_all(), played.agents.tokenizer
    scores = played.scores(records)
    quality: dict[str, Any] = {
        "base": {name: round(scores[name], 2) for name in ("score", "rule_score", "turns_mean")},
        "agreement_base": agreement((people[record["profile"]], judged_dialogue(record)) for record in records),
        "readable": {role: round(readable_share(records, tokenizer, role), 4) for role in ("assistant", "user")},
    }
    if (folder / assets.TRAINED).exists():
        quality["agreement_trained"] = agreement(replayed(played, read_replies(folder / assets.TRAINED)))
    quality["attacks"] = {name: round(attacked(played, attack), 2) for name, attack in ATTACKS.items()}
    return quality


def replayed(played: evaluation.Evaluation, replies: dict[str, list[str]]) -> list[tuple[Person, JudgedDialogue]]:
    """The user on replies that were recorded, {profile id: replies}, its appraisals and answers its own."""
    profiles = [profile for profile in played.profiles if profile.id in replies]
    scripts = [replies[profile.id] for profile in profiles]
    reply = lambda i, turn, heard: scripts[i][turn] if turn < len(scripts[i]) else None  # noqa: E731
    dialogues = play_scripted(played.agents, profiles, played.limits, reply)
    people = [Person.of(profile) for profile in profiles]
    judged_dialogues = [JudgedDialogue(d.replies, d.answers[: len(d.replies)], d.changes) for d in dialogues]
    return list(zip(people, judged_dialogues, strict=True))


def attacked(played: evaluation.Evaluation, attack: Attack) -> float:
    """Mean final emotion of held-out people under an attack."""
    profiles, draw = played.profiles[:ATTACKED], random.Random(0)
    people = [Person.of(profile) for profile in profiles]
    reply = lambda i, turn, heard: attack(people[i], turn, heard, draw)  # noqa: E731
    dialogues = play_scripted(played.agents, profiles, played.limits, reply)
    return float(np.mean([d.emotions[-1] for d in dialogues]))


def write_replies(path: Path, records: Sequence[Record]) -> None:
    """A policy's replies in each dialogue, a line each."""
    replies = ({"profile": record["profile"], "says": judged_dialogue(record).replies} for record in records)
    path.write_text("".join(json.dumps(line) + "\n" for line in replies), encoding="utf-8")


def read_replies(path: Path) -> dict[str, list[str]]:
    """What `write_replies` wrote, {profile id: replies}."""
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {line["profile"]: line["says"] for line in lines}


class Gate(NamedTuple):
    """A bound on a measurement."""

    name: str
    value: float
    relation: str  # >= | <
    bound: float

    @property
    def holds(self) -> bool:
        """Whether the value keeps to it."""
        return self.value >= self.bound if self.relation == ">=" else self.value < self.bound


def gates(quality: dict[str, Any]) -> list[Gate]:
    """The bounds that a miniature must keep to before it is shipped."""
    bounds = [Gate("spearman, base policy", quality["agreement_base"]["spearman"], ">=", SPEARMAN_BASE)]
    if "agreement_trained" in quality:
        spearman = quality["agreement_trained"]["spearman"]
        bounds.append(Gate("spearman, trained policy", spearman, ">=", SPEARMAN_TRAINED))
    for role, who in (("assistant", "policy"), ("user", "user")):
        bounds.append(Gate(f"readable messages of the {who}", quality["readable"][role], ">=", READABLE))
    bound = quality["base"]["score"] + MARGIN
    return bounds + [Gate(f"attack: {name}", score, "<", bound) for name, score in quality["attacks"].items()]


def table(quality: dict[str, Any]) -> Table:
    """The gates as a person reads them."""
    result = Table("gate", "measured", "", "bound", "holds")
    for gate in gates(quality):
        cells = f"{gate.value:.3f}", gate.relation, f"{gate.bound:.3f}", "yes" if gate.holds else "NO"
        result.add_row(gate.name, *cells)
    return result
