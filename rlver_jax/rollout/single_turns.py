"""The sampler's turn functions, jitted one by one: for dialogues that the host drives, turn by turn.

Evaluations with a side behind an endpoint, a person in the terminal and judges of finished dialogues call these. Caches
are donated: each call takes one and returns the next.
"""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from rlver_jax.decoding.cache import LM, Cache, append, init_cache, read_one, repeat_rows, rollback
from rlver_jax.decoding.generate import Generated
from rlver_jax.parallel.distributed import fetch
from rlver_jax.rollout.policy_turn import PolicyTables, PolicyTurn, policy_turn
from rlver_jax.rollout.sampler import Profiles, open_dialogues
from rlver_jax.rollout.spec import RolloutConfig, RolloutLimits
from rlver_jax.user.emotion import EmotionRules
from rlver_jax.user.turn import UserLimits, UserTables, UserTurn, Words, appraise, user_turn


class SingleTurn(NamedTuple):
    """One turn of a batch on the host, T = 1 in front, as the writer of a record reads it."""

    policy: PolicyTurn | None = None
    user: UserTurn | None = None


def fetch_turn(policy: PolicyTurn | None = None, user: UserTurn | None = None) -> Any:
    """What a turn produced, on the host: a `SingleTurn`."""
    return SingleTurn(*(jax.tree.map(lambda x: np.asarray(x)[None], fetch(one)) for one in (policy, user)))


@functools.partial(jax.jit, static_argnames=("batch", "context"))
def open_policy(lm: LM, system: Int[Array, "_"], *, batch: int, context: int) -> Cache:
    """The policy's cache before the first turn: `batch` rows that have read the system prompt."""
    return repeat_rows(read_one(lm, system), batch, context)


@functools.partial(jax.jit, static_argnames="spec")
def open_users(
    lm: LM, tables: Any, profiles: Profiles, key: Key[Array, ""], limits: RolloutLimits, *, spec: RolloutConfig
) -> tuple[Cache, Words]:
    """The users' half of `open_dialogues`: their cache, and the first words. XLA drops the policy's half."""
    _, cache, first, _ = open_dialogues(lm, lm, tables, profiles, key, spec, limits)
    return cache, first


@functools.partial(jax.jit, static_argnames="capacity")
def open_cache(lm: LM, tokens: Int[Array, "B L"], count: Int[Array, "B"], *, capacity: int) -> Cache:
    """A cache of `capacity` slots a row that has read the first count[b] tokens of each row."""
    return append(lm, init_cache(lm, tokens.shape[0], capacity), tokens, count)


@functools.partial(jax.jit, static_argnames="spec", donate_argnames="cache")
def single_policy_turn(
    lm: LM, tables: PolicyTables, cache: Cache, last_say: Words, heard: Words, keys: Key[Array, "B"],
    limits: RolloutLimits, active: Bool[Array, "B"], first: Bool[Array, "*B"], *, spec: RolloutConfig,
) -> tuple[Cache, PolicyTurn]:  # fmt: skip
    """See `policy_turn`."""
    return policy_turn(lm, tables, cache, last_say, heard, keys, spec=spec, limits=limits, active=active, first=first)


@functools.partial(jax.jit, static_argnames="spec", donate_argnames="cache")
def single_user_turn(
    lm: LM, tables: UserTables, cache: Cache, last_reply: Words, say: Words, emotion: Int[Array, "B"],
    keys: Key[Array, "B"], limits: RolloutLimits, active: Bool[Array, "B"], may_reply: Bool[Array, ""], *,
    spec: RolloutConfig,
) -> tuple[Cache, UserTurn]:  # fmt: skip
    """See `user_turn`."""
    return user_turn(
        lm, tables, cache, last_reply, say, emotion, keys, rules=spec.rules, readout=spec.readout,
        limits=limits.user, max_tokens=spec.user_tokens, active=active, may_reply=may_reply,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("rules", "max_tokens"), donate_argnames="cache")
def single_appraisal(
    lm: LM, tables: UserTables, cache: Cache, tokens: Int[Array, "B S"], count: Int[Array, "B"],
    emotion: Int[Array, "B"], keys: Key[Array, "B"], limits: UserLimits, active: Bool[Array, "B"], *,
    rules: EmotionRules, max_tokens: int,
) -> tuple[Cache, Generated, Float[Array, "B 21"]]:  # fmt: skip
    """Reads a turn up to the appraisal, appraises it, and takes the appraisal back out of the cache; see `appraise`."""
    cache = append(lm, cache, tokens, count)
    opening = cache.length
    cache, fields, logprobs, _ = appraise(lm, tables, cache, emotion, keys, rules, limits, max_tokens, active)
    return rollback(cache, opening), fields, logprobs
