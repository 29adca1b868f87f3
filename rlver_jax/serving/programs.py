"""The few programs that a server runs, each compiled once for its shapes.

A server holds one cache of R rows. The host knows how long every row is and says so with each call, so a row is freed
and used again without touching the device. Requests' temperatures, limits and seeds are arguments, never shapes.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from rlver_jax.decoding.cache import LM, Cache, append, init_cache
from rlver_jax.decoding.generate import Limits, Truncation, generate
from rlver_jax.decoding.grammar import Grammar

TOP = 20  # likeliest tokens told with each token where someone asks: the protocol's most


class Likeliest(NamedTuple):
    """What the model itself (temperature 1, nothing forbidden) thinks of each token; zeros where nobody asked."""

    logprob: Float[Array, "*b"]  # of the token that stands there
    top: Int[Array, "*b T"]  # the likeliest first
    top_logprob: Float[Array, "*b T"]


@flax.struct.dataclass
class SlotRequest:
    """What each row wants next."""

    length: Int[Array, "R"]  # slots it has read
    active: Bool[Array, "R"]
    limit: Int[Array, "R"]  # tokens it may still say
    said: Int[Array, "R"]  # tokens it has said: which part of its randomness comes next
    seed: UInt[Array, "R"]
    temperature: Float[Array, "R"]  # 0: greedy
    top_p: Float[Array, "R"]
    details: Bool[Array, "R"]  # tell the likeliest tokens


@flax.struct.dataclass
class BlockOutput:
    """What every row said in one block of K steps."""

    tokens: Int[Array, "R K"]
    count: Int[Array, "R"]  # a stop token included
    stopped: Bool[Array, "R"]  # the last one is a stop token
    likeliest: Likeliest  # each array [R, K, …]


def _row(cache: Cache, row: Int[Array, ""], length: Int[Array, ""]) -> Cache:
    """One row as a batch of one."""
    axis = 0 if isinstance(cache.kv.k, tuple) else 1
    kv = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1, axis), cache.kv)
    return Cache(kv, length[None], jax.lax.dynamic_slice_in_dim(cache.hidden, row, 1))


def _put_row(cache: Cache, row: Int[Array, ""], one: Cache) -> Cache:
    axis = 0 if isinstance(cache.kv.k, tuple) else 1
    put = lambda x, new, at: jax.lax.dynamic_update_slice_in_dim(x, new, row, at)  # noqa: E731
    kv = jax.tree.map(lambda x, new: put(x, new, axis), cache.kv, one.kv)
    return Cache(kv, cache.length, put(cache.hidden, one.hidden, 0))


@functools.partial(jax.jit, donate_argnames="cache")
def prefill(
    lm: LM,
    cache: Cache,
    row: Int[Array, ""],
    length: Int[Array, ""],
    tokens: Int[Array, "1 S"],
    count: Int[Array, "1"],
) -> Cache:
    """One row, which has `length` tokens, reads `count` more. Compiled once for every S."""
    return _put_row(cache, row, append(lm, _row(cache, row, length), tokens, count))


@functools.partial(jax.jit, donate_argnames="cache")
def read_and_score(
    lm: LM,
    cache: Cache,
    row: Int[Array, ""],
    length: Int[Array, ""],
    tokens: Int[Array, "1 S"],
    count: Int[Array, "1"],
) -> tuple[Cache, Likeliest]:
    """`prefill`, and what was expected in place of each token [S]; at length 0 the first one is meaningless."""
    one = _row(cache, row, length)
    positions = one.length[:, None] + jnp.arange(tokens.shape[1])
    hidden, kv = lm.read(tokens, positions, None, one)
    before = jnp.concatenate([one.hidden, hidden[0, :-1]])  # what predicts each token

    def score(i: Array, scored: Likeliest) -> Likeliest:  # one distribution at a time, none for padding
        one = _likeliest(lm.logits(before[i]), tokens[0, i])
        return jax.tree.map(lambda array, value: array.at[i].set(value), scored, one)

    scored = jax.lax.fori_loop(0, count[0], score, _nothing_likely(lm, tokens.shape[1]))
    last = hidden[:, jnp.maximum(count[0] - 1, 0)]
    return _put_row(cache, row, Cache(kv, one.length, last)), scored


def _likeliest(logits: Float[Array, "*b V"], token: Int[Array, "*b"]) -> Likeliest:
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
    top_logits, top = jax.lax.top_k(logits, min(TOP, logits.shape[-1]))
    return Likeliest(chosen - normalizer, top, top_logits - normalizer[..., None])


class _Loop(NamedTuple):
    step: Array
    cache: Cache
    alive: Array
    spoken: BlockOutput


@functools.partial(jax.jit, donate_argnames="cache", static_argnames="steps")
def speak(lm: LM, cache: Cache, grammar: Grammar, ask: SlotRequest, *, steps: int) -> tuple[Cache, BlockOutput]:
    """Every active row says up to `steps` tokens; leaves when all have ended.

    Token number n of a row is drawn with key (its seed, n): neither the other rows nor where blocks begin matter.
    The grammar must be one without memory (`free_text`): it starts anew with every token.
    """
    rows = ask.length.shape[0]
    keys = jax.vmap(jax.random.key)(ask.seed)

    def body(loop: _Loop) -> _Loop:
        expected = jax.lax.cond(
            (ask.details & loop.alive).any(),
            lambda: _likeliest(lm.logits(loop.cache.hidden), jnp.zeros(rows, jnp.int32))[1:],
            lambda: jax.tree.map(lambda x: jnp.zeros_like(x[:, 0]), loop.spoken.likeliest[1:]),
        )
        cache, said = generate(
            lm,
            loop.cache,
            jax.vmap(jax.random.fold_in)(keys, ask.said + loop.step),
            grammar,
            max_tokens=1,
            limits=Limits(jnp.int32(1), jnp.int32(0)),
            temperature=ask.temperature,
            active=loop.alive,
            truncation=Truncation(top_p=ask.top_p),
        )
        spoken = _record(loop, said.tokens[:, 0], said.raw_logprob[:, 0], said.stopped, expected)
        alive = loop.alive & ~spoken.stopped & (spoken.count < ask.limit)
        return _Loop(loop.step + 1, cache, alive, spoken)

    start = dataclasses.replace(cache, length=ask.length)
    first = _Loop(jnp.int32(0), start, ask.active & (ask.limit > 0), _silence(rows, steps, lm))
    last = jax.lax.while_loop(lambda loop: (loop.step < steps) & loop.alive.any(), body, first)
    return last.cache, last.spoken


def _silence(rows: int, steps: int, lm: LM) -> BlockOutput:
    zeros = functools.partial(jnp.zeros, dtype=jnp.int32)
    return BlockOutput(zeros((rows, steps)), zeros(rows), zeros(rows) > 0, _nothing_likely(lm, rows, steps))


def _nothing_likely(lm: LM, *shape: int) -> Likeliest:
    top = (*shape, min(TOP, lm.model.config.vocab_size))
    return Likeliest(jnp.zeros(shape, jnp.float32), jnp.zeros(top, jnp.int32), jnp.zeros(top, jnp.float32))


def _record(loop: _Loop, token: Array, raw: Array, stopped: Array, expected: tuple[Array, Array]) -> BlockOutput:
    spoken, at = loop.spoken, loop.step
    put = lambda array, value: array.at[:, at].set(value)  # noqa: E731
    return BlockOutput(
        tokens=put(spoken.tokens, token),
        count=spoken.count + loop.alive,
        stopped=spoken.stopped | stopped,
        likeliest=Likeliest(
            put(spoken.likeliest.logprob, raw),
            put(spoken.likeliest.top, expected[0]),
            put(spoken.likeliest.top_logprob, expected[1]),
        ),
    )


@functools.partial(jax.jit, static_argnames=("rows", "capacity"))
def empty(lm: LM, rows: int, capacity: int) -> Cache:
    """The cache of a server that has read nothing."""
    return init_cache(lm, rows, capacity)


def compiled() -> int:
    """Programs compiled in this process so far: a server in service adds none."""
    jitted: tuple[Any, ...] = (prefill, read_and_score, speak)
    return sum(program._cache_size() for program in jitted)
