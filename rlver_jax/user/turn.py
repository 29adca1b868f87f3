"""The simulated user on the device: it appraises a reply, its emotion moves, and it answers."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from rlver_jax.decoding.cache import LM, Cache, append, concat_ragged, rollback
from rlver_jax.decoding.choice import Options, build_options, choose
from rlver_jax.decoding.generate import Generated
from rlver_jax.decoding.grammar import Grammar, matcher, one_line
from rlver_jax.decoding.script import Script, compile_script, run_fields
from rlver_jax.text.automaton import GOODBYES
from rlver_jax.text.chat import ChatTemplate
from rlver_jax.text.tokenizer import Tokenizer
from rlver_jax.user.emotion import BANDS, CHANGES, EmotionRules, change_readout
from rlver_jax.user.prompts import Prompts

# Parts of a turn's randomness; fields of a script follow their base.
KEY_POLICY, KEY_READOUT, KEY_APPRAISAL, KEY_REPLY = 0, 1, 16, 48

Words = tuple[Int[Array, "B W"], Int[Array, "B"]]  # tokens, padded on the right, and the length of each row


@flax.struct.dataclass
class UserTables:
    """All constants of the simulated user, on the device."""

    open_user: Int[Array, "_"]
    open_assistant: Int[Array, "_"]
    close: Int[Array, "_"]
    opening: Int[Array, "_"]  # of what it generates, before any script: see `ChatTemplate.opening`; mostly empty
    appraisal: Script  # its first literal begins with `opening`
    reply: Script
    options: Options
    grammar: Grammar
    goodbye: Int[Array, "N V"]
    goodbye_found: int = flax.struct.field(pytree_node=False)

    @property
    def scratch(self) -> int:
        """Slots that `choose` needs beyond the context."""
        return self.options.tokens.shape[0]


@flax.struct.dataclass
class UserLimits:
    """What may change between calls without compiling again."""

    field_tokens: Int[Array, ""]
    reply_tokens: Int[Array, ""]
    reply_temperature: Float[Array, ""]


@flax.struct.dataclass
class UserTurn:
    """What one turn of the user produced; F fields of the appraisal, G of the reply script (the reply is the last)."""

    appraisal: Generated  # each array [F, B, …]
    change_logprobs: Float[Array, "B 21"]  # log p(option | context), not normalized over the options
    change: Int[Array, "B"]
    emotion: Int[Array, "B"]  # after the change
    reply: Generated  # each array [G, B, …]
    goodbye: Bool[Array, "B"]
    prefilled: Int[Array, "B"]  # tokens read, not generated


def option_text(change: int) -> str:
    """How a change is written in an appraisal; the line end keeps "+1" from being the beginning of "+10"."""
    return f"{change:+d}\n" if change else "0\n"


def build_user_tables(tokenizer: Tokenizer, prompts: Prompts, vocab_size: int) -> UserTables:
    """Tables for a user model with an embedding of `vocab_size` rows."""
    chat = ChatTemplate(tokenizer)
    slots = {"emotion": [str(n) for n in range(101)], "band": BANDS}
    goodbye, goodbye_found = matcher(GOODBYES, tokenizer, vocab_size)
    begun = chat.opening(think=False)
    around = (chat.open("user"), chat.open("assistant"), chat.close, begun)
    open_user, open_assistant, close, opening = jax.device_put([np.array(tokens, np.int32) for tokens in around])
    return UserTables(
        open_user=open_user,
        open_assistant=open_assistant,
        close=close,
        opening=opening,
        appraisal=compile_script(prompts.appraisal, tokenizer, slots, begun),
        reply=compile_script(prompts.reply, tokenizer, slots),
        options=build_options([tokenizer.encode(option_text(c)) for c in CHANGES]),
        grammar=one_line(tokenizer, vocab_size),
        goodbye=goodbye,
        goodbye_found=goodbye_found,
    )


@jax.jit
def dialogue_key(key: Key[Array, ""], dialogue_id: Int[Array, ""]) -> Key[Array, ""]:
    """Key of one dialogue of a run, whatever batch it stands in; its turns fold their index into it."""
    return jax.random.fold_in(jax.random.fold_in(key, 0), dialogue_id)


def part_keys(turn_keys: Key[Array, "B"], base: int, count: int) -> Key[Array, "F B"]:
    """Keys of `count` fields of a script, one for each row."""
    return jax.vmap(lambda part: jax.vmap(jax.random.fold_in, (0, None))(turn_keys, part))(base + jnp.arange(count))


@jax.named_scope("user_turn")
def user_turn(
    lm: LM, tables: UserTables, cache: Cache, last_reply: Words, say: Words, emotion: Int[Array, "B"],
    turn_keys: Key[Array, "B"], *, rules: EmotionRules, readout: str, limits: UserLimits, max_tokens: int,
    active: Bool[Array, "B"], may_reply: Bool[Array, ""],
) -> tuple[Cache, UserTurn]:  # fmt: skip
    """One turn: read the policy's say, appraise it, move the emotion, and answer under the new band.

    The cache comes in and goes out at the opening of an assistant message, without `last_reply`, the answer of the turn
    before, which is read here with the new say. Rows that are not active, or whose dialogue the new emotion or
    `may_reply` ends, say nothing.
    """
    batch = active.shape[0]
    base = concat_ragged(
        batch, last_reply, (tables.close, None), (tables.open_user, None), say, (tables.close, None),
        (tables.open_assistant, None),
    )  # fmt: skip
    prefilled = jnp.where(active, base[1], 0)
    cache = append(lm, cache, base[0], prefilled)
    opening = cache.length
    cache, appraisal, change_logprobs, appraisal_read = appraise(
        lm, tables, cache, emotion, turn_keys, rules, limits, max_tokens, active
    )
    keys = part_keys(turn_keys, KEY_READOUT, 1)[0] if readout == "sample" else None
    change = jnp.where(active, rules.clamp(change_readout(change_logprobs, readout, keys)), 0)
    moved = rules.update(emotion, change)
    speaks = active & ~rules.ended(moved) & may_reply
    cache, reply, reply_read = _reply(lm, tables, cache, change, moved, turn_keys, rules, limits, max_tokens, speaks)
    aloud = jax.tree.map(lambda x: x[-1], reply)
    turn = UserTurn(
        appraisal=appraisal,
        change_logprobs=change_logprobs,
        change=change,
        emotion=moved,
        reply=reply,
        goodbye=speaks & says(tables.goodbye, tables.goodbye_found, aloud.tokens, aloud.text_count),
        prefilled=prefilled + appraisal_read + reply_read,
    )
    return rollback(cache, opening), turn


@jax.named_scope("appraise")
def appraise(
    lm: LM,
    tables: UserTables,
    cache: Cache,
    emotion: Int[Array, "B"],
    turn_keys: Key[Array, "B"],
    rules: EmotionRules,
    limits: UserLimits,
    max_tokens: int,
    active: Bool[Array, "B"],
) -> tuple[Cache, Generated, Float[Array, "B 21"], Int[Array, "B"]]:
    """The appraisal script, from the opening of an assistant message on, up to the change, which is not chosen yet.

    Returns the cache before the change, the fields, log p of every change (not normalized), and how many tokens were
    read.
    """
    tokens, counts = tables.appraisal.render(emotion, rules.band(emotion))
    fields = tokens.shape[0] - 1  # the last literal leads to the choice
    cache, lines = run_fields(
        lm,
        cache,
        (tokens[:-1], counts[:-1]),
        part_keys(turn_keys, KEY_APPRAISAL, fields),
        tables.grammar,
        max_tokens=max_tokens,
        limits=jnp.full(fields, limits.field_tokens),
        temperatures=jnp.zeros(fields, jnp.float32),  # appraisals are greedy: the reward can be recomputed
        active=active,
    )
    cache = append(lm, cache, tokens[-1], jnp.where(active, counts[-1], 0))
    cache, logprobs = choose(lm, cache, tables.options)
    prefilled = jnp.where(active, counts.sum(0) + tables.scratch, 0)
    return cache, lines, jnp.where(active[:, None], logprobs, 0.0), prefilled


@jax.named_scope("reply")
def _reply(lm, tables, cache, change, emotion, turn_keys, rules, limits, max_tokens, active):
    tokens, counts = tables.reply.render(emotion, rules.band(emotion))
    fields, batch, _ = tokens.shape
    chosen = change - CHANGES[0]
    first = concat_ragged(
        batch,
        (tables.options.padded[chosen], tables.options.counts[chosen]),
        (tokens[0], counts[0]),
    )
    extra = first[0].shape[1] - tokens.shape[2]
    tokens = jnp.pad(tokens, ((0, 0), (0, 0), (0, extra))).at[0].set(first[0])
    counts = counts.at[0].set(first[1])
    aloud = jnp.arange(fields) == fields - 1
    cache, lines = run_fields(
        lm,
        cache,
        (tokens, counts),
        part_keys(turn_keys, KEY_REPLY, fields),
        tables.grammar,
        max_tokens=max_tokens,
        limits=jnp.where(aloud, limits.reply_tokens, limits.field_tokens),
        temperatures=jnp.where(aloud, limits.reply_temperature, 0.0),
        active=active,
    )
    return cache, lines, jnp.where(active, counts.sum(0), 0)


def says(table: Int[Array, "N V"], first_found: int, tokens: Int[Array, "B M"], count: Int[Array, "B"]):
    """Bool [B]: whether an automaton finds one of its patterns in the first count[b] tokens."""

    def step(state: Array, xs: tuple[Array, Array]) -> tuple[Array, None]:
        token, i = xs
        return jnp.where(i < count, table[state, token].astype(jnp.int32), state), None

    start = jnp.zeros(tokens.shape[0], jnp.int32)
    state, _ = jax.lax.scan(step, start, (tokens.T, jnp.arange(tokens.shape[1])))
    return state >= first_found
