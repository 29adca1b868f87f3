"""Consistency errors of a log: arithmetic, ends, texts that are not their decoded tokens. No model is needed."""

import dataclasses
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rlver_jax.decoding.replay_sequence import Completion
from rlver_jax.dialogues import verify_texts
from rlver_jax.dialogues.log import known_fields
from rlver_jax.dialogues.trajectory import emotion_faults, emotions_of, reactions
from rlver_jax.dialogues.verify_ends import ContextLimits, EndCheck, GoodbyeMatcher
from rlver_jax.dialogues.verify_set import Plan, TrainingPlan
from rlver_jax.dialogues.verify_settings import remote_faults
from rlver_jax.dialogues.verify_shape import POLICY, USER
from rlver_jax.profiles.schema import Profile
from rlver_jax.rollout import rewards
from rlver_jax.rollout.agents import Agents
from rlver_jax.user.replay_sequence import LoggedTurn

POLICY_TOKENS = "the policy's words and log-probs (--policy=…)"  # what isn't checked without it


def logged_turns(record: Mapping[str, Any]) -> list[LoggedTurn]:
    """The log's turns as the packer of a replay takes them."""
    turns, emotion = [], record["messages"][0]["emotion"]
    for turn, reply_message, user in reactions(record):
        appraisal = [
            Completion(user["appraisal_tokens"][n], user["appraisal_stopped"][n]) for n in user["appraisal_tokens"]
        ]
        reply = [
            Completion(user["consideration_tokens"][n], user["consideration_stopped"][n])
            for n in user["consideration_tokens"]
        ]
        if user["content"] is None:
            reply = []
        else:
            reply.append(Completion(user["all_tokens"], user["stopped"]))
        turns.append(
            LoggedTurn(turn, emotion, user["emotion"], reply_message["say_tokens"], appraisal, user["change"], reply)
        )
        emotion = user["emotion"]
    return turns


class Reward(NamedTuple):
    """A dialogue's reward by its formula, and the rounding error that the order of float32 sums may cause."""

    value: float
    rounding: float


def recomputed_rewards(records: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> list[Reward]:
    """Every dialogue's reward; `settings` are `rewards.reward`'s.

    XLA sums over turns in an order that depends on the batch size, and fuses products with sums. So a log of many
    dialogues does not give exactly the numbers of the batches that were played.
    """
    emotions = [emotions_of(record) for record in records]
    longest = max(max(map(len, emotions)), *(record["turns"] + 1 for record in records))
    padded = np.array([row + row[-1:] * (longest - len(row)) for row in emotions], np.int32)
    turns, violation = (np.array([record[name] for record in records]) for name in ("turns", "violation"))
    kind = rewards.REWARDS.get(settings.get("name", ""))
    rewarded = _rewarded(kind, tuple(settings.items()), emotions=padded, n_turns=turns, violation=violation)
    by_turn = np.abs(np.asarray(rewarded.turns, np.float64))
    rounding = np.finfo(np.float32).eps * (1 + (by_turn > 0).sum(1) * by_turn.sum(1))  # no part of a turn's is above 1
    return list(map(Reward, np.asarray(rewarded.reward).tolist(), rounding.tolist()))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _rewarded(kind: Any, settings: tuple[tuple[str, Any], ...], **dialogues: Any) -> rewards.Rewards:
    """One program for equal settings; `kind` makes it another one where a name in the registry gets a new meaning."""
    return rewards.reward(**dict(settings), **dialogues)


@dataclasses.dataclass(frozen=True)
class ConsistencyCheck:
    """Checks of a log against the config alone.

    Attributes:
        plan: of the log's dialogues.
        user_limits: tokens of a field, and of the reply.
        temperature: of the user's replies.
    """

    agents: Agents
    plan: Plan
    user_limits: tuple[int, int]
    temperature: float
    end_check: EndCheck
    limits: ContextLimits

    @classmethod
    def of(
        cls,
        agents: Agents,
        plan: Plan,
        user_limits: tuple[int, int],
        temperature: float,
        records: Sequence[Mapping[str, Any]],
    ) -> "ConsistencyCheck":
        """For these records of one log, none with a schema error."""
        remote = plan.endpoints
        training, limit = isinstance(plan, TrainingPlan), plan.fields["max_turns"]
        end_check = EndCheck(agents, plan.max_turns, limit, GoodbyeMatcher(agents, remote), remote, training)
        width = plan.opening_width(agents.tokenizer) if len(remote) < 2 else 0
        widest = _widest(agents, records, remote)
        limits = ContextLimits(agents, width, user_limits, remote, widest, training)
        return cls(agents, plan, user_limits, temperature, end_check, limits)

    def errors(self, profile: Profile, record: Mapping[str, Any], reward: Reward, prefix: int) -> Iterator[str]:
        """Consistency errors of one dialogue.

        Args:
            profile: that it was played with.
            reward: the recomputed one.
            prefix: tokens in the user's context before its first turn.
        """
        agents, plan, remote = self.agents, self.plan, self.plan.endpoints
        splits = [] if POLICY in remote else [self._split(message) for message in record["messages"][1::2]]
        violations = [split.violation for split in splits] or [m["violation"] for m in record["messages"][1::2]]
        yield from self._record_errors(profile, record, violations)
        if not (plan.other_on_device and USER in remote):
            first = record["messages"][0]
            yield from verify_texts.opening_faults(agents, profile, first, self.user_limits[1], remote)
        yield from emotion_faults(record, agents.spec.rules)
        yield from self.end_check.faults(record, violations, self.limits.of(record, prefix))
        yield from verify_texts.policy_faults(agents, record, splits, plan)
        if USER not in remote:
            yield from verify_texts.user_faults(agents, record, self.user_limits, self.temperature)
        elif not plan.other_on_device:
            yield from verify_texts.remote_user_faults(agents, record)
        if not abs(record["reward"] - reward.value) <= reward.rounding:
            yield f"reward {record['reward']}, but its formula gives {np.float32(reward.value)}"

    def _split(self, message: Mapping[str, Any]) -> verify_texts.SplitReply:
        think = self.agents.spec.mode == "think"
        return verify_texts.split_reply(
            self.agents.tokenizer, message["tokens"], stopped=message["stopped"], think=think
        )

    def _record_errors(self, profile: Profile, record: Mapping[str, Any], violations: Sequence[bool]) -> Iterator[str]:
        """The record's own fields, by the plan and the profile."""
        plan = self.plan
        if record["hidden_intention"] != profile.hidden_intention:
            yield f"hidden_intention is {record['hidden_intention']!r}, but the profile's is another"
        if record["seed"] != plan.seed:
            yield f"seed is {record['seed']}, but {plan.fields['seed']}; give the one that it was played with"
        begins = {record["initial_emotion"], record["emotions"][0], record["messages"][0]["emotion"]}
        if begins != {plan.initial_emotion}:
            yield f"initial_emotion is {record['initial_emotion']}, the emotion at the opening " + (
                f"{record['messages'][0]['emotion']}, but {plan.fields['initial_emotion']}"
            )
        if record["violation"] != any(violations):
            yield f"violation is {record['violation']}, but its replies say otherwise"
        if "source" in record:
            yield "source names another program, whose logs cannot be recomputed"
        yield from remote_faults(record, () if plan.other_on_device else plan.endpoints)


def _widest(agents: Agents, records: Sequence[Mapping[str, Any]], endpoints: Collection[str]) -> int:
    """Tokens of the longest text from the model behind an endpoint that the one on the device has read."""
    if len(endpoints) != 1:
        return 0
    start = 0 if USER in endpoints else 1  # of the user's messages, or of the policy's
    texts = (message["content"] or "" for record in records for message in record["messages"][start::2])
    return max((len(agents.tokenizer.encode(text)) for text in texts), default=0)


def unchecked(record: Mapping[str, Any], plan: Plan) -> Iterator[str]:
    """What of a dialogue is not checked, in words: texts of endpoints, and fields that other programs have added."""
    endpoints = plan.endpoints if not plan.other_on_device else ()
    if POLICY not in plan.endpoints:
        yield POLICY_TOKENS
    elif endpoints:
        yield "what the policy said at its endpoint"
    if USER in endpoints:
        yield "what the user said and felt at its endpoint"
    if endpoints:
        yield "counts of what endpoints were asked"
    for name in sorted(record.keys() - known_fields(None)):
        yield f"field {name[:60]!r}"
    for index, message in enumerate(record["messages"]):
        for name in sorted(message.keys() - known_fields(index)):
            yield f"field {name[:60]!r} of messages"
