"""The few programs that a server runs, each compiled once for its shapes.

A server holds one KV cache of R rows. The host knows the length of every row and passes it with each call, so a row is
freed and used again without touching the device. Temperatures, limits and seeds are arguments, never shapes.
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
from rlver_jax.models.lora import for_rows

TOP = 20  # likeliest tokens beside each token where someone asks: the protocol's most
Scalar = Int[Array, ""]
Ranks = Float[Array, "R K"] | None  # which ranks of the adapters beside the model each row takes: 0 or 1; None: all


class TokenLogprobs(NamedTuple):
    """The model's own log-probabilities (temperature 1, nothing forbidden); zeros where nobody asked."""

    logprob: Float[Array, "*b"]  # of the token at the position
    top: Int[Array, "*b T"]  # tokens, the likeliest first
    top_logprob: Float[Array, "*b T"]


@flax.struct.dataclass
class SlotRequest:
    """What each row wants next."""

    length: Int[Array, "R"]  # of its cache
    active: Bool[Array, "R"]
    limit: Int[Array, "R"]  # tokens it may still generate
    generated: Int[Array, "R"]  # tokens so far: which part of its randomness comes next
    seed: UInt[Array, "R"]
    temperature: Float[Array, "R"]  # 0: greedy
    top_p: Float[Array, "R"]
    details: Bool[Array, "R"]  # whether the likeliest tokens are wanted
    ranks: Ranks = None


@flax.struct.dataclass
class BlockOutput:
    """What every row generated in one block of K steps."""

    tokens: Int[Array, "R K"]
    count: Int[Array, "R"]  # a stop token included
    stopped: Bool[Array, "R"]  # the last one is a stop token
    logprobs: TokenLogprobs  # each array [R, K, …]


def _row(cache: Cache, row: Scalar, length: Scalar) -> Cache:
    """One row as a batch of one."""
    axis = 0 if isinstance(cache.kv.k, tuple) else 1
    kv = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1, axis), cache.kv)
    return Cache(kv, length[None], jax.lax.dynamic_slice_in_dim(cache.hidden, row, 1))


def _put_row(cache: Cache, row: Scalar, one: Cache) -> Cache:
    axis = 0 if isinstance(cache.kv.k, tuple) else 1
    put = lambda x, new, at: jax.lax.dynamic_update_slice_in_dim(x, new, row, at)  # noqa: E731
    kv = jax.tree.map(lambda x, new: put(x, new, axis), cache.kv, one.kv)
    return Cache(kv, cache.length, put(cache.hidden, one.hidden, 0))


def _of_rows(lm: LM, ranks: Ranks) -> LM:
    return lm.replace(params=for_rows(lm.params, ranks))  # type: ignore[attr-defined]


@functools.partial(jax.jit, donate_argnames="cache")
def prefill(
    lm: LM,
    cache: Cache,
    row: Scalar,
    length: Scalar,
    tokens: Int[Array, "1 S"],
    count: Int[Array, "1"],
    ranks: Ranks = None,
) -> Cache:
    """Appends `count` tokens to one row that has `length` so far. Compiled once for every S."""
    lm = _of_rows(lm, ranks)
    return _put_row(cache, row, append(lm, _row(cache, row, length), tokens, count))


@functools.partial(jax.jit, donate_argnames="cache")
def prefill_and_score(
    lm: LM,
    cache: Cache,
    row: Scalar,
    length: Scalar,
    tokens: Int[Array, "1 S"],
    count: Int[Array, "1"],
    ranks: Ranks = None,
) -> tuple[Cache, TokenLogprobs]:
    """`prefill`, and the log-probabilities of each token [S]; at length 0 the first ones are meaningless."""
    lm = _of_rows(lm, ranks)
    one = _row(cache, row, length)
    positions = one.length[:, None] + jnp.arange(tokens.shape[1])
    hidden, kv = lm.forward(tokens, positions, None, one)
    before = jnp.concatenate([one.hidden, hidden[0, :-1]])  # what predicts each token

    def score(i: Array, scored: TokenLogprobs) -> TokenLogprobs:  # one distribution at a time, none for padding
        one = _token_logprobs(lm.logits(before[i]), tokens[0, i])
        return jax.tree.map(lambda array, value: array.at[i].set(value), scored, one)

    scored = jax.lax.fori_loop(0, count[0], score, _no_logprobs(lm, tokens.shape[1]))
    last = hidden[:, jnp.maximum(count[0] - 1, 0)]
    return _put_row(cache, row, Cache(kv, one.length, last)), scored


def _token_logprobs(logits: Float[Array, "*b V"], token: Int[Array, "*b"]) -> TokenLogprobs:
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
    top_logits, top = jax.lax.top_k(logits, min(TOP, logits.shape[-1]))
    return TokenLogprobs(chosen - normalizer, top, top_logits - normalizer[..., None])


class _Loop(NamedTuple):
    step: Array
    cache: Cache
    alive: Array
    output: BlockOutput


@functools.partial(jax.jit, donate_argnames="cache", static_argnames="steps")
def decode_block(
    lm: LM, cache: Cache, grammar: Grammar, requests: SlotRequest, *, steps: int
) -> tuple[Cache, BlockOutput]:
    """Every active row generates up to `steps` tokens; returns when all have ended.

    Token number n of a row is drawn with key (its seed, n): neither other rows nor the borders of blocks matter.
    The grammar must be one without memory (`free_text`): its state is not kept from token to token.
    """
    rows = requests.length.shape[0]
    lm = _of_rows(lm, requests.ranks)
    keys = jax.vmap(jax.random.key)(requests.seed)

    def body(loop: _Loop) -> _Loop:
        expected = jax.lax.cond(
            (requests.details & loop.alive).any(),
            lambda: _token_logprobs(lm.logits(loop.cache.hidden), jnp.zeros(rows, jnp.int32))[1:],
            lambda: jax.tree.map(lambda x: jnp.zeros_like(x[:, 0]), loop.output.logprobs[1:]),
        )
        cache, completion = generate(
            lm,
            loop.cache,
            jax.vmap(jax.random.fold_in)(keys, requests.generated + loop.step),
            grammar,
            max_tokens=1,
            limits=Limits(jnp.int32(1), jnp.int32(0)),
            temperature=requests.temperature,
            active=loop.alive,
            truncation=Truncation(top_p=requests.top_p),
        )
        output = _record(loop, completion.tokens[:, 0], completion.raw_logprob[:, 0], completion.stopped, expected)
        alive = loop.alive & ~output.stopped & (output.count < requests.limit)
        return _Loop(loop.step + 1, cache, alive, output)

    start = dataclasses.replace(cache, length=requests.length)
    first = _Loop(jnp.int32(0), start, requests.active & (requests.limit > 0), _empty_output(rows, steps, lm))
    last = jax.lax.while_loop(lambda loop: (loop.step < steps) & loop.alive.any(), body, first)
    return last.cache, last.output


def _empty_output(rows: int, steps: int, lm: LM) -> BlockOutput:
    zeros = functools.partial(jnp.zeros, dtype=jnp.int32)
    return BlockOutput(zeros((rows, steps)), zeros(rows), zeros(rows) > 0, _no_logprobs(lm, rows, steps))


def _no_logprobs(lm: LM, *shape: int) -> TokenLogprobs:
    top = (*shape, min(TOP, lm.model.config.vocab_size))
    return TokenLogprobs(jnp.zeros(shape, jnp.float32), jnp.zeros(top, jnp.int32), jnp.zeros(top, jnp.float32))


def _record(loop: _Loop, token: Array, raw: Array, stopped: Array, expected: tuple[Array, Array]) -> BlockOutput:
    output, at = loop.output, loop.step
    put = lambda array, value: array.at[:, at].set(value)  # noqa: E731
    return BlockOutput(
        tokens=put(output.tokens, token),
        count=output.count + loop.alive,
        stopped=output.stopped | stopped,
        logprobs=TokenLogprobs(
            put(output.logprobs.logprob, raw),
            put(output.logprobs.top, expected[0]),
            put(output.logprobs.top_logprob, expected[1]),
        ),
    )


@functools.partial(jax.jit, static_argnames=("rows", "capacity"))
def empty_cache(lm: LM, rows: int, capacity: int) -> Cache:
    """The KV cache of a server before any request."""
    return init_cache(lm, rows, capacity)


def compiled() -> int:
    """Programs compiled in this process so far: a server in service adds none."""
    jitted: tuple[Any, ...] = (prefill, prefill_and_score, decode_block)
    return sum(program._cache_size() for program in jitted)
