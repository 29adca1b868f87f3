"""Derives a simulated user's appraisals, changes and replies again, from finished dialogues, by teacher forcing.

A dialogue is read as one packed row, in chunks (see `chunks`), all by one program; what lies in whole chunks of the
prefix is read once for all dialogues of a profile. Its turns don't see each other's reasoning. It gives every
distribution that the sampler drew from, so each token can be held against the user's own choice.
"""

import dataclasses
import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from rlver_jax.models.qwen2 import logits
from rlver_jax.sampling.cache import LM, Cache, init_cache, keep_slots
from rlver_jax.sampling.decode import gumbel, score_options
from rlver_jax.text.padding import pad_rows, round_up
from rlver_jax.user.chunks import Chunk, Sizes, chunks_of
from rlver_jax.user.emotion import change_readout, sample_noise
from rlver_jax.user.packed import Packed
from rlver_jax.user.simulated import KEY_READOUT, UserTables, part_keys

QUERY_STEP = 32  # tokens whose whole distributions are held at once
THREADS = 3  # dialogues at a time: the forward passes of a small model leave cores idle, and more so what lies between

S = TypeVar("S")
T = TypeVar("T")


class Rederived(NamedTuple):
    """What the user says itself: for each query and each choice of a packed dialogue."""

    margin: np.ndarray  # [Q] how far the logged token lies below the likeliest (noise added where it was sampled)
    logprob: np.ndarray  # [Q] raw log-probability of the logged token
    change_logprobs: np.ndarray  # [choices, 21]
    change: np.ndarray  # [choices] the readout
    change_noise: np.ndarray  # [choices, 21] with which `sample` takes the likeliest; zeros for other readouts


class Dialogue(NamedTuple):
    """A packed dialogue and what it was played with."""

    packed: Packed
    key: Key[Array, ""]  # of the dialogue, as the sampler folded it


class _Inputs(NamedTuple):
    """A chunk as arrays of one shape for all."""

    keep: Int[Array, "C"]
    held: Int[Array, "1 C"]
    length: Int[Array, "1"]  # slots that are kept
    tokens: Int[Array, "1 W"]
    positions: Int[Array, "1 W"]
    branch: Int[Array, "1 W"]
    queries: Int[Array, "n k 9"]  # (1, query); zeros where there is none
    choices: Int[Array, "c 4"]  # (1, choice); zeros where there is none

    @classmethod
    def of(cls, chunk: Chunk, sizes: Sizes) -> "_Inputs":
        (keep, held), lengths = pad_rows([chunk.keep, chunk.held], sizes.capacity)
        rows, _ = pad_rows(list(chunk.rows), sizes.width)
        queries, choices = (np.insert(x, 0, 1, axis=1) for x in (chunk.queries, chunk.choices))
        asked, _ = pad_rows(list(queries), queries.shape[1], round_up(sizes.width, QUERY_STEP))
        chosen, _ = pad_rows(list(choices), choices.shape[1], sizes.choices)
        groups = asked.reshape(-1, QUERY_STEP, queries.shape[1])
        arrays: Any = (keep, held[None], lengths[:1], *rows[:, None], groups, chosen)  # programs take NumPy's as theirs
        return cls(*arrays)


def rederive(
    lm: LM, tables: UserTables, dialogues: Sequence[Dialogue], temperature: float, readout: str
) -> Iterator[Rederived]:
    """Holds every logged token of the dialogues against the user; one result a dialogue, in their order.

    Those that share a prefix should follow each other: it is then read once.

    Args:
        temperature: of the user's spoken replies; 0: greedy.
    """
    sizes = Sizes.of([dialogue.packed for dialogue in dialogues])
    hold = functools.partial(_hold, lm, tables, temperature=jnp.float32(temperature), readout=readout)

    def tasks() -> Iterator[_Task]:
        known: list[int] | None = None
        empty = cache = _empty(lm, sizes.capacity)
        for packed, key in dialogues:
            chunks, prefix = chunks_of(packed, sizes.width), packed.tokens[: packed.prefix]
            shared = list(itertools.islice(chunks, packed.prefix // sizes.width))
            if prefix != known:
                known, cache = prefix, empty
                for chunk in shared:
                    cache, _ = hold(cache, _Inputs.of(chunk, sizes), key)
            yield _Task(cache, chunks, key)

    def derive(task: _Task) -> Rederived:
        cache, parts = task.prefix, []
        for chunk in task.chunks:
            cache, found = hold(cache, _Inputs.of(chunk, sizes), task.key)
            counts = [len(chunk.queries)] * 2 + [len(chunk.choices)] * 3
            parts.append([np.asarray(x)[:count] for x, count in zip(found, counts, strict=True)])
        return Rederived(*map(np.concatenate, zip(*parts, strict=True)))

    return _side_by_side(derive, tasks())


class _Task(NamedTuple):
    """A dialogue to derive: what its user has read of the prefix, and the chunks that follow."""

    prefix: Cache
    chunks: Iterator[Chunk]
    key: Key[Array, ""]


def _side_by_side(work: Callable[[S], T], items: Iterator[S]) -> Iterator[T]:
    """`map` in THREADS threads, a little ahead of what is asked for."""
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@functools.partial(jax.jit, static_argnums=1, keep_unused=True)
def _empty(lm: LM, capacity: int) -> Cache:
    """Nothing read. A program's result and committed to the model's device, as all later caches are: `_hold` would be
    compiled once more for another kind of array.
    """
    return init_cache(lm, 1, capacity)


@functools.partial(jax.jit, static_argnames="readout")
def _hold(
    lm: LM,
    tables: UserTables,
    cache: Cache,
    chunk: _Inputs,
    key: Key[Array, ""],
    temperature: Float[Array, ""],
    *,
    readout: str,
) -> tuple[Cache, tuple[Array, ...]]:
    """The cache with the chunk in it, and the fields of `Rederived` for each of its queries and choices."""
    cache = keep_slots(cache, chunk.keep, chunk.length)
    hidden, kv = lm.read(chunk.tokens, chunk.positions, chunk.branch, cache, chunk.held)
    found = jax.lax.map(
        lambda group: _where_any(lambda: _held(lm, tables, hidden[0], group, key, temperature), group), chunk.queries
    )
    margin, logprob = (x.reshape(-1) for x in found)
    changes = _where_any(lambda: _changes(lm, tables, hidden[0], chunk.choices, key, readout), chunk.choices)
    return dataclasses.replace(cache, kv=kv), (margin, logprob, *changes)


def _where_any(work: Callable[[], tuple[Array, ...]], entries: Int[Array, "k F"]) -> tuple[Array, ...]:
    """What `work` gives; zeros, without the work, if no entry is a real one."""
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(work))
    return jax.lax.cond((entries[:, 0] > 0).any(), work, lambda: nothing)


def _changes(lm: LM, tables: UserTables, hidden: Float[Array, "W D"], choices: Int[Array, "c 4"], key, readout: str):
    """(log p of every change [c, 21], its readout [c] and noise [c, 21]) of the choices of a chunk."""
    _, turn, first, _ = choices.T
    options = tables.options
    # What `choose` computes from a cache: context 0 is the token before the options, which predicts their first ones.
    logprobs = score_options(lm, options, hidden[first[:, None] + options.contexts - 1])
    keys = part_keys(_turn_keys(key, turn), KEY_READOUT, 1)[0] if readout == "sample" else None
    noise = jnp.zeros_like(logprobs) if keys is None else sample_noise(keys)
    return logprobs, change_readout(logprobs, readout, keys), noise


def _held(lm: LM, tables: UserTables, hidden: Float[Array, "W D"], group: Int[Array, "k 9"], key, temperature):
    """(margin, raw log-prob) of QUERY_STEP queries: their whole distributions are held at once."""
    _, place, token, state, part, step, turn, _, spoken = group.T
    scores = logits(lm.params, hidden[place])
    logprob = jnp.take_along_axis(scores, token[:, None], 1)[:, 0] - jax.nn.logsumexp(scores, axis=-1)
    allowed = jnp.where(tables.grammar.forbidden[state], -jnp.inf, scores)
    drawn = (spoken == 1) & (temperature > 0)

    def with_noise() -> Array:
        part_key = jax.vmap(jax.random.fold_in)(_turn_keys(key, turn), part)
        noise = jax.vmap(gumbel, (0, 0, None))(part_key, step, scores.shape[1])
        return jnp.where(drawn[:, None], allowed / jnp.maximum(temperature, 1e-9) + noise, allowed)

    allowed = jax.lax.cond(drawn.any(), with_noise, lambda: allowed)
    return allowed.max(-1) - jnp.take_along_axis(allowed, token[:, None], 1)[:, 0], logprob


def _turn_keys(key: Key[Array, ""], turns: Int[Array, "k"]) -> Key[Array, "k"]:
    """Keys of turns of a dialogue, as the sampler folds them."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, turns)
