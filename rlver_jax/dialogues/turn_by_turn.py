"""Dialogues turn by turn: the rules of `sampler.sample_dialogues`, for agents of any kind.

Where both models are on the device, `sample_dialogues` plays whole batches in one program. Here one agent at least is
somewhere else, text goes back and forth, and the host decides after each turn which dialogues have ended.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

from rlver_jax.dialogues.log import UNREADABLE, Record
from rlver_jax.endpoints.errors import ContextFull
from rlver_jax.endpoints.usage import Usage
from rlver_jax.profiles.schema import Profile
from rlver_jax.rollout.end_reason import CONTEXT, END_REASONS, FORMAT, RUNNING, end_reason
from rlver_jax.user.emotion import EmotionRules
from rlver_jax.user.text_forms import Unreadable


@dataclasses.dataclass(eq=False)
class Row:
    """One dialogue while it is played.

    Attributes:
        number: of the dialogue; decides its randomness.
        slot: its row in a batch on the device.
        messages: as in a log.
        emotions: the initial one first, then one after each reply of the policy.
        end: why it ended, or "" while it runs.
        index: of its profile among all profiles; -1: not known.
        goodbye: whether the user's last reply takes leave.
        usage: of the agents behind an endpoint, by name.
    """

    number: int
    slot: int
    profile: Profile
    emotions: list[int]
    index: int = -1
    messages: list[Record] = dataclasses.field(default_factory=list)
    end: str = ""
    goodbye: bool = False
    usage: dict[str, Usage] = dataclasses.field(default_factory=dict)

    @property
    def turns(self) -> int:
        """Replies of the policy."""
        return sum(message["role"] == "assistant" for message in self.messages)

    @property
    def violation(self) -> bool:
        """Whether the policy broke the think format."""
        return self.end == END_REASONS[FORMAT]

    @property
    def aloud(self) -> list[str]:
        """The messages in turns, the user first, without thoughts."""
        return [message["content"] or "" for message in self.messages]

    def fail(self, error: Unreadable | ContextFull) -> None:
        """Ends the dialogue for a reason of one agent's own."""
        self.end = UNREADABLE if isinstance(error, Unreadable) else END_REASONS[CONTEXT]


class Policy(Protocol):
    """Replies in dialogues of one batch."""

    async def speak(self, rows: Sequence[Row]) -> None:
        """Adds a reply to each of the rows, or ends it."""


class User(Protocol):
    """The simulated users of one batch."""

    async def begin(self, rows: Sequence[Row]) -> None:
        """Adds the first words to each row, or ends it."""

    async def react(self, rows: Sequence[Row], *, may_reply: bool) -> None:
        """Adds a reaction to each row, or ends it; sets `goodbye`."""


async def play(rows: Sequence[Row], policy: Policy, user: User, *, rules: EmotionRules, max_turns: int) -> None:
    """Plays the rows to their ends, all at the same turn.

    Raises:
        EndpointError: an endpoint gave up or refused; what has been answered is in its cache.
    """
    await user.begin(rows)
    for turn in range(max_turns):
        alive = [row for row in rows if not row.end]
        if not alive:
            return
        await policy.speak(alive)
        listening = heard_from(alive, turn)
        last = turn + 1 == max_turns
        if listening:
            await user.react(listening, may_reply=not last)
        for row in listening:
            conclude(row, rules, last=last)


def heard_from(rows: Sequence[Row], turn: int) -> list[Row]:
    """Of rows whose policy was asked to speak in turn `turn`, from 0: those whose user reacts; others have ended."""
    spoke = [row for row in rows if row.turns > turn]
    for row in spoke:
        row.emotions.append(row.emotions[-1])
        if row.messages[-1]["violation"]:
            row.end = END_REASONS[FORMAT]
    return [row for row in spoke if not row.end]


def conclude(row: Row, rules: EmotionRules, *, last: bool) -> None:
    """Takes over the emotion of a reaction, and ends the dialogue where it must."""
    if row.messages[-1]["role"] == "assistant":  # no reaction came: the row has ended, its emotion stays
        return
    emotion = row.emotions[-1] = row.messages[-1]["emotion"]
    reason = end_reason(emotion, rules, goodbye=row.goodbye, last=last)
    if not row.end and reason != RUNNING:
        row.end = END_REASONS[reason]


def record_of(row: Row, *, reward: float, **settings: Any) -> Record:
    """A finished dialogue as it stands in a log.

    Args:
        settings: seed, mode, language, style, scenario and readout.
    """
    return {
        "dialogue": row.number,
        "profile": row.profile.id,
        **{name: settings[name] for name in ("seed", "mode", "language", "style", "scenario", "readout")},
        "initial_emotion": row.emotions[0],
        "hidden_intention": row.profile.hidden_intention,
        "end_reason": row.end,
        "turns": row.turns,
        "violation": row.violation,
        "reward": reward,
        "emotion": row.emotions[-1],
        "emotions": row.emotions,
        "messages": row.messages,
        "remote": {name: used.to_json() for name, used in row.usage.items()},
    }
