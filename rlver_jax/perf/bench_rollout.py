"""The policy's side of dialogues of one shape, by a model of random weights, against the limits of the machine.

The model is Qwen2.5 in small: 8 layers, width 512, a vocabulary of 32,000, float32. 16 dialogues begin with 512 tokens.
In each of six turns the policy generates 48 tokens, sampled at temperature 1 and never ended by a stop token, and reads
32 before the next turn.
"""

import functools
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from rlver_jax.decoding.cache import LM, Cache, append, init_cache
from rlver_jax.decoding.generate import Limits, generate
from rlver_jax.decoding.grammar import Grammar
from rlver_jax.models.families import Qwen2Config
from rlver_jax.models.qwen import Qwen2, init_params
from rlver_jax.perf.bench_timing import Tell, alternate, copied_bytes_per_s
from rlver_jax.rollout.policy_turn import PolicyTables, policy_turn
from rlver_jax.rollout.spec import RolloutConfig, RolloutLimits
from rlver_jax.user.turn import UserLimits


class Shape(NamedTuple):
    """Of the dialogues."""

    batch: int
    prefix: int  # tokens before the first turn
    turns: int
    reply: int  # tokens a turn
    user: int  # tokens between replies

    @property
    def context(self) -> int:
        """Capacity of a row of the cache."""
        return self.prefix + self.turns * (self.reply + self.user)


SMALL = Qwen2Config(32_000, 512, 1408, num_layers=8, num_heads=8, num_kv_heads=2, head_dim=64, tie_embeddings=True)
SHAPE = Shape(batch=16, prefix=512, turns=6, reply=48, user=32)


def measure(repeats: int, tell: Tell) -> dict[str, Any]:
    """Tokens a second of whole dialogues, and of decoding alone beside a copy of all that a step must read."""
    model = Qwen2(SMALL, scan_layers=False)
    lm = LM(init_params(model, jax.random.key(0)), model)
    tables, keys = _tables(SMALL.vocab_size), jax.random.split(jax.random.key(1), SHAPE.batch)
    prefix, user = _texts(SHAPE, SMALL.vocab_size)
    tell("compiling")
    began = time.perf_counter()
    play = functools.partial(_play, lm, tables, prefix, user, keys)
    cache = jax.block_until_ready(play())
    compiled = time.perf_counter() - began
    # A turn from half of the context on: what a step reads on average.
    half = jax.block_until_ready(_half(cache))
    decode = functools.partial(_decode, lm, tables.grammar, half, keys)
    jax.block_until_ready(decode())
    seconds = alternate({"dialogues": play, "decode": decode}, repeats, tell)
    tell("copying")
    return _results(lm, half, seconds, compiled, copied_bytes_per_s(max(repeats, 5)))


def lines(results: dict[str, Any]) -> list[str]:
    """The results as text."""
    return [
        f"{results['batch']} dialogues: {results['generated']} tokens generated, {results['prefilled']} read, in "
        f"{results['seconds']:.2f} s: {results['generated_tokens_per_s']:.0f} generated tokens/s "
        f"(compiled in {results['compile_s']:.1f} s)",
        f"decoding alone: {results['decode_tokens_per_s']:.0f} tokens/s, {results['step_ms']:.1f} ms a step; a copy of "
        f"the {results['step_bytes'] / 1e6:.0f} MB that a step reads takes {results['copy_ms']:.1f} ms: "
        f"{results['of_limit']:.0%} of the limit",
    ]


def _results(lm: LM, half: Cache, seconds: dict[str, list[float]], compiled: float, copied: float) -> dict[str, Any]:
    whole, decode = (statistics.median(seconds[name]) for name in ("dialogues", "decode"))
    generated = SHAPE.batch * SHAPE.turns * SHAPE.reply
    filled = float(half.length.mean()) + SHAPE.reply / 2
    weights = sum(x.nbytes for x in jax.tree.leaves(lm.params))
    step_bytes = weights + sum(x.nbytes for x in jax.tree.leaves(half.kv)) * filled / half.capacity
    return {
        **SHAPE._asdict(),
        "seconds": whole,
        "compile_s": compiled - whole,
        "generated": generated,
        "prefilled": SHAPE.batch * (SHAPE.prefix + (SHAPE.turns - 1) * SHAPE.user),
        "generated_tokens_per_s": generated / whole,
        "decode_tokens_per_s": SHAPE.batch * SHAPE.reply / decode,
        "step_ms": decode / SHAPE.reply * 1e3,
        "step_bytes": step_bytes,
        "copied_bytes_per_s": copied,
        "copy_ms": step_bytes / copied * 1e3,
        "of_limit": step_bytes / copied / (decode / SHAPE.reply),
        "all_seconds": seconds,
    }


def _tables(vocabulary: int) -> PolicyTables:
    """Messages without a template around them."""
    nothing = jnp.zeros(0, jnp.int32)
    return PolicyTables(
        nothing, nothing, nothing, nothing, nothing, free_grammar(vocabulary), jnp.zeros(vocabulary, bool)
    )


def free_grammar(vocabulary: int) -> Grammar:
    """One that rules nothing out and ends nowhere."""
    table, forbidden = jnp.zeros((3, vocabulary), jnp.int16), jnp.zeros((3, vocabulary), bool)
    return Grammar(table, forbidden, first_found=1, begin=1, stop=2)


def _texts(shape: Shape, vocabulary: int) -> tuple[Array, Array]:
    draw = np.random.default_rng(0)
    prefix = draw.integers(3, vocabulary, (shape.batch, shape.prefix))
    user = draw.integers(3, vocabulary, (shape.turns, shape.batch, shape.user))
    return jnp.asarray(prefix, jnp.int32), jnp.asarray(user, jnp.int32)


@jax.jit
def _play(lm: LM, tables: PolicyTables, prefix: Int[Array, "B P"], user: Int[Array, "T B H"], keys: Key[Array, "B"]):
    spec = RolloutConfig("direct", False, 1, SHAPE.turns, SHAPE.context, 0, SHAPE.reply, SHAPE.user)
    everyone, whole = jnp.ones(SHAPE.batch, bool), jnp.full(SHAPE.batch, SHAPE.prefix, jnp.int32)
    limits = _limits()
    cache = append(lm, init_cache(lm, SHAPE.batch, SHAPE.context), prefix, whole)

    def turn(i: Array, cache: Cache) -> Cache:
        count = jnp.where(i > 0, SHAPE.user, 0) * everyone
        turn_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
        last = (jnp.zeros((SHAPE.batch, SHAPE.reply), jnp.int32), jnp.zeros(SHAPE.batch, jnp.int32))
        cache, _ = policy_turn(
            lm,
            tables,
            cache,
            last,
            (user[i], count),
            turn_keys,
            spec=spec,
            limits=limits,
            active=everyone,
            first=i == 0,
        )
        return cache

    return jax.lax.fori_loop(0, SHAPE.turns, turn, cache)


def _limits() -> RolloutLimits:
    none, one = jnp.int32(0), jnp.float32(1)
    user_limits = UserLimits(field_tokens=none, reply_tokens=none, reply_temperature=one)
    return RolloutLimits(jnp.int32(SHAPE.turns), none, jnp.int32(SHAPE.reply), one, jnp.int32(40), user_limits)


def _half(cache: Cache) -> Cache:
    return Cache(cache.kv, jnp.full_like(cache.length, (SHAPE.prefix + SHAPE.context) // 2), cache.hidden)


@jax.jit
def _decode(lm: LM, grammar: Grammar, cache: Cache, keys: Key[Array, "B"]) -> Array:
    everyone, limits = jnp.ones(SHAPE.batch, bool), Limits(jnp.int32(SHAPE.reply), jnp.int32(0))
    _, completion = generate(
        lm, cache, keys, grammar, max_tokens=SHAPE.reply, limits=limits, temperature=jnp.float32(1), active=everyone
    )
    return completion.tokens
