"""Holds every token that one side of finished dialogues generated against its model, by teacher forcing.

A dialogue is read as one packed row, in chunks (see `chunks`), all by one program; what lies in whole chunks of the
prefix is read once for all dialogues that share it. Its turns don't see each other's reasoning. It gives every
distribution that the sampler drew from, so each token can be held against the side's own choice.
"""

import dataclasses
import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from rlver_jax.decoding.cache import LM, Cache, init_cache, keep_slots
from rlver_jax.decoding.generate import KEEP_ALL, Options, Truncation, borders, gumbel, score_options, truncate
from rlver_jax.decoding.grammar import Grammar
from rlver_jax.decoding.replay_chunks import Chunk, Sizes, chunks_of
from rlver_jax.decoding.replay_sequence import ANY_END, DRAWN, GIVEN, OPENING, ReplaySequence
from rlver_jax.models.qwen import logits
from rlver_jax.text.padding import pad_rows, round_up

QUERY_STEP = 32  # tokens whose whole distributions are held at once
THREADS = 3  # dialogues at a time: the forward passes of a small model leave cores idle, and more so what lies between
_LEAST = 1e-30  # a margin that is not 0

S = TypeVar("S")
T = TypeVar("T")
# (log p of every option [c, O], keys of the choices' turns [c]) -> what is read out of them, each with c in front
Readout = Callable[[Array, Array], tuple[Array, ...]]


@flax.struct.dataclass
class Side:
    """What decides a side's words beside its context: the model, and how it is sampled."""

    lm: LM
    grammar: Grammar
    options: Options | None = None  # of its choices
    readout: Readout | None = flax.struct.field(pytree_node=False, default=None)
    truncation: Truncation = flax.struct.field(pytree_node=False, default=KEEP_ALL)


class Replayed(NamedTuple):
    """What the model says itself: for each query and each choice of a packed dialogue.

    `margin` is in nats of the model's own distribution: temperature widens the gaps between what it divides.
    """

    margin: np.ndarray  # [Q] how far the logged token lies below the one that the sampler takes; inf: never sampled
    logprob: np.ndarray  # [Q] raw log-probability of the logged token
    sampled: np.ndarray  # [Q, 2] the least and the most that it may be in the distribution sampled; 0 where none was
    choices: tuple[np.ndarray, ...]  # what the side's readout gives, with the choices in front


class Keys(NamedTuple):
    """A dialogue's randomness: what its turns fold their index into, and the key of the words before them."""

    dialogue: Key[Array, ""]
    opening: Key[Array, ""]


class Dialogue(NamedTuple):
    """A packed dialogue and what it was played with."""

    packed: ReplaySequence
    keys: Keys
    temperature: float  # of what was drawn; 0: greedy


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


class _How(NamedTuple):
    """What a dialogue was played with, as arguments of the program."""

    keys: Keys
    temperature: Float[Array, ""]
    tie: Float[Array, ""]


def replay(side: Side, dialogues: Sequence[Dialogue], tie: float) -> Iterator[Replayed]:
    """Holds every logged token of the dialogues against a side; one result a dialogue, in their order.

    Those that share a prefix should follow each other: it is then read once.

    Args:
        tie: nats by which rounding may move two candidates against each other: what top-k and top-p keep may differ
            by as much.
    """
    sizes = Sizes.of([dialogue.packed for dialogue in dialogues])
    hold = functools.partial(_hold, side)

    def tasks() -> Iterator[_Task]:
        known: list[int] | None = None
        empty = cache = _empty(side.lm, sizes.capacity)
        for packed, keys, temperature in dialogues:
            how = _How(keys, np.float32(temperature), np.float32(tie))  # type: ignore[arg-type]
            chunks, whole = chunks_of(packed, sizes.width), packed.shared // sizes.width
            shared, prefix = list(itertools.islice(chunks, whole)), packed.tokens[: whole * sizes.width]
            if prefix != known:
                known, cache = prefix, empty
                for chunk in shared:
                    cache, _ = hold(cache, _Inputs.of(chunk, sizes), how)
            yield _Task(cache, chunks, how)

    def derive(task: _Task) -> Replayed:
        cache, parts = task.prefix, []
        for chunk in task.chunks:
            cache, (asked, chosen) = hold(cache, _Inputs.of(chunk, sizes), task.how)
            cut = lambda found, count: [np.asarray(x)[:count] for x in found]  # noqa: E731
            parts.append((cut(asked, len(chunk.queries)), cut(chosen, len(chunk.choices))))
        asked, chosen = (tuple(map(np.concatenate, zip(*some, strict=True))) for some in zip(*parts, strict=True))
        margin, logprob, low, high = asked
        return Replayed(margin, logprob, np.stack([low, high], axis=1), chosen)

    return _side_by_side(derive, tasks())


class _Task(NamedTuple):
    """A dialogue to derive: what its side has read of the prefix, and the chunks that follow."""

    prefix: Cache
    chunks: Iterator[Chunk]
    how: _How


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


@jax.jit
def _hold(
    side: Side, cache: Cache, chunk: _Inputs, how: _How
) -> tuple[Cache, tuple[tuple[Array, ...], tuple[Array, ...]]]:
    """The cache with the chunk in it, what `_held` gives for each of its queries and `_chosen` for its choices."""
    cache = keep_slots(cache, chunk.keep, chunk.length)
    hidden, kv = side.lm.read(chunk.tokens, chunk.positions, chunk.branch, cache, chunk.held)
    found = jax.lax.map(
        lambda group: _where_any(lambda: _held(side, hidden[0], group, how), group),
        chunk.queries,
    )
    chosen: tuple[Array, ...] = ()
    if side.options is not None and side.readout is not None:
        chosen = _where_any(lambda: _chosen(side, hidden[0], chunk.choices, how.keys), chunk.choices)
    return dataclasses.replace(cache, kv=kv), (tuple(x.reshape(-1) for x in found), chosen)


def _where_any(work: Callable[[], tuple[Array, ...]], entries: Int[Array, "k F"]) -> tuple[Array, ...]:
    """What `work` gives; zeros, without the work, if no entry is a real one."""
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(work))
    return jax.lax.cond((entries[:, 0] > 0).any(), work, lambda: nothing)


def _chosen(side: Side, hidden: Float[Array, "W D"], choices: Int[Array, "c 4"], keys: Keys) -> tuple[Array, ...]:
    """The readout of every choice of a chunk."""
    assert side.options is not None
    assert side.readout is not None
    _, turn, first, _ = choices.T
    # What `choose` computes from a cache: context 0 is the token before the options, which predicts their first ones.
    logprobs = score_options(side.lm, side.options, hidden[first[:, None] + side.options.contexts - 1])
    return side.readout(logprobs, _turn_keys(keys, turn))


def _held(side: Side, hidden: Float[Array, "W D"], group: Int[Array, "k 9"], how: _How) -> tuple[Array, ...]:
    """Margin, raw log-prob, and the bounds of the sampled one, of QUERY_STEP queries: their whole distributions are
    held at once.
    """
    _, place, token, state, part, step, turn, _, kind = group.T
    scores = logits(side.lm.params, hidden[place])
    own = functools.partial(_own, side.grammar, token, state)
    raw = own(scores) - jax.nn.logsumexp(scores, axis=-1)
    allowed = jnp.where(side.grammar.forbidden[state], -jnp.inf, scores)
    drawn, heat = (kind == DRAWN) & (how.temperature > 0), jnp.maximum(how.temperature, 1e-9)

    def likeliest() -> tuple[Array, ...]:
        return allowed.max(-1) - own(allowed), jnp.zeros_like(raw), jnp.zeros_like(raw)

    def sampled() -> tuple[Array, ...]:
        part_keys = jax.vmap(jax.random.fold_in)(_turn_keys(how.keys, turn), part)
        keys = jnp.where(turn == OPENING, how.keys.opening, part_keys)
        noise = jnp.where(drawn[:, None], jax.vmap(gumbel, (0, 0, None))(keys, step, scores.shape[1]), 0.0)
        scaled = jnp.where(drawn[:, None], allowed / heat, allowed)
        margin, *bounds = _drawn(side.truncation, own, token, scaled, noise, how.tie / heat)
        low, high = (jnp.where(drawn, bound, 0.0) for bound in bounds)
        return margin * jnp.where(drawn, jnp.minimum(heat, 1.0), 1.0), low, high

    margin, low, high = jax.lax.cond(drawn.any(), sampled, likeliest)
    return jnp.where(kind == GIVEN, 0.0, margin), raw, low, high


def _own(grammar: Grammar, token: Int[Array, "k"], state: Int[Array, "k"], scores: Float[Array, "k V"]) -> Array:
    """The score of each query's token; of ANY_END the best of those that end the generation."""
    own = jnp.take_along_axis(scores, jnp.maximum(token, 0)[:, None], 1)[:, 0]

    def of_end() -> Array:
        after = grammar.table[state].astype(jnp.int32)
        best = jnp.where((after == grammar.stop) | grammar.found(after), scores, -jnp.inf).max(-1)
        return jnp.where(token == ANY_END, best, own)

    return jax.lax.cond((token == ANY_END).any(), of_end, lambda: own)


def _drawn(
    truncation: Truncation,
    own: Callable[[Array], Array],
    token: Int[Array, "k"],
    scores: Float[Array, "k V"],
    noise: Float[Array, "k V"],
    tie: Float[Array, ""],
) -> tuple[Array, Array, Array]:
    """(margin, bounds of the log-probability) of tokens that were drawn with `noise` from log p (not normalized).

    Where rounding decides whether a token is among those that are kept, the token may be one of them, and none that
    lies above it need be.
    """
    noisy, whole = scores + noise, own(scores)
    if truncation == KEEP_ALL:
        logprob = whole - jax.nn.logsumexp(scores, axis=-1)
        return noisy.max(-1) - own(noisy), logprob, logprob
    surely, perhaps = borders(scores, truncation, tie)
    kept = jnp.where(truncate(scores, truncation) > -jnp.inf, noisy, -jnp.inf)
    above = jnp.where(surely, noisy, -jnp.inf).max(-1) - own(noisy)
    may = own(jnp.where(perhaps, noisy, -jnp.inf)) > -jnp.inf
    tied = jnp.where(may, jnp.maximum(above, _LEAST), jnp.inf)
    margin = jnp.where(kept.max(-1) == own(kept), 0.0, tied)
    mine = jnp.arange(scores.shape[1]) == token[:, None]
    masses = (jax.nn.logsumexp(jnp.where(mask | mine, scores, -jnp.inf), axis=-1) for mask in (perhaps, surely))
    low, high = (whole - mass for mass in masses)
    return margin, low, high


def _turn_keys(keys: Keys, turns: Int[Array, "k"]) -> Key[Array, "k"]:
    """Keys of turns of a dialogue, as the sampler folds them."""
    return jax.vmap(jax.random.fold_in, (None, 0))(keys.dialogue, turns)
