"""The batched on-device sampler: policy and simulated user play whole batches of dialogues in token space.

One jitted function plays everything: profiles are prefilled once each, a `lax.while_loop` runs over turns, and both
models' contexts stay on the device. Ended rows read and say nothing; the loop leaves when all have ended.
"""

import dataclasses
import functools
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from rlver_jax.parallel import rules
from rlver_jax.sampling.cache import LM, Cache, append, init_cache, join, repeat_rows, rollback
from rlver_jax.sampling.decode import KEEP_ALL, Generated, Limits, Truncation, generate
from rlver_jax.sampling.grammar import Grammar, free_text, thought_then_say, whitespace_tokens
from rlver_jax.text.chat import ChatTemplate
from rlver_jax.text.tokenizer import Tokenizer
from rlver_jax.user.emotion import TRAINING, EmotionRules
from rlver_jax.user.prompts import Prompts
from rlver_jax.user.simulated import KEY_POLICY, UserLimits, UserTables, UserTurn, dialogue_key, part_keys, user_turn

# Why a dialogue ended; a Dialogues' end_reason indexes it.
END_REASONS = ("running", "success", "failure", "goodbye", "turn_limit", "format", "context")
RUNNING, SUCCESS, FAILURE, GOODBYE, TURN_LIMIT, FORMAT, CONTEXT = range(7)
THINK_OPEN = "<think>\n"


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a sampler is compiled for. Lengths are maxima; `PlayLimits` may ask for less without compiling again."""

    mode: str  # think | direct
    enforce_format: bool  # think: keep the policy from ending a message before `</think>` and a visible say
    group: int  # dialogues of one profile
    max_turns: int
    context: int  # slots of each row, policy and user alike
    think_tokens: int
    say_tokens: int
    user_tokens: int  # of any field of the user's scripts, the reply included
    readout: str = "argmax"
    rules: EmotionRules = TRAINING
    truncation: Truncation = KEEP_ALL

    @property
    def policy_tokens(self) -> int:
        """Tokens of a policy's reply, its thought included."""
        return self.say_tokens + (self.think_tokens if self.mode == "think" else 0)


@flax.struct.dataclass
class PlayLimits:
    """What may change between calls without compiling again."""

    max_turns: Int[Array, ""]
    think_tokens: Int[Array, ""]
    say_tokens: Int[Array, ""]
    temperature: Float[Array, ""]  # of the policy; 0: greedy
    initial_emotion: Int[Array, ""]
    user: UserLimits


@flax.struct.dataclass
class PolicyTables:
    """All constants of the policy's side, on the device."""

    system: Int[Array, "_"]
    open_user: Int[Array, "_"]
    open_assistant: Int[Array, "_"]
    think_open: Int[Array, "_"]  # empty in direct mode
    close: Int[Array, "_"]
    grammar: Grammar
    whitespace: Bool[Array, "V"]


@flax.struct.dataclass
class Profiles:
    """Profiles of a batch in tokens; see `players.Players.encode`. B = P x group; neighbours share a profile."""

    prefix: Int[Array, "P L"]  # the user's system prompt and the cue, up to its first assistant message
    prefix_count: Int[Array, "P"]
    first_talk: Int[Array, "P R"]
    first_count: Int[Array, "P"]  # 0: the user makes up its first utterance
    dialogue_ids: Int[Array, "B"]  # decide each dialogue's randomness, whatever batch it stands in
    active: Bool[Array, "B"]  # False: padding of the batch


@flax.struct.dataclass
class PolicyTurn:
    """One reply of the policy."""

    said: Generated  # thought and say, as sampled
    say: Int[Array, "B S"]  # what the user hears: after `</think>` and the white space that follows, before the end
    say_count: Int[Array, "B"]
    violation: Bool[Array, "B"]  # think mode: no `</think>`, or nothing after it
    prefilled: Int[Array, "B"]  # tokens read, not generated


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


def build_policy_tables(tokenizer: Tokenizer, prompts: Prompts, rows: int, spec: Spec) -> PolicyTables:
    """Tables for a policy with `rows` embedding rows."""
    chat, think = ChatTemplate(tokenizer), spec.mode == "think"
    grammar = thought_then_say(tokenizer, rows, enforce=spec.enforce_format) if think else free_text(tokenizer, rows)
    think_open = tokenizer.encode(THINK_OPEN) if think else []
    tokens = (
        chat.message("system", prompts.policy_system(spec.mode)),
        chat.open("user"),
        chat.open("assistant"),
        think_open,
        chat.close,
    )
    system, open_user, open_assistant, opener, close = (jnp.asarray(t, jnp.int32) for t in tokens)
    whitespace = jnp.asarray(whitespace_tokens(tokenizer, rows))
    return PolicyTables(system, open_user, open_assistant, opener, close, grammar, whitespace)


@jax.named_scope("policy_turn")
def policy_turn(
    lm: LM,
    tables: PolicyTables,
    cache: Cache,
    last_say: tuple[Int[Array, "B S"], Int[Array, "B"]],
    heard: tuple[Int[Array, "B R"], Int[Array, "B"]],
    turn_keys: Key[Array, "B"],
    *,
    spec: Spec,
    limits: PlayLimits,
    active: Bool[Array, "B"],
    first: Bool[Array, ""],
) -> tuple[Cache, PolicyTurn]:
    """One reply: read what the user said, speak, and keep only what later turns may see.

    In think mode the whole reply is forgotten again and `last_say` is read with the user's next words; in direct mode
    the say is already in the cache. Either way the context is what a fresh prompt of plain messages would be.
    """
    batch, think = active.shape[0], spec.mode == "think"
    tokens, count = join(
        batch,
        *([last_say] if think else []),
        (tables.close, jnp.where(first, 0, tables.close.shape[0])),
        (tables.open_user, None),
        heard,
        (tables.close, None),
        (tables.open_assistant, None),
        (tables.think_open, None),
    )
    count = jnp.where(active, count, 0)
    cache = append(lm, cache, tokens, count)
    opened = cache.length
    cache, said = generate(
        lm,
        cache,
        part_keys(turn_keys, KEY_POLICY, 1)[0],
        tables.grammar,
        max_tokens=spec.policy_tokens,
        limits=Limits(limits.think_tokens, limits.say_tokens) if think else Limits(limits.say_tokens, jnp.int32(0)),
        temperature=limits.temperature,
        active=active,
        truncation=spec.truncation,
    )
    say, say_count = _split_say(said, tables.whitespace, spec) if think else (said.tokens, said.text_count)
    violation = active & think & ((said.found_at < 0) | (say_count == 0))
    keep = opened - tables.think_open.shape[0] * active if think else opened + say_count
    return rollback(cache, keep), PolicyTurn(said, say, say_count, violation, count)


def _split_say(said: Generated, whitespace: Array, spec: Spec) -> tuple[Array, Array]:
    """Tokens after the one that completed `</think>`, leading white space and the stop token left out."""
    ended = said.text_count * (said.found_at >= 0)
    places = jnp.arange(said.tokens.shape[1])
    after = (places > said.found_at[:, None]) & (places < ended[:, None])
    visible = after & ~whitespace[said.tokens]
    start = jnp.where(visible.any(1), jnp.argmax(visible, axis=1), ended)
    index = jnp.minimum(start[:, None] + jnp.arange(spec.say_tokens), said.tokens.shape[1] - 1)
    count = jnp.maximum(ended - start, 0)
    say = jnp.take_along_axis(said.tokens, index, axis=1)
    return jnp.where(jnp.arange(spec.say_tokens) < count[:, None], say, 0), count


class _State(NamedTuple):
    turn: Array
    policy: Cache
    user: Cache
    alive: Array
    reason: Array
    emotion: Array
    say: tuple[Array, Array]
    reply: tuple[Array, Array]
    log: Dialogues


def _fingerprint(profiles: Profiles) -> Array:
    """uint32 [P] of each prefix: a made-up first utterance depends on its profile, not on who shares the batch."""
    place = jnp.arange(profiles.prefix.shape[1])
    weights = jnp.cumprod(jnp.full(place.shape, 0x01000193, jnp.uint32))
    terms = (profiles.prefix.astype(jnp.uint32) + 1) * weights
    return jnp.where(place < profiles.prefix_count[:, None], terms, 0).sum(axis=1, dtype=jnp.uint32)


@jax.named_scope("open_dialogues")
def open_dialogues(policy, user, tables, profiles: Profiles, key, spec: Spec, limits: PlayLimits):
    """Both caches for all rows, and the first utterances: each profile, and the policy's system prompt, read once."""
    policy_tables, user_tables = tables
    one = init_cache(policy, 1, policy_tables.system.shape[0])
    one = append(policy, one, policy_tables.system[None], jnp.array([policy_tables.system.shape[0]]))
    count, width = profiles.prefix.shape
    wanted = profiles.active[:: spec.group]
    heads = init_cache(user, count, width + spec.user_tokens + 1)
    heads = append(user, heads, profiles.prefix, jnp.where(wanted, profiles.prefix_count, 0))
    prefix = heads.length
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, 1), _fingerprint(profiles))
    heads, made = generate(
        user,
        heads,
        keys,
        user_tables.grammar,
        max_tokens=spec.user_tokens,
        limits=Limits(limits.user.reply_tokens, jnp.int32(0)),
        temperature=limits.user.reply_temperature,
        active=wanted & (profiles.first_count == 0),
    )
    given = profiles.first_count > 0
    size = max(profiles.first_talk.shape[1], spec.user_tokens)
    pad = lambda x: jnp.pad(x, ((0, 0), (0, size - x.shape[1])))  # noqa: E731
    first = jnp.where(given[:, None], pad(profiles.first_talk), pad(made.tokens))
    first_count = jnp.where(given, profiles.first_count, made.text_count)
    heads = repeat_rows(rollback(heads, prefix), spec.group, spec.context)
    one = repeat_rows(one, profiles.active.shape[0], spec.context)
    reply = jnp.repeat(first, spec.group, axis=0), jnp.repeat(first_count, spec.group)
    return one, heads, reply, prefix.sum() + policy_tables.system.shape[0]


def room_needed(tables: tuple[PolicyTables, UserTables], spec: Spec, limits: PlayLimits, first_width: int):
    """Slots that one more turn may need beyond a row's length: (policy, user). Padding counts: it is written too."""
    policy, user = tables
    heard = max(first_width, spec.user_tokens)
    marks = policy.open_user.shape[0] + policy.open_assistant.shape[0] + 2 * policy.close.shape[0]
    policy_room = spec.say_tokens + marks + heard + policy.think_open.shape[0] + spec.policy_tokens
    scripts = (user.appraisal, user.reply)
    literals = sum(s.template.shape[0] * (s.template.shape[1] + 2 * s.values.shape[2]) for s in scripts)
    fields = sum(s.template.shape[0] for s in scripts) - 2
    said = fields * limits.user.field_tokens + limits.user.reply_tokens
    user_room = heard + marks + spec.policy_tokens + literals + user.options.padded.shape[1] + said + user.scratch
    return policy_room, user_room


def _turn(policy, user, tables, spec: Spec, limits: PlayLimits, row_keys, room, state: _State) -> _State:
    """One turn of every row that is still alive."""
    first, last = state.turn == 0, state.turn + 1 >= limits.max_turns
    fits = (state.policy.length + room[0] <= spec.context) & (state.user.length + room[1] <= spec.context)
    reason = jnp.where(state.alive & ~fits, CONTEXT, state.reason)
    active = state.alive & fits
    keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys, state.turn)
    cache, spoken = policy_turn(
        policy,
        tables[0],
        state.policy,
        state.say,
        state.reply,
        keys,
        spec=spec,
        limits=limits,
        active=active,
        first=first,
    )
    listening = active & ~spoken.violation
    say = spoken.say, spoken.say_count
    user_cache, reaction = user_turn(
        user, tables[1], state.user, state.reply, say, state.emotion, keys, rules=spec.rules, readout=spec.readout,
        limits=limits.user, max_tokens=spec.user_tokens, active=listening, may_reply=~last,
    )  # fmt: skip
    rules, emotion = spec.rules, reaction.emotion
    for condition, why in (
        (last, TURN_LIMIT),
        (reaction.goodbye, GOODBYE),
        (rules.failed(emotion), FAILURE),
        (rules.succeeded(emotion), SUCCESS),
    ):
        reason = jnp.where(listening & condition, why, reason)
    reason = jnp.where(spoken.violation, FORMAT, reason)
    said = jax.tree.map(lambda x: x[-1], reaction.reply)
    size = state.reply[0].shape[1]
    reply = jnp.pad(said.tokens, ((0, 0), (0, size - said.tokens.shape[1]))), said.text_count
    log = _record(state, spoken, reaction, active, listening, emotion)
    return _State(state.turn + 1, cache, user_cache, active & (reason == RUNNING), reason, emotion, say, reply, log)


def _record(state: _State, spoken, reaction, active, listening, emotion) -> Dialogues:
    log, turn = state.log, state.turn
    put = lambda buffer, value: buffer.at[turn].set(value)  # noqa: E731
    return dataclasses.replace(
        log,
        turns=log.turns + active,
        violation=log.violation | spoken.violation,
        emotions=jnp.where(jnp.arange(log.emotions.shape[1]) > turn, emotion[:, None], log.emotions),
        policy=jax.tree.map(put, log.policy, spoken),
        user=jax.tree.map(put, log.user, reaction),
        appraised=log.appraised.at[turn].set(listening),
    )


@functools.partial(jax.jit, static_argnames="spec")
def sample_dialogues(
    policy: LM,
    user: LM,
    tables: tuple[PolicyTables, UserTables],
    profiles: Profiles,
    key: Key[Array, ""],
    limits: PlayLimits,
    *,
    spec: Spec,
) -> Dialogues:
    """Plays a batch of dialogues to the end: one XLA program, no host in between.

    Args:
        policy, user: any two Qwen2.5 models with one tokenizer (checked by `players.check_tokenizers`).
        tables: constants of the two sides.
        profiles: P profiles for B = P x spec.group dialogues.
        key: of the run; each dialogue folds its own id into it, so its course doesn't depend on its batch.
        limits: lengths and temperatures, at most what `spec` is compiled for.
    """
    profiles = rules.constrain_rows(profiles)
    policy_cache, user_cache, reply, prefix = open_dialogues(policy, user, tables, profiles, key, spec, limits)
    batch = profiles.active.shape[0]
    row_keys = jax.vmap(dialogue_key, (None, 0))(key, profiles.dialogue_ids)
    emotion = jnp.full(batch, limits.initial_emotion, jnp.int32)
    room = room_needed(tables, spec, limits, profiles.first_talk.shape[1])
    run = functools.partial(_turn, policy, user, tables, spec, limits, row_keys, room)
    say = (jnp.zeros((batch, spec.say_tokens), jnp.int32), jnp.zeros(batch, jnp.int32))
    state = _State(
        jnp.int32(0), policy_cache, user_cache, profiles.active, jnp.zeros(batch, jnp.int32), emotion, say, reply,
        _empty_log(policy, user, tables, policy_cache, user_cache, say, reply, emotion, row_keys, prefix, spec, limits),
    )  # fmt: skip
    state = jax.lax.while_loop(lambda s: s.alive.any() & (s.turn < limits.max_turns), run, state)
    return dataclasses.replace(state.log, end_reason=state.reason)


def _empty_log(policy, user, tables, policy_cache, user_cache, say, reply, emotion, keys, prefix, spec, limits):
    """Zeroed buffers of T turns, shaped by the turn functions themselves."""
    active = jnp.ones(emotion.shape, bool)
    spoken = jax.eval_shape(
        lambda c, k: policy_turn(
            policy, tables[0], c, say, reply, k, spec=spec, limits=limits, active=active, first=jnp.bool_(True)
        )[1],
        policy_cache,
        keys,
    )
    reaction = jax.eval_shape(
        lambda c, k: user_turn(
            user, tables[1], c, reply, say, emotion, k, rules=spec.rules, readout=spec.readout,
            limits=limits.user, max_tokens=spec.user_tokens, active=active, may_reply=jnp.bool_(True),
        )[1],
        user_cache, keys,
    )  # fmt: skip
    zeros = lambda s: jnp.zeros((spec.max_turns, *s.shape), s.dtype)  # noqa: E731
    batch = emotion.shape[0]
    return Dialogues(
        turns=jnp.zeros(batch, jnp.int32),
        end_reason=jnp.zeros(batch, jnp.int32),
        violation=jnp.zeros(batch, bool),
        emotions=jnp.tile(emotion[:, None], (1, spec.max_turns + 1)),
        first_talk=reply[0],
        first_count=reply[1],
        policy=jax.tree.map(zeros, spoken),
        user=jax.tree.map(zeros, reaction),
        appraised=jnp.zeros((spec.max_turns, batch), bool),
        prefix_tokens=prefix.astype(jnp.int32),
    )
