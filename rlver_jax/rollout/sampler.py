"""The batched on-device sampler: policy and simulated user play whole batches of dialogues in token space.

One jitted function plays everything: profiles are prefilled once each, a `lax.while_loop` runs over turns, and both
models' contexts stay on the device. With fewer rows than dialogues, a row whose dialogue has ended takes the next one
before the next turn: its profile's keys and values are copied from where they were prefilled. Rows without a dialogue
prefill and decode nothing; the loop leaves when all dialogues have ended.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from rlver_jax.decoding.cache import (
    LM,
    Cache,
    append,
    concat_ragged,
    init_cache,
    read_one,
    repeat_rows,
    restart_rows,
    rollback,
    share_rows,
)
from rlver_jax.decoding.generate import Limits, generate
from rlver_jax.parallel import rules
from rlver_jax.parallel.batch import gather_rows, scatter_rows
from rlver_jax.rollout.end_reason import RUNNING, end_reason
from rlver_jax.rollout.policy_turn import PolicyTables, PolicyTurn, policy_turn
from rlver_jax.rollout.slots import Queue, Slots, open_queue, take_next
from rlver_jax.rollout.spec import RolloutConfig, RolloutLimits
from rlver_jax.text.padding import pad_rows, round_up
from rlver_jax.user.turn import UserTables, UserTurn, dialogue_key, user_turn


@flax.struct.dataclass
class Profiles:
    """Profiles of a batch in tokens; see `agents.Agents.encode`. B = P x group; neighbours share a profile."""

    prefix: Int[Array, "P L"]  # the user's system prompt and the cue, up to its first assistant message
    prefix_count: Int[Array, "P"]
    first_talk: Int[Array, "P R"]
    first_count: Int[Array, "P"]  # 0: the user makes up its first utterance
    dialogue_ids: Int[Array, "B"]  # decide each dialogue's randomness, whatever batch it stands in
    active: Bool[Array, "B"]  # False: padding of the batch


@flax.struct.dataclass
class Dialogues:
    """Finished dialogues with all their tokens; per-turn arrays have T in front."""

    turns: Int[Array, "B"]  # replies of the policy, a violating one included
    end_reason: Int[Array, "B"]  # index into END_REASONS
    violation: Bool[Array, "B"]
    emotions: Int[Array, "B T+1"]  # the initial one first; the last one is repeated
    first_talk: Int[Array, "B R"]
    first_count: Int[Array, "B"]
    policy: PolicyTurn
    user: UserTurn
    appraised: Bool[Array, "T B"]
    prefix_tokens: Int[Array, ""]  # tokens read before the first turn, each profile and the system prompt once
    row_turns: Int[Array, ""]  # turns that there was room for: rows x turns of the loop; `turns` of them were played
    row_steps: Int[Array, ""]  # tokens that there was room for: rows x decode steps of both models


def _opening_keys(key: Key[Array, ""], prefix: Int[Array, "P L"], prefix_count: Int[Array, "P"]) -> Key[Array, "P"]:
    """Keys of made-up first utterances: each depends on its profile's prefix, not on who shares the batch."""
    position = jnp.arange(prefix.shape[1])
    weights = jnp.cumprod(jnp.full(position.shape, 0x01000193, jnp.uint32))
    terms = (prefix.astype(jnp.uint32) + 1) * weights
    fingerprint = jnp.where(position < prefix_count[:, None], terms, 0).sum(axis=1, dtype=jnp.uint32)
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, 1), fingerprint)


_jitted_opening_keys = jax.jit(_opening_keys)


def opening_key(key: Key[Array, ""], prefix: Sequence[int]) -> Key[Array, ""]:
    """That of the first utterance which a user makes up after `prefix`; `key` is the run's."""
    tokens, count = pad_rows([prefix], round_up(len(prefix), 512))  # few widths, each of which is compiled
    return _jitted_opening_keys(key, tokens, count)[0]


class Opening(NamedTuple):
    """What is prefilled before the first turn: each profile once, and the policy's system prompt once."""

    policy: Cache  # one row
    user: Cache  # P rows
    first: tuple[Int[Array, "P R"], Int[Array, "P"]]  # the first utterances
    tokens: Int[Array, ""]


@jax.named_scope("open_dialogues")
def read_openings(policy, user, tables, profiles: Profiles, key, spec: RolloutConfig, limits: RolloutLimits) -> Opening:
    """Prefills all profiles and makes up the first utterances that they lack."""
    policy_tables, user_tables = tables
    system = read_one(policy, policy_tables.system)
    count, width = profiles.prefix.shape
    wanted = profiles.active[:: spec.group]
    begun, speaks = user_tables.opening, wanted & (profiles.first_count == 0)
    prefix_cache = init_cache(user, count, width + begun.shape[0] + spec.user_tokens + 1)
    prefix_cache = append(user, prefix_cache, profiles.prefix, jnp.where(wanted, profiles.prefix_count, 0))
    prefix = prefix_cache.length
    if begun.shape[0]:
        prefix_cache = append(user, prefix_cache, *concat_ragged(count, (begun, begun.shape[0] * speaks)))
    keys = _opening_keys(key, profiles.prefix, profiles.prefix_count)
    prefix_cache, made = generate(
        user,
        prefix_cache,
        keys,
        user_tables.grammar,
        max_tokens=spec.user_tokens,
        limits=Limits(limits.user.reply_tokens, jnp.int32(0)),
        temperature=limits.user.reply_temperature,
        active=speaks,
    )
    known = profiles.first_count > 0
    size = max(profiles.first_talk.shape[1], spec.user_tokens)
    pad = lambda x: jnp.pad(x, ((0, 0), (0, size - x.shape[1])))  # noqa: E731
    first = jnp.where(known[:, None], pad(profiles.first_talk), pad(made.tokens))
    first_count = jnp.where(known, profiles.first_count, made.text_count)
    tokens = prefix.sum() + policy_tables.system.shape[0]
    return Opening(system, rollback(prefix_cache, prefix), (first, first_count), tokens)


def open_dialogues(policy, user, tables, profiles: Profiles, key, spec: RolloutConfig, limits: RolloutLimits):
    """Both caches with a row for every dialogue, the first utterances, and how many tokens were prefilled."""
    opening = read_openings(policy, user, tables, profiles, key, spec, limits)
    policy_cache = repeat_rows(opening.policy, profiles.active.shape[0], spec.context)
    user_cache = repeat_rows(opening.user, spec.group, spec.context)
    reply = jax.tree.map(lambda x: jnp.repeat(x, spec.group, axis=0), opening.first)
    return policy_cache, user_cache, reply, opening.tokens


def room_needed(tables: tuple[PolicyTables, UserTables], spec: RolloutConfig, limits: RolloutLimits, first_width: int):
    """Slots that one more turn may need beyond a row's length: (policy, user). Padding counts: it is written too."""
    policy, user = tables
    heard = max(first_width, spec.user_tokens)
    marks = policy.open_user.shape[0] + policy.open_assistant.shape[0] + 2 * policy.close.shape[0]
    policy_room = spec.say_tokens + marks + heard + policy.think_open.shape[0] + spec.policy_tokens
    scripts = (user.appraisal, user.reply)
    literals = sum(s.template.shape[0] * (s.template.shape[1] + 2 * s.values.shape[2]) for s in scripts)
    fields = sum(s.template.shape[0] for s in scripts) - 2
    lines = fields * limits.user.field_tokens + limits.user.reply_tokens
    user_room = heard + marks + spec.policy_tokens + literals + user.options.padded.shape[1] + lines + user.scratch
    return policy_room, user_room


class _State(NamedTuple):
    """R rows that play N dialogues."""

    slots: Slots
    policy: Cache
    user: Cache
    emotion: Int[Array, "R"]
    say: tuple[Int[Array, "R S"], Int[Array, "R"]]  # of the turn before
    reply: tuple[Int[Array, "R W"], Int[Array, "R"]]  # that the policy hears next
    log: "_Turn | None"  # of all dialogues: [N, T] in front of each array; None: not made yet
    cost: tuple[Array, Array]  # Dialogues' row_turns and row_steps


class _Turn(NamedTuple):
    """What one turn of every row adds to the log; rows stand in front of each array."""

    policy: PolicyTurn
    user: UserTurn
    appraised: Bool[Array, "R"]
    end_reason: Int[Array, "R"]  # RUNNING, unless the dialogue ends here


@dataclasses.dataclass(frozen=True)
class _Game:
    """What stays the same while a batch is played."""

    policy: LM
    user: LM
    tables: tuple[PolicyTables, UserTables]
    profiles: Profiles
    key: Key[Array, ""]
    limits: RolloutLimits
    spec: RolloutConfig
    queue: Queue
    opening: Opening

    def begin(self, slots: Slots) -> _State:
        """All rows with their first dialogues, no turn of which is over."""
        spec, rows, count = self.spec, slots.alive.shape[0], self.profiles.active.shape[0]
        words = lambda size: (jnp.zeros((rows, size), jnp.int32), jnp.zeros(rows, jnp.int32))  # noqa: E731
        policy = share_rows(self.policy, self.opening.policy, rows, spec.context)
        if rows < count:
            user, reply = init_cache(self.user, rows, spec.context), words(self.opening.first[0].shape[1])
        else:  # a row for each dialogue, in their order: those of a profile stay neighbours
            slots = slots._replace(dialogue=jnp.arange(rows, dtype=jnp.int32), alive=self.profiles.active)
            user = share_rows(self.user, self.opening.user, spec.group, spec.context)
            reply = jax.tree.map(lambda x: jnp.repeat(x, spec.group, axis=0), self.opening.first)
        emotion = jnp.broadcast_to(self.limits.initial_emotion, rows).astype(jnp.int32)
        state = _State(slots, policy, user, emotion, words(spec.say_tokens), reply, None, (jnp.int32(0), jnp.int32(0)))
        turn = jax.eval_shape(lambda state: self.turn(state)[1], state)
        log = jax.tree.map(lambda x: jnp.zeros((count, spec.max_turns, *x.shape[1:]), x.dtype), turn)
        state = state._replace(log=rules.constrain_rows(log))
        return self.refill(state) if rows < count else state

    def refill(self, state: _State) -> _State:
        """Rows that are free take the next dialogues: the user's prefix is copied, the policy's is there already."""
        slots, fresh = take_next(self.queue, state.slots)
        profile, system = slots.dialogue // self.spec.group, self.opening.policy.length
        first, count = self.opening.first
        reply = jnp.where(fresh[:, None], gather_rows(first, profile), state.reply[0])
        return state._replace(
            slots=slots,
            policy=rollback(state.policy, jnp.where(fresh, system, state.policy.length)),
            user=restart_rows(state.user, self.opening.user, profile, fresh),
            emotion=jnp.where(fresh, self.limits.initial_emotion, state.emotion),
            say=(state.say[0], jnp.where(fresh, 0, state.say[1])),
            reply=(reply, jnp.where(fresh, gather_rows(count, profile), state.reply[1])),
        )

    def play(self, state: _State) -> _State:
        """One turn of all rows, and its entry in the log."""
        slots, count = state.slots, self.profiles.active.shape[0]
        state, turn = self.turn(state)
        dialogue = jnp.where(slots.alive, slots.dialogue, count)  # a dead row writes nothing
        log = jax.tree.map(lambda x, new: scatter_rows(x, dialogue, slots.turn, new), state.log, turn)
        generated = (turn.policy.completion, turn.user.appraisal, turn.user.reply)
        steps = sum(x.count.max(axis=0).sum() for x in generated)  # each generation ends with its longest row
        rows = slots.alive.shape[0]
        state = state._replace(log=log, cost=(state.cost[0] + rows, state.cost[1] + rows * steps))
        return self.refill(state) if rows < count else state

    def turn(self, state: _State) -> tuple[_State, _Turn]:
        """One turn of every row that is alive."""
        spec, limits, slots = self.spec, self.limits, state.slots
        room = room_needed(self.tables, spec, limits, self.profiles.first_talk.shape[1])
        fits = (state.policy.length + room[0] <= spec.context) & (state.user.length + room[1] <= spec.context)
        active, last = slots.alive & fits, slots.turn + 1 >= limits.max_turns
        dialogues = gather_rows(self.profiles.dialogue_ids, slots.dialogue)
        keys = jax.vmap(lambda i, turn: jax.random.fold_in(dialogue_key(self.key, i), turn))(dialogues, slots.turn)
        policy, replied = policy_turn(
            self.policy, self.tables[0], state.policy, state.say, state.reply, keys, spec=spec, limits=limits,
            active=active, first=slots.turn == 0,
        )  # fmt: skip
        listening = active & ~replied.violation
        say = replied.say, replied.say_count
        user, reaction = user_turn(
            self.user, self.tables[1], state.user, state.reply, say, state.emotion, keys, rules=spec.rules,
            readout=spec.readout, limits=limits.user, max_tokens=spec.user_tokens, active=listening, may_reply=~last,
        )  # fmt: skip
        reason = end_reason(
            reaction.emotion, spec.rules, goodbye=reaction.goodbye, last=last, violation=replied.violation, fits=fits
        )
        reason = jnp.where(slots.alive, reason, RUNNING)
        answer = jax.tree.map(lambda x: x[-1], reaction.reply)
        size = state.reply[0].shape[1]
        reply = jnp.pad(answer.tokens, ((0, 0), (0, size - answer.tokens.shape[1]))), answer.text_count
        slots = slots._replace(turn=slots.turn + 1, alive=active & (reason == RUNNING))
        state = state._replace(slots=slots, policy=policy, user=user, emotion=reaction.emotion, say=say, reply=reply)
        return state, _Turn(replied, _fields_moved(reaction, 0, 1), listening, reason)


def _fields_moved(user: UserTurn, of: int, to: int) -> UserTurn:
    """The axis of the scripts' fields moved from position `of` to position `to`."""
    move = lambda lines: jax.tree.map(lambda x: jnp.moveaxis(x, of, to), lines)  # noqa: E731
    return dataclasses.replace(user, appraisal=move(user.appraisal), reply=move(user.reply))


@functools.partial(jax.jit, static_argnames="spec")
def sample_dialogues(
    policy: LM,
    user: LM,
    tables: tuple[PolicyTables, UserTables],
    profiles: Profiles,
    key: Key[Array, ""],
    limits: RolloutLimits,
    *,
    spec: RolloutConfig,
) -> Dialogues:
    """Plays a batch of dialogues to the end: one XLA program, no host in between.

    Args:
        policy, user: any two models with one tokenizer (checked by `agents.check_tokenizers`).
        tables: constants of the two sides.
        profiles: P profiles for B = P x spec.group dialogues.
        key: of the run; each dialogue folds its own id into it, so its course doesn't depend on its batch.
        limits: lengths and temperatures, at most what `spec` is compiled for.
    """
    profiles = rules.constrain_rows(profiles)
    count = profiles.active.shape[0]
    queue, slots = open_queue(profiles.active, spec.rows_of(count))
    opening = read_openings(policy, user, tables, profiles, key, spec, limits)
    game = _Game(policy, user, tables, profiles, key, limits, spec, queue, opening)
    state = jax.lax.while_loop(lambda state: state.slots.alive.any(), game.play, game.begin(slots))
    return _finished(state, game)


def _finished(state: _State, game: _Game) -> Dialogues:
    """The log in the order of its readers: turns in front, then fields, then dialogues."""
    log = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), state.log)
    turns = (log.appraised | log.policy.violation).sum(0, dtype=jnp.int32)
    known = jnp.pad(log.user.emotion, ((1, 0), (0, 0)), constant_values=game.limits.initial_emotion)
    emotions = jnp.take_along_axis(known, jnp.minimum(jnp.arange(known.shape[0])[:, None], turns), axis=0)
    first, first_count = jax.tree.map(lambda x: jnp.repeat(x, game.spec.group, axis=0), game.opening.first)
    row_turns, row_steps = state.cost
    return Dialogues(
        turns=turns,
        end_reason=log.end_reason.max(axis=0),
        violation=log.policy.violation.any(axis=0),
        emotions=emotions.T,
        first_talk=first,
        first_count=first_count,
        policy=log.policy,
        user=_fields_moved(dataclasses.replace(log.user, emotion=emotions[1:]), 2, 1),
        appraised=log.appraised,
        prefix_tokens=game.opening.tokens.astype(jnp.int32),
        row_turns=row_turns,
        row_steps=row_steps,
    )
