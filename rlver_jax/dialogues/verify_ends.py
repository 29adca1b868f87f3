"""Recomputes from its turns where a logged dialogue ends and why, and compares that with the log."""

import dataclasses
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rlver_jax.dialogues.log import UNANSWERED, UNREADABLE
from rlver_jax.dialogues.trajectory import Message
from rlver_jax.dialogues.verify_shape import POLICY, USER
from rlver_jax.rollout.agents import Agents
from rlver_jax.rollout.end_reason import CONTEXT, END_REASONS, FORMAT, GOODBYE, RUNNING, end_reason
from rlver_jax.rollout.profile_tokens import WIDTH_STEP, widest_words
from rlver_jax.rollout.sampler import room_needed
from rlver_jax.rollout.spec import RolloutLimits
from rlver_jax.text.automaton import GOODBYES
from rlver_jax.text.padding import round_up
from rlver_jax.user.turn import UserLimits

_OF_ENDPOINT = frozenset({UNREADABLE, END_REASONS[CONTEXT]})  # reasons that a log of endpoints does not show
Possible = Collection[bool]  # both where one dialogue does not decide it


class GoodbyeMatcher:
    """Finds goodbyes in a user's replies: in the tokens of a user on the device, else in the text."""

    def __init__(self, agents: Agents, endpoints: Collection[str]):
        self._remote = USER in endpoints
        if not self._remote:
            tables = agents.tables[1]
            self._table, self._first_found = np.asarray(tables.goodbye), tables.goodbye_found

    def __call__(self, message: Message) -> bool:
        """Whether a reaction says goodbye."""
        if self._remote:
            text = (message["content"] or "").encode("utf-8", "surrogatepass")
            return any(word in text for word in GOODBYES)
        state, end = 0, len(message["all_tokens"]) - message["stopped"]
        for token in message["all_tokens"][:end]:
            state = int(self._table[state, token])
        return state >= self._first_found


@dataclasses.dataclass(frozen=True)
class ContextLimits:
    """Whether a turn fits in both contexts, by the lengths that `rollout.sampler` uses.

    Where one model is behind an endpoint, widths depend on the batch: between the dialogue's own and `widest`.

    Attributes:
        opening: columns of the batch's first utterances.
        user_limits: tokens of a field, and of the reply.
        widest: the longest text that the model on the device can have prefilled at once, in tokens.
        training: whether a turn's room depends on its own words alone, of which the policy hears no more than
            `widest_words`.
    """

    agents: Agents
    opening: int
    user_limits: tuple[int, int]
    endpoints: Collection[str] = ()
    widest: int = 0
    training: bool = False

    def of(self, record: Mapping[str, Any], prefix: int) -> "ContextLengths":
        """The lengths of one dialogue; `prefix`: tokens in the user's context before the opening."""
        return ContextLengths(
            self, [m for m in record["messages"] if m["role"] == "user"], record["messages"][1::2], prefix
        )

    def needed(self, width: int) -> tuple[int, int]:
        """Slots of a turn: (policy, user)."""
        limits = RolloutLimits(0, 0, 0, 0.0, 0, UserLimits(*self.user_limits, 0.0))  # type: ignore[arg-type]
        policy, user = room_needed(self.agents.tables, self.agents.spec, limits, width)
        return int(policy), int(user)


@dataclasses.dataclass(frozen=True)
class ContextLengths:
    """Lengths of one dialogue's contexts."""

    limits: ContextLimits
    user_messages: Sequence[Message]  # the opening first
    policy_messages: Sequence[Message]
    prefix: int

    def fits(self, turn: int) -> Possible:
        """Whether turn `turn`, from 0, has room where it begins."""
        limits = self.limits
        if not limits.endpoints:
            policy, user = limits.needed(limits.opening)
            context = limits.agents.spec.context
            return {self._policy_length(turn) + policy <= context and self._user_length(turn) + user <= context}
        if POLICY in limits.endpoints:  # a user on the device is checked after the policy's reply
            return {True}
        own = max(limits.agents.spec.user_tokens, round_up(len(self._user_tokens(turn)), WIDTH_STEP))
        if limits.training:
            return {self._alone_fits(turn, max(own, WIDTH_STEP))}
        needed = (limits.needed(width)[0] for width in (own, max(own, round_up(limits.widest, WIDTH_STEP))))
        return {self._policy_length(turn) + room <= limits.agents.spec.context for room in needed}

    def _alone_fits(self, turn: int, width: int) -> bool:
        """As `device_agents.TextPolicy` decides, whoever else is heard."""
        spec = self.limits.agents.spec
        heard = width <= max(widest_words(spec, self.limits.opening), spec.user_tokens)
        return heard and self._policy_length(turn) + self.limits.needed(width)[0] <= spec.context

    def user_fits(self, turn: int) -> Possible:
        """Whether the reply of a policy behind an endpoint in turn `turn` fits in the user's context on the device."""
        limits, spec = self.limits, self.limits.agents.spec
        own = max(spec.say_tokens, round_up(len(self.policy_messages[turn]["say_tokens"]), WIDTH_STEP))
        reply_widths = (own, max(own, round_up(limits.widest, WIDTH_STEP)))
        reply = (limits.opening, max(limits.opening, round_up(spec.user_tokens, WIDTH_STEP)))
        needed = (
            limits.needed(width)[1] + max(reply_width - spec.policy_tokens, 0)
            for reply_width, width in zip(reply_widths, reply, strict=True)
        )
        return {self._user_length(turn) + room <= spec.context for room in needed}

    def _user_tokens(self, turn: int) -> Sequence[int]:
        """Tokens of the user's message that the policy reads in a turn."""
        message = self.user_messages[turn]
        if USER in self.limits.endpoints:
            return self.limits.agents.tokenizer.encode(message["content"] or "")
        return message["tokens"]

    def _policy_length(self, turn: int) -> int:
        """Tokens in the policy's context before a turn; where replies are branches, the last is not prefilled yet."""
        tables = self.limits.agents.tables[0]
        system, close = tables.system.shape[0], tables.close.shape[0]
        around = tables.open_user.shape[0] + close + tables.open_assistant.shape[0]
        prefilled = sum(len(self._user_tokens(i)) + around for i in range(turn)) + close * max(turn - 1, 0)
        replies = [
            len(message["say_tokens"]) for message in self.policy_messages[: turn - tables.branched if turn else 0]
        ]
        return system + prefilled + sum(replies)

    def _user_length(self, turn: int) -> int:
        """Tokens in the user's context before a turn; its last reply is prefilled with the policy's next one."""
        tables = self.limits.agents.tables[1]
        around = 2 * tables.close.shape[0] + tables.open_user.shape[0] + tables.open_assistant.shape[0]
        pairs = itertools.islice(zip(self.user_messages, self.policy_messages, strict=False), turn)
        return self.prefix + sum(len(user["tokens"]) + len(policy["say_tokens"]) + around for user, policy in pairs)


@dataclasses.dataclass(frozen=True)
class EndCheck:
    """Compares the end of a dialogue with the rules.

    Attributes:
        max_turns: of the config for dialogues of this kind.
        limit: the config field with its value, for messages.
        training: whether a dialogue may have been left out, because its user stayed unanswered.
    """

    agents: Agents
    max_turns: int
    limit: str
    goodbye: GoodbyeMatcher
    endpoints: Collection[str] = ()
    training: bool = False

    @property
    def of_endpoint(self) -> Collection[str]:
        """Reasons that a log of endpoints does not show."""
        return _OF_ENDPOINT | {UNANSWERED} if self.training else _OF_ENDPOINT

    def faults(self, record: Mapping[str, Any], violations: Sequence[bool], lengths: ContextLengths) -> Iterator[str]:
        """Where the dialogue continues after its end, stops before one, or gives another reason.

        Args:
            violations: of each reply, recomputed where the policy is on the device.
        """
        first, *messages = record["messages"]
        turns = list(itertools.zip_longest(messages[::2], messages[1::2]))
        reasons, words, number = self._opened(first), "nothing was said", 0
        if reasons is not None and turns:
            yield "goes on, though the user's first words never came"
        for number, (_, reaction) in enumerate(turns, 1):
            if True not in lengths.fits(number - 1):
                yield f"turn {number} is played, but it had no room in rollout.context"
            reasons, words = self._after(number, reaction, violations[number - 1], lengths)
            if reaction is not None and not self._may_reply(number, reaction) and reaction["content"] is not None:
                yield f"turn {number}: the user replies, though the dialogue is over"
            if reasons is not None:
                break
        if reasons is None:
            reasons = self._next(number, lengths)
        logged = repr(record["end_reason"])
        if number < len(turns):
            yield f"goes on for {len(turns) - number} turns after its end in turn {number}: {words}"
        if not reasons:
            yield f"stops after turn {number}, though nothing ends it there: {words} (end_reason {logged})"
        elif record["end_reason"] not in reasons:
            yield f"end_reason is {logged}, but it ended for {' or '.join(sorted(reasons))}: {words}"

    def _opened(self, first: Message) -> Collection[str] | None:
        """Why it may have ended before the first turn; None: it continues."""
        return self.of_endpoint if USER in self.endpoints and first["generated"] and not first["content"] else None

    def _may_reply(self, number: int, reaction: Message) -> bool:
        return number < self.max_turns and not self.agents.spec.rules.ended(reaction["emotion"])

    def _after(self, number: int, reaction: Message | None, violation: bool, lengths: ContextLengths):
        """(reasons for which it ended with a turn, in words); None: it continues; no reason: it cannot end so."""
        if violation:
            return {END_REASONS[FORMAT]}, "the policy broke the format"
        if reaction is None:
            return self._unappraised(number, lengths), "the user doesn't react to the last reply"
        emotion, last = reaction["emotion"], number >= self.max_turns
        goodbye = not last and reaction["content"] is not None and bool(self.goodbye(reaction))
        reason = end_reason(emotion, self.agents.spec.rules, goodbye=goodbye, last=last)
        words = f"emotion {emotion} after {number} turns, {self.limit}"
        if reason != RUNNING:
            return {END_REASONS[reason]}, words + ", with a goodbye" * (reason == GOODBYE)
        if reaction["content"] is None:
            return {UNREADABLE} if USER in self.endpoints else set(), f"{words}, and no reply"
        return None, words

    def _unappraised(self, number: int, lengths: ContextLengths) -> Collection[str]:
        """Why a user may not have reacted."""
        if USER in self.endpoints:
            return self.of_endpoint
        return {END_REASONS[CONTEXT]} if POLICY in self.endpoints and False in lengths.user_fits(number - 1) else set()

    def _next(self, number: int, lengths: ContextLengths) -> Collection[str]:
        """Why there may be no turn after `number` of them, where no message ended the dialogue."""
        if POLICY in self.endpoints:
            return self.of_endpoint
        return {END_REASONS[CONTEXT]} if False in lengths.fits(number) else set()
