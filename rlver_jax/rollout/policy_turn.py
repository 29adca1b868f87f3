"""The policy's side on the device: it hears what the user said, and replies."""

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

THINK_OPEN = "<think>\n"


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
class PolicyTurn:
    """One reply of the policy."""

    said: Generated  # thought and say, as sampled
    say: Int[Array, "B S"]  # what the user hears: after `</think>` and the white space that follows, before the end
    say_count: Int[Array, "B"]
    violation: Bool[Array, "B"]  # think mode: no `</think>`, or nothing after it
    prefilled: Int[Array, "B"]  # tokens read, not generated


def build_policy_tables(tokenizer: Tokenizer, prompts: Prompts, rows: int, spec: RolloutConfig) -> PolicyTables:
    """Tables for a policy with `rows` embedding rows."""
    chat, think = ChatTemplate(tokenizer), spec.mode == "think"
    grammar = thought_then_say(tokenizer, rows, enforce=spec.enforce_format) if think else free_text(tokenizer, rows)
    think_open = tokenizer.encode(THINK_OPEN) if think else []
    system = prompts.policy_system(spec.mode)
    tokens = (
        chat.message("system", system) if system else chat.default_system(),
        chat.open("user"),
        chat.open("assistant"),
        think_open,
        chat.close,
    )
    system, open_user, open_assistant, opener, close = jax.device_put([np.array(t, np.int32) for t in tokens])
    whitespace = jax.device_put(whitespace_tokens(tokenizer, rows))
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
    spec: RolloutConfig,
    limits: RolloutLimits,
    active: Bool[Array, "B"],
    first: Bool[Array, "*B"],
) -> tuple[Cache, PolicyTurn]:
    """One reply: read what the user said, speak, and keep only what later turns may see.

    In think mode the whole reply is forgotten again and `last_say` is read with the user's next words; in direct mode
    the say is already in the cache. Either way the context is what a fresh prompt of plain messages would be.
    """
    batch, think = active.shape[0], spec.mode == "think"
    tokens, count = concat_ragged(
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


def _split_say(said: Generated, whitespace: Array, spec: RolloutConfig) -> tuple[Array, Array]:
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
