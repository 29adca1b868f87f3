"""Generating tokens for all rows of a batch at once, on the device."""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from rlver_jax.decoding.cache import LM, Cache, append
from rlver_jax.decoding.grammar import Grammar


class Truncation(NamedTuple):
    """Top-k and top-p (static: sorting the vocabulary is compiled only where it is needed)."""

    top_k: int = 0  # 0: all
    top_p: float | Float[Array, "B"] = 1.0  # an array is an argument of the program: each row has its own


KEEP_ALL = Truncation()


@flax.struct.dataclass
class Generated:
    """What each row generated; positions from count[b] on are 0."""

    tokens: Int[Array, "B M"]
    count: Int[Array, "B"]  # the stop token included
    logprob: Float[Array, "B M"]  # of the distribution really sampled; 0 for greedy
    raw_logprob: Float[Array, "B M"]  # of the model itself: temperature 1, nothing forbidden
    found_at: Int[Array, "B"]  # index of the token that completed the pattern; -1: none
    stopped: Bool[Array, "B"]  # the last token is a stop token or completed the pattern; False: cut by a limit

    @property
    def text_count(self) -> Int[Array, "B"]:
        """Tokens without the last one where it only ends the text."""
        return self.count - self.stopped


def gumbel(key: Key[Array, ""], step: Int[Array, ""] | int, vocab_size: int) -> Float[Array, "V"]:
    """The noise of one row at one step of a generation: argmax(log p + noise) is a sample of p."""
    return jax.random.gumbel(jax.random.fold_in(key, step), (vocab_size,), jnp.float32)


def truncate(log_p: Float[Array, "B V"], truncation: Truncation) -> Float[Array, "B V"]:
    """-inf for what top-k and top-p leave out; the likeliest token always stays."""
    if truncation.top_k:
        least = jax.lax.top_k(log_p, truncation.top_k)[0][:, -1:]
        log_p = jnp.where(log_p < least, -jnp.inf, log_p)
    if isinstance(truncation.top_p, Array):
        mass = truncation.top_p[:, None]
        cut = lambda: jnp.where(mass < 1, _nucleus(log_p, mass), log_p)  # noqa: E731
        return jax.lax.cond((mass < 1).any(), cut, lambda: log_p)
    return _nucleus(log_p, truncation.top_p) if truncation.top_p < 1 else log_p


def _nucleus(log_p: Float[Array, "B V"], mass: float | Float[Array, "B 1"]) -> Float[Array, "B V"]:
    p = jax.nn.softmax(log_p, axis=-1)
    ordered = jnp.sort(p, axis=-1, descending=True)
    before = jnp.cumsum(ordered, axis=-1) - ordered  # mass of what is likelier
    least = jnp.min(jnp.where(before < mass, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(p < least, -jnp.inf, log_p)


def borders(
    log_p: Float[Array, "B V"], truncation: Truncation, tie: Float[Array, ""]
) -> tuple[Bool[Array, "B V"], Bool[Array, "B V"]]:
    """(What `truncate` keeps, what it may keep) however rounding moves tokens by up to `tie` nats against each other.

    top_p: one for all rows.
    """
    surely = perhaps = jnp.ones(log_p.shape, bool)
    if 0 < truncation.top_k < log_p.shape[1]:
        ranked = jax.lax.top_k(log_p, truncation.top_k + 1)[0]
        surely, perhaps = log_p > ranked[:, -1:] + tie, log_p >= ranked[:, -2:-1] - tie
    if truncation.top_p < 1:
        nuclei = [
            _nucleus_borders(jnp.where(mask, log_p, -jnp.inf), truncation.top_p, tie) for mask in (surely, perhaps)
        ]
        surely &= nuclei[0][0] & nuclei[1][0]
        perhaps &= nuclei[0][1] | nuclei[1][1]
    return surely, perhaps


def _nucleus_borders(log_p: Float[Array, "B V"], mass: float | Array, tie: Array) -> tuple[Array, Array]:
    p = jax.nn.softmax(log_p, axis=-1)
    ordered = jnp.sort(p, axis=-1, descending=True)
    before = jnp.cumsum(ordered, axis=-1) - ordered
    slack = mass * (1 - mass) * tie + 1e-5  # odds move by a factor of exp(tie) at most; sums of V terms are rounded
    first_out = jnp.max(jnp.where(before < mass - slack, 0.0, ordered), axis=-1, keepdims=True)
    last_in = jnp.min(jnp.where(before < mass + slack, ordered, jnp.inf), axis=-1, keepdims=True)
    return p > first_out * jnp.exp(tie), p >= last_in * jnp.exp(-tie)


def draw(
    logits: Float[Array, "B V"],
    keys: Key[Array, "B"],
    step: Int[Array, ""],
    temperature: Float[Array, "*B"],
    truncation: Truncation,
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """One token a row and its log-probability. Temperature 0 is greedy (ties: the lowest id), its log-probability 0."""
    if jnp.ndim(temperature):
        return _draw_each(logits, keys, step, temperature, truncation)

    def sampled() -> tuple[Array, Array]:
        return _sample(logits / temperature, keys, step, truncation)

    return jax.lax.cond(temperature > 0, sampled, lambda: _greedy(logits))


def _draw_each(logits, keys, step, temperature: Float[Array, "B"], truncation: Truncation) -> tuple[Array, Array]:
    """`draw` for rows of temperatures of their own."""

    def mixed() -> tuple[Array, Array]:
        warm = temperature > 0
        drawn = _sample(logits / jnp.where(warm, temperature, 1.0)[:, None], keys, step, truncation)
        greedy = _greedy(logits)
        return jnp.where(warm, drawn[0], greedy[0]), jnp.where(warm, drawn[1], greedy[1])

    return jax.lax.cond((temperature > 0).any(), mixed, lambda: _greedy(logits))


def _sample(logits: Array, keys: Array, step: Array, truncation: Truncation) -> tuple[Array, Array]:
    scaled = truncate(logits, truncation)
    noise = jax.vmap(gumbel, (0, None, None))(keys, step, logits.shape[1])
    token = likeliest(scaled + noise)
    chosen = jnp.take_along_axis(scaled, token[:, None], axis=-1)[:, 0]
    return token, chosen - jax.nn.logsumexp(scaled, axis=-1)


def likeliest(scores: Float[Array, "*b V"]) -> Int[Array, "*b"]:
    """The index of the highest score, of equal ones the first.

    In two passes, a maximum and the least index that has it: XLA's CPU backend does not vectorize `argmax`, nor what is
    computed for it, such as a row's noise.
    """
    positions = jnp.arange(scores.shape[-1], dtype=jnp.int32)
    best = scores == scores.max(axis=-1, keepdims=True)
    return jnp.where(best, positions, scores.shape[-1] - 1).min(axis=-1)


def _greedy(logits: Array) -> tuple[Array, Array]:
    return likeliest(logits), jnp.zeros(logits.shape[0], jnp.float32)


class Limits(NamedTuple):
    """Lengths of a generation, in tokens: arguments, not part of the program."""

    before: Int[Array, "*B"]  # until the pattern is found (or at all, without one)
    after: Int[Array, "*B"]  # after it was found; 0: finding it ends the generation


class _Loop(NamedTuple):
    step: Array
    cache: Cache
    state: Array
    alive: Array
    generated: Generated


def _nothing(batch: int, max_tokens: int) -> Generated:
    """The result before the first step."""
    zeros = jnp.zeros((batch, max_tokens), jnp.float32)
    return Generated(
        tokens=jnp.zeros((batch, max_tokens), jnp.int32),
        count=jnp.zeros(batch, jnp.int32),
        logprob=zeros,
        raw_logprob=zeros,
        found_at=jnp.full(batch, -1, jnp.int32),
        stopped=jnp.zeros(batch, bool),
    )


def generate(
    lm: LM,
    cache: Cache,
    keys: Key[Array, "B"],
    grammar: Grammar,
    *,
    max_tokens: int,
    limits: Limits,
    temperature: Float[Array, "*B"],
    active: Bool[Array, "B"],
    truncation: Truncation = KEEP_ALL,
) -> tuple[Cache, Generated]:
    """Decodes every active row until its grammar or a limit stops it; the loop ends when all rows have.

    The returned cache holds all generated tokens, the last one included. `max_tokens` is the compiled size of the
    result; the limits may be anything up to it. Limits, temperature and top_p are one for all rows, or one for each.
    """
    batch = cache.length.shape[0]

    def body(loop: _Loop) -> _Loop:
        logits = lm.logits(loop.cache.hidden)
        allowed = jnp.where(grammar.forbidden[loop.state], -jnp.inf, logits)
        token, logprob = _force_closing(loop, grammar, limits, *draw(allowed, keys, loop.step, temperature, truncation))
        raw = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)
        state = jnp.where(loop.alive, grammar.table[loop.state, token].astype(jnp.int32), loop.state)
        generated = _record(loop, grammar, token, logprob, raw, state, limits)
        limit = jnp.where(generated.found_at >= 0, generated.found_at + 1 + limits.after, limits.before)
        alive = loop.alive & ~generated.stopped & (generated.count < jnp.minimum(limit, max_tokens))
        cache = append(lm, loop.cache, token[:, None], loop.alive.astype(jnp.int32))
        return _Loop(loop.step + 1, cache, state, alive, generated)

    empty = _nothing(batch, max_tokens)
    start = jnp.full(batch, grammar.begin, jnp.int32)
    first = _Loop(jnp.int32(0), cache, start, active & (jnp.minimum(limits.before, max_tokens) > 0), empty)
    last = jax.lax.while_loop(lambda loop: loop.alive.any(), body, first)
    return last.cache, last.generated


def _force_closing(loop: _Loop, grammar: Grammar, limits: Limits, token: Array, logprob: Array) -> tuple[Array, Array]:
    """Replaces the last tokens before the limit by the grammar's closing, where the pattern has not been found.

    What is not drawn has log-probability 0, as a greedy token has.
    """
    size = grammar.closing.shape[0]
    if not size:
        return token, logprob
    index = loop.generated.count - (limits.before - size)
    forced = (loop.generated.found_at < 0) & (index >= 0)
    return jnp.where(forced, grammar.closing[index], token), jnp.where(forced, 0.0, logprob)


def _record(loop: _Loop, grammar: Grammar, token, logprob, raw, state, limits: Limits) -> Generated:
    """Writes the step's results of the rows that are still alive."""
    generated, alive = loop.generated, loop.alive

    def put(array: Array, value: Array) -> Array:
        return array.at[:, loop.step].set(jnp.where(alive, value, 0).astype(array.dtype))

    newly_matched = alive & grammar.matched(state) & (generated.found_at < 0)
    found_at = jnp.where(newly_matched, loop.step, generated.found_at)
    return Generated(
        tokens=put(generated.tokens, token),
        count=generated.count + alive,
        logprob=put(generated.logprob, logprob),
        raw_logprob=put(generated.raw_logprob, raw),
        found_at=found_at,
        stopped=generated.stopped | (alive & ((state == grammar.stop) | (newly_matched & (limits.after == 0)))),
    )
