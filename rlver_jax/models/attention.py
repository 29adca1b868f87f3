"""Grouped-query attention over causal, branched rows: a dense and a query-chunked implementation, equal in result.

Visibility (packed dialogues): query at slot i sees key at slot j iff j <= i and the query's branch is the key's or
grows from it. Everything grows from branch 0, the canonical history; thoughts are the multiples of `BRANCH_RADIX`. From
a thought, or from the history itself, grow twigs, multiples of `TWIG_RADIX` beyond it (what the options of a choice
begin with), and from a twig, 1, 2, … beyond it, its leaves (how they go on). So what grows from a branch are the ids
from its own up to its next sister's. Without branches this is plain causal attention. Padding needs no mask: it lies
after every valid token of its row. Where dialogues share a row, a query sees keys of its own segment only.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlver_jax.models.precision import accum_dtype, matmul_options
from rlver_jax.models.rope import Frequencies

TWIG_RADIX = 64  # leaves of one twig, the twig itself included
BRANCH_RADIX = 64 * TWIG_RADIX  # what may grow from one branch, the branch itself included
BLOCK, MOST_BLOCKS = 128, 8  # slots of a cache that are read at a time, at least; how often, at most
PARTS = 8  # of a row without a cache, at most: each is compiled, so their number decides how long that takes
MASKED = -1e30  # finite, so that a padding row that sees nothing is garbage but never NaN


class AttentionMask(NamedTuple):
    """Which keys each query may see."""

    q_slot: Int[Array, "B Q"] | None  # slot of each query among the keys; None: query i is slot i (no cache)
    q_branch: Int[Array, "B Q"] | None = None  # None: every token is canonical
    k_branch: Int[Array, "B C"] | None = None
    filled: Int[Array, ""] | None = None  # slots from here on are seen by no query; None: not known
    q_segment: Int[Array, "B Q"] | None = None  # dialogue of each query; None: a row is one dialogue
    k_segment: Int[Array, "B C"] | None = None
    blocks: Any = None  # the same in blocks, for `splash`


def visible(see: AttentionMask, num_keys: int, first: Int[Array, ""] | int = 0) -> Array:
    """Boolean mask [B, Q, C] of the C keys from slot `first` on, to which k_branch and k_segment belong."""
    slots = jnp.arange(num_keys)[None] if see.q_slot is None else see.q_slot
    mask = (first + jnp.arange(num_keys))[None, None, :] <= slots[:, :, None]
    if see.k_branch is not None and see.q_branch is not None:
        query = see.q_branch[:, :, None]
        mask &= (query >= see.k_branch[:, None, :]) & (query < _next_sister(see.k_branch)[:, None, :])
    if see.k_segment is not None and see.q_segment is not None:
        mask &= see.k_segment[:, None, :] == see.q_segment[:, :, None]
    return mask


def _next_sister(branch: Int[Array, "B C"]) -> Int[Array, "B C"]:
    """The first id beyond those that grow from a branch."""
    reach = jnp.where(branch % TWIG_RADIX > 0, 1, jnp.where(branch % BRANCH_RADIX > 0, TWIG_RADIX, BRANCH_RADIX))
    return jnp.where(branch == 0, jnp.iinfo(branch.dtype).max, branch + reach)


def dense_attention(
    q: Float[Array, "B Q H hd"], k: Float[Array, "B K C hd"], v: Float[Array, "B K C hd"], see: AttentionMask
) -> Float[Array, "B Q H hd"]:
    """softmax(q k^T / sqrt(hd)) v with scores and softmax in float32; H/K query heads share a key head.

    Of a cache only the blocks that hold `see.filled` slots are read.
    """
    if see.filled is None or k.shape[2] < 2 * BLOCK:
        return _attend(q, k, v, see)
    return _in_blocks(q, k, v, see, see.filled)


def _in_blocks(q: Array, k: Array, v: Array, see: AttentionMask, filled: Int[Array, ""]) -> Array:
    """`dense_attention` over the filled slots, a block at a time, with the running softmax of arXiv 1805.02867.

    A block is small enough to be copied into a core's own memory; a part of the cache of any size could not be read
    without a copy of it.
    """
    b, length, heads, dim = q.shape
    kv_heads, slots = k.shape[1:3]
    size = -(-slots // (MOST_BLOCKS * BLOCK)) * BLOCK
    dtype = accum_dtype(q.dtype)

    def block(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        highest, total, out = carry
        first = jnp.minimum(i * size, slots - size)  # the last block begins earlier, where `size` doesn't divide
        keys, values = (jax.lax.dynamic_slice_in_dim(x, first, size, axis=2) for x in (k, v))
        branch = None if see.k_branch is None else jax.lax.dynamic_slice_in_dim(see.k_branch, first, size, axis=1)
        mask = visible(see._replace(k_branch=branch), size, first) & (first + jnp.arange(size) >= i * size)
        scores = _scores(q, keys, mask)
        new = jnp.maximum(highest, scores.max(axis=-1))
        weights, kept = jnp.exp(scores - new[..., None]), jnp.exp(highest - new)
        return new, total * kept + weights.sum(axis=-1), out * kept[..., None] + _read(weights, values)

    shape = (b, kv_heads, heads // kv_heads, length)
    start = (jnp.full(shape, MASKED, dtype), jnp.zeros(shape, dtype), jnp.zeros((*shape, dim), dtype))
    _, total, out = jax.lax.fori_loop(0, -(-filled // size), block, start)
    return _rows(out / total[..., None], q)


def _attend(q: Array, k: Array, v: Array, see: AttentionMask) -> Array:
    """`dense_attention` over all keys at once."""
    weights = jax.nn.softmax(_scores(q, k, visible(see, k.shape[2])), axis=-1)
    return _rows(_read(weights, v), q)


def _scores(q: Array, k: Array, mask: Array) -> Array:
    """[B, K, H/K, Q, C] in float32; MASKED where a query doesn't see a key."""
    b, length, heads, dim = q.shape
    grouped = q.reshape(b, length, k.shape[1], heads // k.shape[1], dim)
    scores = jnp.einsum("bqkgd,bkcd->bkgqc", grouped, k, **matmul_options(q.dtype)) * dim**-0.5
    return jnp.where(mask[:, None, None], scores, MASKED)


def _read(weights: Array, v: Array) -> Array:
    """Values [B, K, H/K, Q, hd] by weights as `_scores` has them."""
    return jnp.einsum("bkgqc,bkcd->bkgqd", weights.astype(v.dtype), v, **matmul_options(v.dtype))


def _rows(out: Array, q: Array) -> Array:
    """What `_read` has found, as queries are laid out, and in their dtype.

    Transposed after the product: XLA's CPU backend has no bfloat16 product with the batch axes in that order.
    """
    return jnp.moveaxis(out, 3, 1).reshape(q.shape).astype(q.dtype)


def _up_to(end: int, see: AttentionMask) -> AttentionMask:
    """Without the keys from `end` on."""
    branch, segment = (None if x is None else x[:, :end] for x in (see.k_branch, see.k_segment))
    return see._replace(k_branch=branch, k_segment=segment)


def chunked_attention(
    q: Float[Array, "B Q H hd"],
    k: Float[Array, "B K C hd"],
    v: Float[Array, "B K C hd"],
    see: AttentionMask,
    chunk: int,
) -> Float[Array, "B Q H hd"]:
    """`dense_attention` in chunks of queries, recomputed in the backward pass: [B, H, chunk, C] scores at a time.

    Keys after the last query of a chunk, or of its part of the row, are left out: nearly half of the products.
    """
    length = q.shape[1]
    if length <= chunk:
        return dense_attention(q, k, v, see)
    if see.q_slot is not None:
        return _chunks(q, k, v, see, chunk)
    size = -(-length // (chunk * PARTS)) * chunk
    outs = []
    for start in range(0, length, size):
        end = min(start + size, length)
        slots = jnp.broadcast_to(jnp.arange(start, end), (q.shape[0], end - start))
        q_branch, q_segment = (None if x is None else x[:, start:end] for x in (see.q_branch, see.q_segment))
        part = _up_to(end, see)._replace(q_slot=slots, q_branch=q_branch, q_segment=q_segment)
        outs.append(_chunks(q[:, start:end], k[:, :, :end], v[:, :, :end], part, chunk))
    return jnp.concatenate(outs, axis=1)


def _chunks(q: Array, k: Array, v: Array, see: AttentionMask, chunk: int) -> Array:
    """One chunk of queries after the other, each against all keys given."""
    pad = -q.shape[1] % chunk
    assert see.q_slot is not None  # the caller has given every query its slot
    labels = (None if x is None else _split(x, chunk, pad) for x in (see.q_branch, see.q_segment))
    pieces = (_split(q, chunk, pad), _split(see.q_slot, chunk, pad), *labels)

    @jax.checkpoint
    def one(piece: tuple[Array, Array, Array | None, Array | None]) -> Array:
        q_piece, slot, branch, segment = piece
        filled = None if see.filled is None else slot.max() + 1
        part = see._replace(q_slot=slot, q_branch=branch, q_segment=segment, filled=filled)
        return dense_attention(q_piece, k, v, part)

    out = jnp.moveaxis(jax.lax.map(one, pieces), 0, 1)
    return out.reshape(q.shape[0], -1, *q.shape[2:])[:, : q.shape[1]]


def _split(x: Array, chunk: int, pad: int) -> Array:
    """[B, Q, ...] -> [count, B, chunk, ...], padded at the end."""
    x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)


def rotate(x: Float[Array, "B S N hd"], positions: Int[Array, "B S"], rope: Frequencies) -> Float[Array, "B S N hd"]:
    """Rotary position embedding in float32 (arXiv 2104.09864, the half-split layout of Hugging Face)."""
    angle = positions.astype(accum_dtype(x.dtype))[:, :, None, None] * rope.inverse
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if rope.scale != 1:
        cos, sin = cos * rope.scale, sin * rope.scale
    x1, x2 = jnp.split(x.astype(accum_dtype(x.dtype)), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)
