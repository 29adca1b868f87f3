"""Where a logged dialogue ended, and why, derived from its turns: it stops at no other place, for no other reason."""

import dataclasses
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rlver_jax.dialogues.log import UNREADABLE
from rlver_jax.dialogues.trajectory import Message
from rlver_jax.dialogues.verify_shape import POLICY, USER
from rlver_jax.rollout.agents import Agents
from rlver_jax.rollout.end_reason import CONTEXT, END_REASONS, FORMAT, GOODBYE, RUNNING, end_reason
from rlver_jax.rollout.profile_tokens import WIDTH_STEP
from rlver_jax.rollout.sampler import room_needed
from rlver_jax.rollout.spec import RolloutLimits
from rlver_jax.text.automaton import GOODBYES
from rlver_jax.text.padding import round_up
from rlver_jax.user.turn import UserLimits

_OF_ENDPOINT = frozenset({UNREADABLE, END_REASONS[CONTEXT]})  # reasons that only an endpoint knows
Possible = Collection[bool]  # of what can't be told from one dialogue: both


class Goodbye:
    """Finds leave-takings in a user's replies: on the device in its tokens, else in its text."""

    def __init__(self, agents: Agents, endpoints: Collection[str]):
        self._remote = USER in endpoints
        if not self._remote:
            tables = agents.tables[1]
            self._table, self._found = np.asarray(tables.goodbye), tables.goodbye_found

    def __call__(self, message: Message) -> bool:
        """Whether a reaction takes leave."""
        if self._remote:
            text = (message["content"] or "").encode("utf-8", "surrogatepass")
            return any(word in text for word in GOODBYES)
        state, end = 0, len(message["all_tokens"]) - message["stopped"]
        for token in message["all_tokens"][:end]:
            state = int(self._table[state, token])
        return state >= self._found


@dataclasses.dataclass(frozen=True)
class Rooms:
    """Whether a turn has room in both contexts, by the lengths that `dialogue.sample_dialogues` sees.

    Where one side is behind an endpoint, widths depend on who shares a batch: between a dialogue's own and `widest`.

    Attributes:
        opening: columns of the batch's first utterances.
        user_limits: tokens of a field, and of the reply.
        widest: the longest text that the side on the device can have read at once, in tokens.
    """

    agents: Agents
    opening: int
    user_limits: tuple[int, int]
    endpoints: Collection[str] = ()
    widest: int = 0

    def of(self, record: Mapping[str, Any], prefix: int) -> "Course":
        """The course of one dialogue's lengths; `prefix`: tokens that the user had read before."""
        return Course(self, [m for m in record["messages"] if m["role"] == "user"], record["messages"][1::2], prefix)

    def needed(self, width: int) -> tuple[int, int]:
        """Slots of a turn: (policy, user)."""
        limits = RolloutLimits(0, 0, 0, 0.0, 0, UserLimits(*self.user_limits, 0.0))  # type: ignore[arg-type]
        policy, user = room_needed(self.agents.tables, self.agents.spec, limits, width)
        return int(policy), int(user)


@dataclasses.dataclass(frozen=True)
class Course:
    """Lengths of one dialogue's contexts."""

    rooms: Rooms
    heard: Sequence[Message]  # the user's messages, the opening first
    spoken: Sequence[Message]
    prefix: int

    def fits(self, turn: int) -> Possible:
        """Whether turn `turn`, from 0, has room where it begins."""
        rooms = self.rooms
        if not rooms.endpoints:
            policy, user = rooms.needed(rooms.opening)
            context = rooms.agents.spec.context
            return {self._policy_length(turn) + policy <= context and self._user_length(turn) + user <= context}
        if POLICY in rooms.endpoints:  # a user on the device is asked after the policy has spoken
            return {True}
        own = max(rooms.agents.spec.user_tokens, round_up(len(self._heard(turn)), WIDTH_STEP))
        needed = (rooms.needed(width)[0] for width in (own, max(own, round_up(rooms.widest, WIDTH_STEP))))
        return {self._policy_length(turn) + room <= rooms.agents.spec.context for room in needed}

    def hears(self, turn: int) -> Possible:
        """Whether a user on the device has room for what a policy behind an endpoint said in turn `turn`."""
        rooms, spec = self.rooms, self.rooms.agents.spec
        own = max(spec.say_tokens, round_up(len(self.spoken[turn]["say_tokens"]), WIDTH_STEP))
        say = (own, max(own, round_up(rooms.widest, WIDTH_STEP)))
        reply = (rooms.opening, max(rooms.opening, round_up(spec.user_tokens, WIDTH_STEP)))
        needed = (
            rooms.needed(width)[1] + max(wide - spec.policy_tokens, 0) for wide, width in zip(say, reply, strict=True)
        )
        return {self._user_length(turn) + room <= spec.context for room in needed}

    def _heard(self, turn: int) -> Sequence[int]:
        """Tokens of what the policy hears in a turn."""
        message = self.heard[turn]
        if USER in self.rooms.endpoints:
            return self.rooms.agents.tokenizer.encode(message["content"] or "")
        return message["tokens"]

    def _policy_length(self, turn: int) -> int:
        """What the policy has in its context before a turn: in think mode its last say is read with the next words."""
        tables, think = self.rooms.agents.tables[0], self.rooms.agents.spec.mode == "think"
        system, close = tables.system.shape[0], tables.close.shape[0]
        around = tables.open_user.shape[0] + close + tables.open_assistant.shape[0]
        heard = sum(len(self._heard(i)) + around for i in range(turn)) + close * max(turn - 1, 0)
        says = [len(message["say_tokens"]) for message in self.spoken[: turn - think if turn else 0]]
        return system + heard + sum(says)

    def _user_length(self, turn: int) -> int:
        """What the user has in its context before a turn; its last reply is read with the next say."""
        tables = self.rooms.agents.tables[1]
        around = 2 * tables.close.shape[0] + tables.open_user.shape[0] + tables.open_assistant.shape[0]
        pairs = itertools.islice(zip(self.heard, self.spoken, strict=False), turn)
        return self.prefix + sum(len(heard["tokens"]) + len(say["say_tokens"]) + around for heard, say in pairs)


@dataclasses.dataclass(frozen=True)
class Ends:
    """Derives ends.

    Attributes:
        max_turns: of the config for dialogues of this kind.
        limit: its field with its value, for messages.
    """

    agents: Agents
    max_turns: int
    limit: str
    goodbye: Goodbye
    endpoints: Collection[str] = ()

    def faults(self, record: Mapping[str, Any], violations: Sequence[bool], course: Course) -> Iterator[str]:
        """Where the dialogue goes on after its end, stops before one, or names another reason.

        Args:
            violations: of each reply, derived where the policy is on the device.
        """
        first, *messages = record["messages"]
        turns = list(itertools.zip_longest(messages[::2], messages[1::2]))
        reasons, words, number = self._opened(first), "nothing was said", 0
        if reasons is not None and turns:
            yield "goes on, though the user's first words never came"
        for number, (_, reaction) in enumerate(turns, 1):
            if True not in course.fits(number - 1):
                yield f"turn {number} is played, but it had no room in rollout.context"
            reasons, words = self._after(number, reaction, violations[number - 1], course)
            if reaction is not None and not self._may_reply(number, reaction) and reaction["content"] is not None:
                yield f"turn {number}: the user replies, though the dialogue is over"
            if reasons is not None:
                break
        if reasons is None:
            reasons = self._next(number, course)
        if number < len(turns):
            yield f"goes on for {len(turns) - number} turns after its end in turn {number}: {words}"
        if not reasons:
            yield f"stops after turn {number}, though nothing ends it there: {words} (end_reason {_given(record)})"
        elif record["end_reason"] not in reasons:
            yield f"end_reason is {_given(record)}, but it ended for {' or '.join(sorted(reasons))}: {words}"

    def _opened(self, first: Message) -> Collection[str] | None:
        """Why it may have ended before the first turn; None: it goes on."""
        return _OF_ENDPOINT if USER in self.endpoints and first["generated"] and not first["content"] else None

    def _may_reply(self, number: int, reaction: Message) -> bool:
        return number < self.max_turns and not self.agents.spec.rules.ended(reaction["emotion"])

    def _after(self, number: int, reaction: Message | None, violation: bool, course: Course):
        """(reasons for which it ended with a turn, in words); None: it goes on; no reason: it shouldn't end so."""
        if violation:
            return {END_REASONS[FORMAT]}, "the policy broke the format"
        if reaction is None:
            return self._unappraised(number, course), "the user doesn't react to the last reply"
        emotion, last = reaction["emotion"], number >= self.max_turns
        goodbye = not last and reaction["content"] is not None and bool(self.goodbye(reaction))
        reason = end_reason(emotion, self.agents.spec.rules, goodbye=goodbye, last=last)
        words = f"emotion {emotion} after {number} turns, {self.limit}"
        if reason != RUNNING:
            return {END_REASONS[reason]}, words + ", with a goodbye" * (reason == GOODBYE)
        if reaction["content"] is None:
            return {UNREADABLE} if USER in self.endpoints else set(), f"{words}, and no reply"
        return None, words

    def _unappraised(self, number: int, course: Course) -> Collection[str]:
        """Why a user may not have reacted."""
        if USER in self.endpoints:
            return _OF_ENDPOINT
        return {END_REASONS[CONTEXT]} if POLICY in self.endpoints and False in course.hears(number - 1) else set()

    def _next(self, number: int, course: Course) -> Collection[str]:
        """Why there may be no turn after `number` of them, where nothing that was said ended the dialogue."""
        if POLICY in self.endpoints:
            return _OF_ENDPOINT
        return {END_REASONS[CONTEXT]} if False in course.fits(number) else set()


def _given(record: Mapping[str, Any]) -> str:
    return repr(record["end_reason"])
