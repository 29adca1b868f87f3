"""Log-probabilities of given tokens without a [B, L, V] array: the vocabulary in chunks, recomputed backward."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlver_jax.models.precision import accum_dtype, matmul_options
from rlver_jax.parallel import rules


class TokenLogprobs(NamedTuple):
    """Per position: log p(target), and the entropy of p in nats; both float32."""

    logprob: Float[Array, "*b"]
    entropy: Float[Array, "*b"]


class Forbidden(NamedTuple):
    """Tokens that a grammar rules out: in state s, those of table[s]. The rest shares all of the probability."""

    table: Bool[Array, "N V"]
    state: Int[Array, "*b"]  # of each position


class _Static(NamedTuple):
    """What `token_logprobs` is compiled for."""

    chunk: int
    temperature: float
    vocab_shards: int


def token_logprobs(
    hidden: Float[Array, "*b D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "*b"],
    *,
    chunk: int = 8192,
    temperature: float = 1.0,
    vocab_shards: int = 1,
    forbidden: Forbidden | None = None,
) -> TokenLogprobs:
    """log softmax(hidden head^T / temperature)[target] and its entropy, `chunk` logits a position at a time.

    Differentiable in `hidden` and `head` through both results; the backward pass recomputes each chunk. Products
    accumulate in float32.

    Args:
        hidden: final hidden states; any leading shape.
        head: output projection, the tied embedding or `lm_head`.
        targets: int32 ids below V.
        chunk: logits per position at a time (per vocabulary shard); V need not be a multiple of it.
        temperature: of the distribution, > 0.
        vocab_shards: devices over which the rows of `head` are split (`rules.parts("vocab")`): chunks are then cut
            inside each shard, so no device needs another one's rows.
        forbidden: what the sampler's grammar left out, so that the result belongs to the distribution really sampled;
            a forbidden target's log-probability is -log of the allowed mass (its logit counts as 0): mask it out.
    """
    vocab_size = head.shape[0]
    if vocab_size % vocab_shards:
        raise ValueError(f"head has {vocab_size} rows, which {vocab_shards} vocabulary shards do not divide")
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be above 0; greedy decoding has no log-probabilities")
    static = _Static(min(chunk, vocab_size // vocab_shards), float(temperature), vocab_shards)
    flat = hidden.reshape(-1, hidden.shape[-1])
    if forbidden is not None:
        forbidden = Forbidden(forbidden.table, forbidden.state.reshape(-1))
    logprob, entropy = _chunked(static, flat, head, targets.reshape(-1), forbidden)
    return TokenLogprobs(logprob.reshape(targets.shape), entropy.reshape(targets.shape))


def log_normalizer(
    hidden: Float[Array, "*b D"], head: Float[Array, "V D"], *, chunk: int = 8192, vocab_shards: int = 1
) -> Float[Array, "*b"]:
    """log sum_v exp(hidden . head_v), float32, in chunks of the vocabulary; not differentiable (for sampling)."""
    hidden = rules.constrain(hidden, "mlp_batch", *("length",) * (hidden.ndim - 2), "activation")
    flat = hidden.reshape(-1, hidden.shape[-1])
    static = _Static(min(chunk, head.shape[0] // vocab_shards), 1.0, vocab_shards)
    _, (_, _, _, _, normalizer, _) = _forward(static, flat, head, jnp.zeros(flat.shape[:1], jnp.int32), None)
    return normalizer.reshape(hidden.shape[:-1])


def _num_chunks(static: _Static, vocab_size: int) -> int:
    return -(-(vocab_size // static.vocab_shards) // static.chunk)


def _chunk_logits(
    static: _Static, hidden: Array, head: Array, forbidden: Forbidden | None, i: Array
) -> tuple[Array, Array, Array, Array]:
    """Chunk i: (logits [N, T, C] float32, kernel [T, C, D] like hidden, ids [T, C], start in its shard).

    The last chunk is moved back to stay inside the shard; the rows it shares with the one before get logits of -inf,
    as forbidden tokens do.
    """
    shards, shard_size = static.vocab_shards, head.shape[0] // static.vocab_shards
    start = jnp.minimum(i * static.chunk, shard_size - static.chunk)
    split = head.reshape(shards, shard_size, head.shape[1])
    kernel = jax.lax.dynamic_slice_in_dim(split, start, static.chunk, axis=1).astype(hidden.dtype)
    kernel = rules.constrain(kernel, "vocab", None, None)  # of the head, a chunk at a time is gathered over `fsdp`
    logits = jnp.einsum("nd,tcd->ntc", hidden, kernel, **matmul_options(hidden.dtype))
    logits = rules.constrain(logits, "mlp_batch", "vocab", None)
    local = start + jnp.arange(static.chunk)
    ids = jnp.arange(shards)[:, None] * shard_size + local
    allowed = jnp.broadcast_to(local >= i * static.chunk, (1, *ids.shape))
    if forbidden is not None:
        table = forbidden.table.reshape(-1, shards, shard_size)
        allowed &= ~jax.lax.dynamic_slice_in_dim(table, start, static.chunk, axis=2)[forbidden.state]
    return jnp.where(allowed, logits / static.temperature, -jnp.inf), kernel, ids, start


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(
    static: _Static, hidden: Array, head: Array, targets: Array, forbidden: Forbidden | None
) -> tuple[Array, Array]:
    return _forward(static, hidden, head, targets, forbidden)[0]


def _forward(static: _Static, hidden: Array, head: Array, targets: Array, forbidden: Forbidden | None):
    def body(i, carry):
        top, total, weighted, chosen = carry  # running max, sum e^(l-max), sum e^(l-max) l, target's logit
        logits, _, ids, _ = _chunk_logits(static, hidden, head, forbidden, i)
        new_top = jnp.maximum(top, logits.max((1, 2)))
        weights = jnp.exp(logits - new_top[:, None, None])
        scale = jnp.exp(top - new_top)
        finite = jnp.where(weights > 0, logits, 0.0)  # 0 * -inf would be NaN
        total = total * scale + weights.sum((1, 2))
        weighted = weighted * scale + (weights * finite).sum((1, 2))
        hit = (ids == targets[:, None, None]) & (logits > -jnp.inf)
        return new_top, total, weighted, chosen + jnp.where(hit, logits, 0.0).sum((1, 2))

    zeros = jnp.zeros(targets.shape, accum_dtype(hidden.dtype))
    # A finite start: a chunk that is forbidden as a whole would make -inf - -inf.
    carry = (jnp.full_like(zeros, -1e30), zeros, zeros, zeros)
    top, total, weighted, chosen = jax.lax.fori_loop(0, _num_chunks(static, head.shape[0]), body, carry)
    normalizer = top + jnp.log(total)
    entropy = normalizer - weighted / total
    return (chosen - normalizer, entropy), (hidden, head, targets, forbidden, normalizer, entropy)


def _backward(static: _Static, saved, cotangents):
    hidden, head, targets, forbidden, normalizer, entropy = saved
    d_logprob, d_entropy = (x[:, None, None] for x in cotangents)
    shards, shard_size = static.vocab_shards, head.shape[0] // static.vocab_shards

    def body(i, carry):
        d_hidden, d_head = carry
        logits, kernel, ids, start = _chunk_logits(static, hidden, head, forbidden, i)
        log_p = logits - normalizer[:, None, None]
        p = jnp.exp(log_p)
        log_p = jnp.where(p > 0, log_p, 0.0)
        hit = (ids == targets[:, None, None]) & (logits > -jnp.inf)
        # d log p(t) / d l = 1[t] - p,   d H / d l = -p (log p + H)
        d_logits = d_logprob * (hit - p) - d_entropy * p * (log_p + entropy[:, None, None])
        d_logits = (d_logits / static.temperature).astype(hidden.dtype)
        d_hidden += jnp.einsum("ntc,tcd->tnd", d_logits, kernel, **matmul_options(hidden.dtype))
        # As one matrix: XLA's CPU compiler would write a transposed copy of three axes before it multiplies.
        d_kernel = jnp.einsum(
            "nk,nd->kd", d_logits.reshape(hidden.shape[0], -1), hidden, **matmul_options(hidden.dtype)
        )
        old = jax.lax.dynamic_slice_in_dim(d_head, start, static.chunk, axis=1)
        new = (old.astype(d_kernel.dtype) + d_kernel.reshape(kernel.shape)).astype(d_head.dtype)
        return d_hidden, jax.lax.dynamic_update_slice_in_dim(d_head, new, start, axis=1)

    # Each shard's part of d_hidden is added up by itself: they are summed over devices once, not for every chunk.
    d_hidden = rules.constrain(
        jnp.zeros((shards, *hidden.shape), accum_dtype(hidden.dtype)), "vocab", "mlp_batch", None
    )
    d_head = rules.constrain(jnp.zeros((shards, shard_size, head.shape[1]), head.dtype), "vocab", None, "embed")
    carry = d_hidden, d_head
    d_hidden, d_head = jax.lax.fori_loop(0, _num_chunks(static, head.shape[0]), body, carry)
    return d_hidden.sum(0).astype(hidden.dtype), d_head.reshape(head.shape), None, None


_chunked.defvjp(_forward, _backward)
