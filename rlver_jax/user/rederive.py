"""Derives a simulated user's appraisals, changes and replies again, from finished dialogues, by teacher forcing.

The prefix is read once for all dialogues of a profile, as the sampler does, and the plain messages once for a dialogue.
Every turn's reasoning then is a row behind the messages before it, so that no turn looks through the reasoning of
others; rows of any turns and dialogues share a forward pass. It gives every distribution that the sampler drew from, so
each token can be held against the user's own choice.
"""

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from rlver_jax.models.qwen2 import logits
from rlver_jax.sampling.cache import LM, Cache, append, concatenate_rows, init_cache, repeat_rows, rollback
from rlver_jax.sampling.decode import gumbel, score_options
from rlver_jax.text.padding import pad_rows, round_up
from rlver_jax.user.emotion import change_readout, sample_noise
from rlver_jax.user.packed import Packed, Query, Row, rows_of
from rlver_jax.user.simulated import KEY_READOUT, UserTables, part_keys

LENGTH_STEP = 32  # what is read is padded to multiples of it
QUERY_STEP = 32  # tokens whose whole distributions are held at once
THREADS = 2  # forward passes at a time: those of a small model leave cores idle
TURN_TOKENS = 512  # of turns that are read together, at least: enough for the weights' products

S = TypeVar("S")
T = TypeVar("T")


class Rederived(NamedTuple):
    """What the user says itself: for each query and each choice of a packed dialogue."""

    margin: np.ndarray  # [Q] how far the logged token lies below the likeliest (noise added where it was sampled)
    logprob: np.ndarray  # [Q] raw log-probability of the logged token
    change_logprobs: np.ndarray  # [choices, 21]
    change: np.ndarray  # [choices] the readout
    change_noise: np.ndarray  # [choices, 21] with which `sample` takes the likeliest; zeros for other readouts


class Sizes(NamedTuple):
    """Lengths that a log's dialogues are padded to, so that each program compiles once."""

    prefix: int
    history: int
    row: int
    queries: int  # of all rows that are read together
    rows: int

    @classmethod
    def of(cls, prefixes: Iterable[int], dialogues: Iterable[Packed]) -> "Sizes":
        """For prefixes of these lengths and these dialogues."""
        history, row, queries = 0, 0, 0
        for packed in dialogues:
            history = max(history, len(packed.history))
            for span in packed.spans:
                row = max(row, 1 + span.tokens.stop - span.tokens.start)
                queries = max(queries, span.queries.stop - span.queries.start)
        prefix, history, row = (round_up(n, LENGTH_STEP) for n in (max(prefixes, default=0), history, row))
        rows = -(-TURN_TOKENS // max(row, 1))
        return cls(prefix, history, row, queries * rows, rows)


def read_prefix(lm: LM, prefix: Sequence[int], sizes: Sizes) -> Cache:
    """The user's context before the first turn, to be shared by all dialogues of a profile."""
    return _read_prefix(lm, *pad_rows([prefix], sizes.prefix))


@jax.jit
def _read_prefix(lm: LM, tokens: Int[Array, "1 L"], count: Int[Array, "1"]) -> Cache:
    return append(lm, init_cache(lm, 1, tokens.shape[1]), tokens, count)


@functools.partial(jax.jit, static_argnames="room")
def _read_history(lm: LM, prefix: Cache, tokens: Int[Array, "1 H"], count: Int[Array, "1"], *, room: int) -> Cache:
    """The plain messages behind the prefix, with `room` slots beyond them."""
    return append(lm, repeat_rows(prefix, 1, prefix.capacity + tokens.shape[1] + room), tokens, count)


class Dialogue(NamedTuple):
    """A packed dialogue and what it was played with."""

    prefix: Callable[[], Cache]  # what `read_prefix` made of its profile
    packed: Packed
    key: Key[Array, ""]  # of the dialogue, as the sampler folded it


class _Task(NamedTuple):
    """A row with its dialogue's plain messages, as the user has read them, and its dialogue's key."""

    row: Row
    history: Cache
    key: Key[Array, ""]


def rederive(
    lm: LM, tables: UserTables, dialogues: Sequence[Dialogue], temperature: float, readout: str, sizes: Sizes
) -> Iterator[Rederived]:
    """Holds every logged token of the dialogues against the user; one result a dialogue, in their order.

    Args:
        temperature: of the user's spoken replies; 0: greedy.
    """
    tasks = _tasks(lm, dialogues, sizes)
    batches = iter(lambda: list(itertools.islice(tasks, sizes.rows)), [])
    derive = lambda batch: _derive(lm, tables, batch, temperature, readout, sizes)  # noqa: E731
    done = itertools.chain.from_iterable(_side_by_side(derive, batches))
    for dialogue in dialogues:
        turns = list(itertools.islice(done, len(dialogue.packed.spans)))
        yield Rederived(*(np.concatenate(parts) for parts in zip(*turns, strict=True)))


def _tasks(lm: LM, dialogues: Sequence[Dialogue], sizes: Sizes) -> Iterator[_Task]:
    for prefix, packed, key in dialogues:
        history = packed.history
        read = _read_history(lm, prefix(), *pad_rows([history], sizes.history), room=sizes.row)
        yield from (_Task(row, read, key) for row in rows_of(packed))


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


def _derive(lm: LM, tables: UserTables, batch: list[_Task], temperature, readout, sizes: Sizes) -> list[Rederived]:
    """One result for each of the rows."""
    tasks = batch + batch[:1] * (sizes.rows - len(batch))
    rows = [task.row for task in tasks]
    found = _hold(
        lm,
        tables,
        tuple(task.history for task in tasks),
        pad_rows([row.tokens for row in rows], sizes.row)[0],
        pad_rows([row.positions for row in rows], sizes.row)[0],
        pad_rows([row.branch for row in rows], sizes.row)[0],
        _grouped(rows[: len(batch)], sizes.queries),
        np.array([row.choice for row in rows], np.int32),
        np.array([row.turn for row in rows], np.int32),
        jnp.stack([task.key for task in tasks]),
        jnp.float32(temperature),
        readout=readout,
    )
    margin, logprob, *of_choices = map(np.asarray, found)
    counts = np.cumsum([len(task.row.queries) for task in batch])
    asked = [np.split(x.reshape(-1)[: counts[-1]], counts[:-1]) for x in (margin, logprob)]
    changes = [np.split(x, len(x))[: len(batch)] for x in of_choices]
    return [Rederived(*parts) for parts in zip(*asked, *changes, strict=True)]


def _grouped(rows: Sequence[Row], most: int) -> Int[np.ndarray, "n k 9"]:
    """(row, query) as integers, in groups of QUERY_STEP, padded with zeros."""
    made = np.zeros((round_up(most, QUERY_STEP), 1 + len(Query._fields)), np.int32)
    queries = [(i, *query) for i, row in enumerate(rows) for query in row.queries]
    made[: len(queries)] = queries
    return made.reshape(-1, QUERY_STEP, made.shape[1])


@functools.partial(jax.jit, static_argnames="readout")
def _hold(
    lm: LM,
    tables: UserTables,
    histories: tuple[Cache, ...],
    tokens: Int[Array, "R L"],
    positions: Int[Array, "R L"],
    branch: Int[Array, "R L"],
    queries: Int[Array, "n k 9"],
    choices: Int[Array, "R 2"],
    turns: Int[Array, "R"],
    keys: Key[Array, "R"],
    temperature: Float[Array, ""],
    *,
    readout: str,
):
    """(margin and raw log-prob of every query [n, k]; log p of every change [R, 21], its readout [R] and noise)."""
    cache = rollback(concatenate_rows(histories), positions[:, 0])
    hidden, _ = lm.read(tokens, positions, branch, cache)
    turn_keys = jax.vmap(jax.random.fold_in)(keys, turns)
    margin, logprob = jax.lax.map(lambda group: _held(lm, tables, hidden, group, turn_keys, temperature), queries)
    options = tables.options
    # What `choose` computes from a cache: the token before the options predicts their first ones.
    places = jnp.where(options.contexts == 0, choices[:, :1], choices[:, 1:] + options.contexts - 1)
    change_logprobs = score_options(lm, options, jnp.take_along_axis(hidden, places[..., None], axis=1))
    readout_keys = part_keys(turn_keys, KEY_READOUT, 1)[0] if readout == "sample" else None
    change = change_readout(change_logprobs, readout, readout_keys)
    noise = jnp.zeros_like(change_logprobs) if readout_keys is None else sample_noise(readout_keys)
    return margin, logprob, change_logprobs, change, noise


def _held(lm: LM, tables: UserTables, hidden: Float[Array, "R L D"], group: Int[Array, "k 9"], turn_keys, temperature):
    """(margin, raw log-prob) of QUERY_STEP queries: their whole distributions are held at once."""
    row, place, token, state, part, step, _, _, spoken = group.T
    scores = logits(lm.params, hidden[row, place])
    logprob = jnp.take_along_axis(scores, token[:, None], 1)[:, 0] - jax.nn.logsumexp(scores, axis=-1)
    allowed = jnp.where(tables.grammar.forbidden[state], -jnp.inf, scores)
    drawn = (spoken == 1) & (temperature > 0)

    def with_noise() -> Array:
        part_key = jax.vmap(jax.random.fold_in)(turn_keys[row], part)
        noise = jax.vmap(gumbel, (0, 0, None))(part_key, step, scores.shape[1])
        return jnp.where(drawn[:, None], allowed / jnp.maximum(temperature, 1e-9) + noise, allowed)

    allowed = jax.lax.cond(drawn.any(), with_noise, lambda: allowed)
    return allowed.max(-1) - jnp.take_along_axis(allowed, token[:, None], 1)[:, 0], logprob
