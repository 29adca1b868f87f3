"""The policy's turn on the device: prefill the user's words, decode a reply."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key

from rlver_jax.decoding.cache import LM, Cache, append, concat_ragged, rollback
from rlver_jax.decoding.generate import Generated, Limits, generate
from rlver_jax.decoding.grammar import Grammar, free_text, thought_then_say, whitespace_tokens
from rlver_jax.rollout.spec import RolloutConfig, RolloutLimits
from rlver_jax.text.chat import ChatTemplate
from rlver_jax.text.tokenizer import Tokenizer
from rlver_jax.user.prompts import Prompts
from rlver_jax.user.turn import KEY_POLICY, part_keys

Words = tuple[Int[Array, "B _"], Int[Array, "B"]]  # tokens, padded on the right, and how many of each row count


@flax.struct.dataclass
class PolicyTables:
    """All constants of the policy's turn, on the device."""

    system: Int[Array, "_"]
    open_user: Int[Array, "_"]
    open_assistant: Int[Array, "_"]
    think_open: Int[Array, "_"]  # what a reply begins with (see `ChatTemplate.opening`); mostly empty in direct mode
    close: Int[Array, "_"]
    grammar: Grammar
    whitespace: Bool[Array, "V"]

    @property
    def branched(self) -> bool:
        """Whether later turns see only the say of a reply: it begins with what they don't see, or holds it."""
        return self.think_open.shape[0] > 0


@flax.struct.dataclass
class PolicyTurn:
    """One reply of the policy."""

    completion: Generated  # thought and say, as sampled
    say: Int[Array, "B S"]  # what the user hears: after `</think>` and the white space that follows, before the end
    say_count: Int[Array, "B"]
    violation: Bool[Array, "B"]  # think mode: no `</think>`, or nothing after it
    prefilled: Int[Array, "B"]  # tokens prefilled, not generated


def build_policy_tables(tokenizer: Tokenizer, prompts: Prompts, vocab_size: int, spec: RolloutConfig) -> PolicyTables:
    """Tables for a policy whose embedding has `vocab_size` rows."""
    chat, think = ChatTemplate(tokenizer), spec.mode == "think"
    if think:
        grammar = thought_then_say(tokenizer, vocab_size, enforce=spec.enforce_format)
    else:
        grammar = free_text(tokenizer, vocab_size)
    system = prompts.policy_system(spec.mode, spec.prompt)
    tokens = (
        chat.message("system", system) if system else chat.default_system(),
        chat.open("user"),
        chat.open("assistant"),
        chat.opening(think=think),
        chat.close,
    )
    system, open_user, open_assistant, think_open, close = jax.device_put([np.array(t, np.int32) for t in tokens])
    whitespace = jax.device_put(whitespace_tokens(tokenizer, vocab_size))
    return PolicyTables(system, open_user, open_assistant, think_open, close, grammar, whitespace)


@jax.named_scope("policy_turn")
def policy_turn(
    lm: LM,
    tables: PolicyTables,
    cache: Cache,
    last_say: Words,
    heard: Words,
    turn_keys: Key[Array, "B"],
    *,
    spec: RolloutConfig,
    limits: RolloutLimits,
    active: Bool[Array, "B"],
    first: Bool[Array, "*B"],
) -> tuple[Cache, PolicyTurn]:
    """One reply: prefill the user's words, decode, and keep in the cache only what later turns may see.

    In think mode, and where a direct reply begins with an empty thought, the cache is rolled back to before the reply,
    and the next turn prefills `last_say` with the user's words; otherwise the reply is already in the cache. Either way
    the context is that of a fresh prompt of plain messages.
    """
    think = spec.mode == "think"
    tokens, count = _heard_tokens(tables, [last_say] if tables.branched else [], heard, active, first)
    cache = append(lm, cache, tokens, count)
    opened = cache.length
    cache, reply = generate(
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
    say, say_count = _split_say(reply, tables.whitespace, spec) if think else (reply.tokens, reply.text_count)
    violation = active & think & ((reply.found_at < 0) | (say_count == 0))
    retained = opened - tables.think_open.shape[0] * active if tables.branched else opened + say_count
    return rollback(cache, retained), PolicyTurn(reply, say, say_count, violation, count)


def _heard_tokens(
    tables: PolicyTables, last_say: list[Words], heard: Words, active: Bool[Array, "B"], first: Bool[Array, "*B"]
) -> Words:
    """What a turn prefills: the last reply where the cache lacks it, the user's words, the opening of a reply."""
    tokens, count = concat_ragged(
        active.shape[0],
        *last_say,
        (tables.close, jnp.where(first, 0, tables.close.shape[0])),
        (tables.open_user, None),
        heard,
        (tables.close, None),
        (tables.open_assistant, None),
        (tables.think_open, None),
    )
    return tokens, jnp.where(active, count, 0)


def _split_say(reply: Generated, whitespace: Array, spec: RolloutConfig) -> tuple[Array, Array]:
    """Tokens after the one that completed `</think>`, leading white space and the stop token left out."""
    ended = reply.text_count * (reply.found_at >= 0)
    positions = jnp.arange(reply.tokens.shape[1])
    after = (positions > reply.found_at[:, None]) & (positions < ended[:, None])
    visible = after & ~whitespace[reply.tokens]
    start = jnp.where(visible.any(1), jnp.argmax(visible, axis=1), ended)
    index = jnp.minimum(start[:, None] + jnp.arange(spec.say_tokens), reply.tokens.shape[1] - 1)
    count = jnp.maximum(ended - start, 0)
    say = jnp.take_along_axis(reply.tokens, index, axis=1)
    return jnp.where(jnp.arange(spec.say_tokens) < count[:, None], say, 0), count
