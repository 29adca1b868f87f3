"""The gold judge in evaluations: what the grammar's rule says of dialogues that the neural user has scored."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from rlver_jax.evaluation.play import Gold
from rlver_jax.miniature import rule
from rlver_jax.miniature.world import Person
from rlver_jax.profiles.schema import Profile


class JudgedDialogue(NamedTuple):
    """A finished dialogue as a judge needs it."""

    replies: list[str]  # of the policy
    heard: list[str]  # the person's words before each
    changes: list[int]  # by which the neural user moved; one fewer after a violation of the format


def judged_dialogue(record: Mapping[str, Any]) -> JudgedDialogue:
    """A logged dialogue's turns."""
    dialogue, last = JudgedDialogue([], [], []), ""
    for message in record["messages"]:
        if message["role"] == "assistant":
            dialogue.replies.append(message["content"] or "")
            dialogue.heard.append(last)
        elif "change" in message:
            dialogue.changes.append(message["change"])
        last = message["content"] or ""
    return dialogue


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
    replies, heard, _ = judged_dialogue(record)
    return rule.score(person, replies, heard, initial=record["emotions"][0], floor=floor, ceiling=ceiling)
