"""The dialogues that a config and its seeds play, and how a log differs: one twice, one missing, another profile."""

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from rlver_jax.profiles.reader import ProfileReader
from rlver_jax.profiles.schema import Profile
from rlver_jax.rollout.profile_tokens import WIDTH_STEP
from rlver_jax.text.padding import round_up
from rlver_jax.text.tokenizer import Tokenizer

SHOWN = 8  # runs of numbers in a message
MOST_STEPS = 100_000  # of a training run that a log can be of


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """How a config plays dialogues of one kind, evaluations or training's steps.

    Attributes:
        fields: of the config, with their values, for messages: by "seed", "initial_emotion", "max_turns", and
            "num_profiles" what decides the set.
        temperature: of the policy.
        endpoints: which of "policy" and "user" are behind one.
        other_on_device: whether what `endpoints` names is on the device after all, checked apart (`two_tokenizers`).
        repeats: dialogues of each profile; 0: as many as a log has, rounded up.
        partial: a log may lack dialogues.
    """

    fields: Mapping[str, str]
    seed: int
    initial_emotion: int
    max_turns: int
    temperature: float
    profiles: Sequence[Profile]
    endpoints: Collection[str] = ()
    repeats: int = 0
    partial: bool = False
    other_on_device: bool = False

    def profile(self, dialogue: int) -> Profile | None:
        """The profile that this dialogue is played with; None: there is no such dialogue."""
        return self.profiles[dialogue % len(self.profiles)]

    def numbers(self, logged: Collection[int]) -> Collection[int]:
        """The dialogues that a whole log with these numbers has."""
        count = len(self.profiles)
        return range(count * (self.repeats or -(-len(logged) // count)))

    def likeness(self, records: Sequence[Mapping[str, Any]]) -> int:
        """How many of the records' fields agree with this plan."""
        return sum(map(self._likeness, records))

    def _likeness(self, record: Mapping[str, Any]) -> int:
        profile, first = self.profile(record["dialogue"]), record["messages"][0]["content"].strip()
        if profile is None:
            return 0
        same = (record["profile"], record["hidden_intention"]) == (profile.id, profile.hidden_intention)
        talk = (profile.first_talk or first).strip()
        points = (record["seed"] == self.seed, record["initial_emotion"] == self.initial_emotion, first == talk)
        return 2 * same + sum(points)

    def opening_width(self, tokenizer: Tokenizer) -> int:
        """Columns of the first utterances as `Agents.tokens` pads them: those of all profiles are as wide."""
        widest = 1
        for profile in self.profiles:
            talk = (profile.first_talk or "").strip()
            if len(talk.encode()) > round_up(widest, WIDTH_STEP):  # a token has a byte at least
                widest = max(widest, len(tokenizer.encode(talk)))
        return round_up(widest, WIDTH_STEP)


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingPlan(Plan):
    """The steps of a training run: `reader` says which profiles each plays, for `group` dialogues each."""

    reader: ProfileReader | None = None
    batch: int = 1
    group: int = 1

    def profile(self, dialogue: int) -> Profile | None:
        """The profile that this dialogue is played with; None: there is no such dialogue."""
        step, offset = divmod(dialogue, self.batch)
        if self.reader is None or step >= MOST_STEPS:
            return None
        epoch, position = divmod(step * self.batch // self.group, len(self.profiles))
        self.reader.restore({"epoch": epoch, "position": position})
        return self.reader.next_batch()[offset // self.group][1]

    def numbers(self, logged: Collection[int]) -> Collection[int]:
        """Those of every step that appears."""
        size, steps = self.batch, sorted({number // self.batch for number in logged})
        return [n for step in steps if step < MOST_STEPS for n in range(step * size, (step + 1) * size)]


def best_plan(plans: Sequence[Plan], records: Sequence[Mapping[str, Any]]) -> Plan:
    """The plan that explains the records best; of equal ones the first."""
    return max(plans, key=lambda plan: plan.likeness(records))


def set_faults(plan: Plan, records: Sequence[Mapping[str, Any]], unread: Collection[int] = ()) -> Iterator[str]:
    """Where the dialogues of a log are not those that the plan plays.

    Args:
        records: with a number, a seed and a profile of the right types.
        unread: numbers of further dialogues, whose lines cannot be used.
    """
    counts = Counter(record["dialogue"] for record in records)
    counts.update(unread)
    if twice := sorted(number for number, count in counts.items() if count > 1):
        yield f"dialogues {ranges(twice)} are there more than once"
    planned = set(plan.numbers(counts))
    unknown, absent = sorted(counts.keys() - planned), sorted(planned - counts.keys())
    if plan.partial and not plan.repeats:
        unknown = []
    expected = f"those that the config plays: {ranges(sorted(planned))} ({plan.fields['num_profiles']})"
    remedy = "give the fields that they were played with"
    if unknown:
        yield f"dialogues {ranges(unknown)} are none of {expected}; {remedy}"
    if absent and not plan.partial:
        yield f"dialogues {ranges(absent)} are missing of {expected}; {remedy}, or --partial if they were left out"


def ranges(numbers: Sequence[int]) -> str:
    """Rising numbers in words: 3, 5 to 9."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    shown = [" to ".join(map(str, run)) for run in runs[:SHOWN]]
    return ", ".join(shown) + (f" and {len(runs) - SHOWN} more" if len(runs) > SHOWN else "")
