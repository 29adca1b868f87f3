"""Holds what a log says of the policy's replies against the policy itself: every token, and both of its log-probs.

Each token must be the one that the dialogue's key draws from the distribution after what the policy had read, so that
no other reply, no better one of many, and no other model's can stand in its place.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rlver_jax.decoding.cache import LM
from rlver_jax.decoding.replay import Dialogue, Keys, Side, replay
from rlver_jax.decoding.replay_sequence import Completion, Query
from rlver_jax.dialogues.verify_texts import split_reply
from rlver_jax.dialogues.verify_tokens import Allowed, Claim, Found, Speaker, hold
from rlver_jax.rollout.policy_replay_sequence import PolicyPacker, Reply
from rlver_jax.rollout.policy_turn import PolicyTables
from rlver_jax.rollout.spec import RolloutConfig
from rlver_jax.text.tokenizer import Tokenizer
from rlver_jax.user.turn import dialogue_key


class Policy(NamedTuple):
    """A policy on the device, and how it speaks."""

    lm: LM
    tokenizer: Tokenizer
    tables: PolicyTables
    spec: RolloutConfig
    allowed: Allowed


class Spoken(NamedTuple):
    """A dialogue of a log: of the right shape, and with the policy's tokens."""

    record: Mapping[str, Any]
    temperature: float  # of the policy


def policy_findings(policy: Policy, dialogues: Sequence[Spoken]) -> Iterator[Found]:
    """Derives all replies of dialogues again; one result each, in their order."""
    think = policy.spec.mode == "think"
    packer = PolicyPacker(policy.tables, think=think, think_tokens=policy.spec.think_tokens)
    seed_key = functools.cache(jax.random.key)
    packed = []
    for record, temperature in dialogues:
        key = dialogue_key(seed_key(record["seed"]), np.uint32(record["dialogue"]))
        keys = Keys(key, key)  # the policy says nothing before the first turn
        packed.append(Dialogue(packer.dialogue(list(_replies(policy, record))), keys, temperature))
    side = Side(policy.lm, policy.tables.grammar, truncation=policy.spec.truncation)
    asked = [dialogue for dialogue in packed if dialogue.packed.queries]
    derived = replay(side, asked, policy.allowed.tie) if asked else iter(())
    for (record, temperature), dialogue in zip(dialogues, packed, strict=True):
        if dialogue.packed.queries:
            speaker = Speaker("policy", ["reply of the policy"], temperature, policy.allowed)
            yield hold(speaker, dialogue.packed, next(derived), functools.partial(_claim, record))
        else:  # it ended before the policy could say anything
            yield Found()


def _claim(record: Mapping[str, Any], query: Query) -> Claim:
    message = record["messages"][1 + 2 * query.turn]
    return Claim(message["raw_logprobs"][query.step], message["logprobs"][query.step])


def _replies(policy: Policy, record: Mapping[str, Any]) -> Iterator[Reply]:
    """What the policy heard and said, turn by turn."""
    messages, think = record["messages"], policy.spec.mode == "think"
    for user, message in zip(messages[::2], messages[1::2], strict=False):
        tokens, stopped = message["tokens"], message["stopped"]
        say = split_reply(policy.tokenizer, tokens, stopped=stopped, think=think).say
        # A user behind an endpoint gives text alone; the policy reads the tokens of that (`sides.device.DevicePolicy`).
        heard = policy.tokenizer.encode(user["content"] or "") if user["tokens"] is None else user["tokens"]
        yield Reply(heard, Completion(tokens, stopped), say)
