"""The gold judge in evaluations: what the grammar's rule says of dialogues that the neural user has scored."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from rlver_jax.evaluation.play import Gold
from rlver_jax.miniature import rule
from rlver_jax.miniature.world import Person
from rlver_jax.profiles.schema import Profile


class Spoken(NamedTuple):
    """A finished dialogue as a judge needs it."""

    says: list[str]  # of the policy
    heard: list[str]  # what the person said before each
    changes: list[int]  # by which the neural user moved; one fewer after a violation of the format


def spoken(record: Mapping[str, Any]) -> Spoken:
    """A logged dialogue's turns."""
    found, last = Spoken([], [], []), ""
    for message in record["messages"]:
        if message["role"] == "assistant":
            found.says.append(message["content"] or "")
            found.heard.append(last)
        elif "change" in message:
            found.changes.append(message["change"])
        last = message["content"] or ""
    return found


def gold_judge(config: ConfigDict) -> Gold | None:
    """The judge that `eval.gold` names."""
    if not config.eval.gold:
        return None
    floor, ceiling = config.emotion.floor, config.emotion.ceiling

    def judge(records: Sequence[Mapping[str, Any]], profiles: Sequence[Profile]) -> float:
        people = {profile.id: Person.of(profile) for profile in profiles}
        return sum(rule_emotion(people[r["profile"]], r, floor, ceiling) for r in records) / len(records)

    return judge


def rule_emotion(person: Person, record: Mapping[str, Any], floor: int, ceiling: int) -> int:
    """The emotion at which the rule would have left the person of a logged dialogue."""
    says, heard, _ = spoken(record)
    return rule.score(person, says, heard, initial=record["emotions"][0], floor=floor, ceiling=ceiling)
