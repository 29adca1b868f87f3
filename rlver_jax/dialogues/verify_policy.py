"""Compares the policy's replies in a log with the policy itself: every token, and both of its log-probs.

Each token must be the one that the dialogue's key draws from the policy's distribution in its context. So no edited
reply, no best of many, and no reply of another model can pass.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rlver_jax.decoding.cache import LM
from rlver_jax.decoding.replay import Keys, ReplayInput, Sampler, replay
from rlver_jax.decoding.replay_sequence import Completion, Query
from rlver_jax.dialogues.verify_texts import split_reply
from rlver_jax.dialogues.verify_tokens import LoggedLogprobs, Speaker, TokenReport, Tolerance, check_tokens
from rlver_jax.rollout.policy_replay_sequence import PolicyPacker, Reply
from rlver_jax.rollout.policy_turn import PolicyTables
from rlver_jax.rollout.spec import RolloutConfig
from rlver_jax.text.tokenizer import Tokenizer
from rlver_jax.user.turn import dialogue_key


class Policy(NamedTuple):
    """A policy on the device, and how it is sampled."""

    lm: LM
    tokenizer: Tokenizer
    tables: PolicyTables
    spec: RolloutConfig
    tolerance: Tolerance


class LoggedReplies(NamedTuple):
    """A dialogue of a log that has the schema of records, with the policy's tokens."""

    record: Mapping[str, Any]
    temperature: float  # of the policy


def verify_replies(policy: Policy, dialogues: Sequence[LoggedReplies]) -> Iterator[TokenReport]:
    """Replays all replies of dialogues: one result each, in their order."""
    packer = PolicyPacker(policy.tables, think_tokens=policy.spec.think_tokens)
    seed_key = functools.cache(jax.random.key)
    sequences = []
    for record, temperature in dialogues:
        key = dialogue_key(seed_key(record["seed"]), np.uint32(record["dialogue"]))
        keys = Keys(key, key)  # the policy says nothing before the first turn
        sequences.append(ReplayInput(packer.dialogue(list(_replies(policy, record))), keys, temperature))
    sampler = Sampler(policy.lm, policy.tables.grammar, truncation=policy.spec.truncation)
    inputs = [dialogue for dialogue in sequences if dialogue.sequence.queries]
    results = replay(sampler, inputs, policy.tolerance.tie) if inputs else iter(())
    for (record, temperature), dialogue in zip(dialogues, sequences, strict=True):
        if dialogue.sequence.queries:
            speaker = Speaker("policy", ["reply of the policy"], temperature, policy.tolerance)
            yield check_tokens(speaker, dialogue.sequence, next(results), functools.partial(_claim, record))
        else:  # it ended before the policy could say anything
            yield TokenReport()


def _claim(record: Mapping[str, Any], query: Query) -> LoggedLogprobs:
    message = record["messages"][1 + 2 * query.turn]
    return LoggedLogprobs(message["raw_logprobs"][query.step], message["logprobs"][query.step])


def _replies(policy: Policy, record: Mapping[str, Any]) -> Iterator[Reply]:
    """The user's message and the policy's reply of each turn."""
    messages, think = record["messages"], policy.spec.mode == "think"
    for user, message in zip(messages[::2], messages[1::2], strict=False):
        tokens, stopped = message["tokens"], message["stopped"]
        say = split_reply(policy.tokenizer, tokens, stopped=stopped, think=think).say
        # A user behind an endpoint gives text alone; the policy reads the tokens of that (see `device_agents`).
        heard = policy.tokenizer.encode(user["content"] or "") if user["tokens"] is None else user["tokens"]
        yield Reply(heard, Completion(tokens, stopped), say)
