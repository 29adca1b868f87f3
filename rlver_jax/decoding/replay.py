"""Teacher-forced replay: recomputes the model's distribution for every token that it generated in finished dialogues.

A dialogue is one packed sequence, prefilled in chunks (see `replay_chunks`) by one program. The chunks of a prefix
are prefilled once for all dialogues that share it. Turns don't see each other's reasoning. The result has every
distribution that the sampler drew from, so each logged token is compared with the model's own choice.
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
from rlver_jax.decoding.choice import Options, score_options
from rlver_jax.decoding.generate import KEEP_ALL, Truncation, borders, gumbel, truncate
from rlver_jax.decoding.grammar import Grammar
from rlver_jax.decoding.replay_chunks import Chunk, Sizes, chunks_of
from rlver_jax.decoding.replay_sequence import ANY_END, DRAWN, GIVEN, OPENING, ReplaySequence
from rlver_jax.models.qwen import logits
from rlver_jax.text.padding import pad_rows, round_up

QUERY_STEP = 32  # tokens whose whole distributions are in memory at once
THREADS = (
    3  # dialogues at a time: the forward passes of a small model leave cores idle, and even more the work between them
)
_SMALLEST = 1e-30  # a margin that is not 0

S = TypeVar("S")
T = TypeVar("T")
# (log p of every option [c, O], keys of the choices' turns [c]) -> readouts, each with c in front
Readout = Callable[[Array, Array], tuple[Array, ...]]


@flax.struct.dataclass
class Sampler:
    """A model and how it is sampled: all that decides its tokens beside the context."""

    lm: LM
    grammar: Grammar
    options: Options | None = None  # of the choices
    readout: Readout | None = flax.struct.field(pytree_node=False, default=None)
    truncation: Truncation = flax.struct.field(pytree_node=False, default=KEEP_ALL)


class Replayed(NamedTuple):
    """The model's own results for each query and each choice of a packed dialogue.

    `margin` is in nats of the model's own distribution: temperature widens the gaps between what it divides.
    """

    margin: np.ndarray  # [Q] how far the logged token lies below the one that the sampler takes; inf: never sampled
    logprob: np.ndarray  # [Q] raw log-probability of the logged token
    sampled: np.ndarray  # [Q, 2] the least and the most that it may be in the distribution sampled; 0 where none was
    choices: tuple[np.ndarray, ...]  # of the readout, with the choices in front


class Keys(NamedTuple):
    """PRNG keys of a dialogue: turns fold their index into the first; the second is of the words before them."""

    dialogue: Key[Array, ""]
    opening: Key[Array, ""]


class ReplayInput(NamedTuple):
    """A packed dialogue, and the keys and temperature that it was played with."""

    sequence: ReplaySequence
    keys: Keys
    temperature: float  # of what was drawn; 0: greedy


class _Inputs(NamedTuple):
    """A chunk as arrays of one shape for all."""

    retained: Int[Array, "C"]
    held: Int[Array, "1 C"]
    length: Int[Array, "1"]  # slots in use
    tokens: Int[Array, "1 W"]
    positions: Int[Array, "1 W"]
    branch: Int[Array, "1 W"]
    queries: Int[Array, "n k 9"]  # (1, query); zeros where there is none
    choices: Int[Array, "c 4"]  # (1, choice); zeros where there is none

    @classmethod
    def of(cls, chunk: Chunk, sizes: Sizes) -> "_Inputs":
        (retained, held), lengths = pad_rows([chunk.retained, chunk.held], sizes.capacity)
        rows, _ = pad_rows(list(chunk.rows), sizes.width)
        queries, choices = (np.insert(x, 0, 1, axis=1) for x in (chunk.queries, chunk.choices))
        padded_queries, _ = pad_rows(list(queries), queries.shape[1], round_up(sizes.width, QUERY_STEP))
        padded_choices, _ = pad_rows(list(choices), choices.shape[1], sizes.choices)
        groups = padded_queries.reshape(-1, QUERY_STEP, queries.shape[1])
        arrays: Any = (
            retained,
            held[None],
            lengths[:1],
            *rows[:, None],
            groups,
            padded_choices,
        )  # jit takes NumPy arrays
        return cls(*arrays)


class _Sampling(NamedTuple):
    """Keys, temperature and tolerance of a dialogue, as arguments of the program."""

    keys: Keys
    temperature: Float[Array, ""]
    tie: Float[Array, ""]


def replay(sampler: Sampler, dialogues: Sequence[ReplayInput], tie: float) -> Iterator[Replayed]:
    """Replays the dialogues: one result each, in their order.

    Dialogues that share a prefix should be neighbours: it is then prefilled once.

    Args:
        tie: nats by which rounding may move two candidates against each other, and so the sets of top-k and top-p.
    """
    sizes = Sizes.of([dialogue.sequence for dialogue in dialogues])
    replay_chunk = functools.partial(_replay_chunk, sampler)

    def tasks() -> Iterator[_Task]:
        last_prefix: list[int] | None = None
        empty = cache = _empty(sampler.lm, sizes.capacity)
        for sequence, keys, temperature in dialogues:
            sampling = _Sampling(keys, np.float32(temperature), np.float32(tie))  # type: ignore[arg-type]
            chunks, whole = chunks_of(sequence, sizes.width), sequence.shared // sizes.width
            shared, prefix = list(itertools.islice(chunks, whole)), sequence.tokens[: whole * sizes.width]
            if prefix != last_prefix:
                last_prefix, cache = prefix, empty
                for chunk in shared:
                    cache, _ = replay_chunk(cache, _Inputs.of(chunk, sizes), sampling)
            yield _Task(cache, chunks, sampling)

    def replay_task(task: _Task) -> Replayed:
        cache, parts = task.prefix, []
        for chunk in task.chunks:
            cache, (queries, choices) = replay_chunk(cache, _Inputs.of(chunk, sizes), task.sampling)
            unpad = lambda arrays, count: [np.asarray(x)[:count] for x in arrays]  # noqa: E731
            parts.append((unpad(queries, len(chunk.queries)), unpad(choices, len(chunk.choices))))
        queries, choices = (
            tuple(map(np.concatenate, zip(*chunks, strict=True))) for chunks in zip(*parts, strict=True)
        )
        margin, logprob, low, high = queries
        return Replayed(margin, logprob, np.stack([low, high], axis=1), choices)

    return _in_threads(replay_task, tasks())


class _Task(NamedTuple):
    """A dialogue to replay: the KV cache of its prefix, and the chunks that follow."""

    prefix: Cache
    chunks: Iterator[Chunk]
    sampling: _Sampling


def _in_threads(work: Callable[[S], T], items: Iterator[S]) -> Iterator[T]:
    """`map` in THREADS threads, a little ahead of the consumer."""
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
    """An empty cache. A program's result and committed to the model's device, as all later caches are: another kind of
    array would compile `_replay_chunk` once more.
    """
    return init_cache(lm, 1, capacity)


@jax.jit
def _replay_chunk(
    sampler: Sampler, cache: Cache, chunk: _Inputs, sampling: _Sampling
) -> tuple[Cache, tuple[tuple[Array, ...], tuple[Array, ...]]]:
    """The cache with the chunk in it, `_query_results` of each query and `_choice_results` of each choice."""
    cache = keep_slots(cache, chunk.retained, chunk.length)
    hidden, kv = sampler.lm.forward(chunk.tokens, chunk.positions, chunk.branch, cache, chunk.held)
    results = jax.lax.map(
        lambda group: _if_any(lambda: _query_results(sampler, hidden[0], group, sampling), group),
        chunk.queries,
    )
    choices: tuple[Array, ...] = ()
    if sampler.options is not None and sampler.readout is not None:
        choices = _if_any(lambda: _choice_results(sampler, hidden[0], chunk.choices, sampling.keys), chunk.choices)
    return dataclasses.replace(cache, kv=kv), (tuple(x.reshape(-1) for x in results), choices)


def _if_any(work: Callable[[], tuple[Array, ...]], entries: Int[Array, "k F"]) -> tuple[Array, ...]:
    """What `work` gives; zeros, without the work, if no entry is a real one."""
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(work))
    return jax.lax.cond((entries[:, 0] > 0).any(), work, lambda: nothing)


def _choice_results(
    sampler: Sampler, hidden: Float[Array, "W D"], choices: Int[Array, "c 4"], keys: Keys
) -> tuple[Array, ...]:
    """The readout of every choice of a chunk."""
    assert sampler.options is not None
    assert sampler.readout is not None
    _, turn, first, _ = choices.T
    # What `choose` computes from a cache: context 0 is the token before the options, which predicts their first ones.
    logprobs = score_options(sampler.lm, sampler.options, hidden[first[:, None] + sampler.options.contexts - 1])
    return sampler.readout(logprobs, _turn_keys(keys, turn))


def _query_results(
    sampler: Sampler, hidden: Float[Array, "W D"], group: Int[Array, "k 9"], sampling: _Sampling
) -> tuple[Array, ...]:
    """(margin, raw log-prob, bounds of the sampled one) of QUERY_STEP queries, all distributions in memory at once."""
    _, previous, token, state, part, step, turn, _, kind = group.T
    scores = logits(sampler.lm.params, hidden[previous])
    token_score = functools.partial(_token_score, sampler.grammar, token, state)
    raw = token_score(scores) - jax.nn.logsumexp(scores, axis=-1)
    allowed = jnp.where(sampler.grammar.forbidden[state], -jnp.inf, scores)
    drawn, temperature = (kind == DRAWN) & (sampling.temperature > 0), jnp.maximum(sampling.temperature, 1e-9)

    def likeliest() -> tuple[Array, ...]:
        return allowed.max(-1) - token_score(allowed), jnp.zeros_like(raw), jnp.zeros_like(raw)

    def sampled() -> tuple[Array, ...]:
        part_keys = jax.vmap(jax.random.fold_in)(_turn_keys(sampling.keys, turn), part)
        keys = jnp.where(turn == OPENING, sampling.keys.opening, part_keys)
        noise = jnp.where(drawn[:, None], jax.vmap(gumbel, (0, 0, None))(keys, step, scores.shape[1]), 0.0)
        scaled = jnp.where(drawn[:, None], allowed / temperature, allowed)
        margin, *bounds = _sampled_results(
            sampler.truncation, token_score, token, scaled, noise, sampling.tie / temperature
        )
        low, high = (jnp.where(drawn, bound, 0.0) for bound in bounds)
        return margin * jnp.where(drawn, jnp.minimum(temperature, 1.0), 1.0), low, high

    margin, low, high = jax.lax.cond(drawn.any(), sampled, likeliest)
    return jnp.where(kind == GIVEN, 0.0, margin), raw, low, high


def _token_score(
    grammar: Grammar, token: Int[Array, "k"], state: Int[Array, "k"], scores: Float[Array, "k V"]
) -> Array:
    """The score of each query's token; of ANY_END the best of those that end the generation."""
    score = jnp.take_along_axis(scores, jnp.maximum(token, 0)[:, None], 1)[:, 0]

    def of_end() -> Array:
        after = grammar.table[state].astype(jnp.int32)
        best = jnp.where((after == grammar.stop) | grammar.matched(after), scores, -jnp.inf).max(-1)
        return jnp.where(token == ANY_END, best, score)

    return jax.lax.cond((token == ANY_END).any(), of_end, lambda: score)


def _sampled_results(
    truncation: Truncation,
    token_score: Callable[[Array], Array],
    token: Int[Array, "k"],
    scores: Float[Array, "k V"],
    noise: Float[Array, "k V"],
    tie: Float[Array, ""],
) -> tuple[Array, Array, Array]:
    """(margin, bounds of the log-probability) of tokens that were drawn with `noise` from log p (not normalized).

    Where rounding decides which tokens top-k and top-p keep, the logged token may be one of them, and no token above it
    need be.
    """
    noisy, score = scores + noise, token_score(scores)
    if truncation == KEEP_ALL:
        logprob = score - jax.nn.logsumexp(scores, axis=-1)
        return noisy.max(-1) - token_score(noisy), logprob, logprob
    surely, perhaps = borders(scores, truncation, tie)
    candidates = jnp.where(truncate(scores, truncation) > -jnp.inf, noisy, -jnp.inf)
    above = jnp.where(surely, noisy, -jnp.inf).max(-1) - token_score(noisy)
    possible = token_score(jnp.where(perhaps, noisy, -jnp.inf)) > -jnp.inf
    tied = jnp.where(possible, jnp.maximum(above, _SMALLEST), jnp.inf)
    margin = jnp.where(candidates.max(-1) == token_score(candidates), 0.0, tied)
    logged = jnp.arange(scores.shape[1]) == token[:, None]
    masses = (jax.nn.logsumexp(jnp.where(mask | logged, scores, -jnp.inf), axis=-1) for mask in (perhaps, surely))
    low, high = (score - mass for mass in masses)
    return margin, low, high


def _turn_keys(keys: Keys, turns: Int[Array, "k"]) -> Key[Array, "k"]:
    """Keys of turns of a dialogue, as the sampler folds them."""
    return jax.vmap(jax.random.fold_in, (None, 0))(keys.dialogue, turns)
