"""Grouped-query attention over causal, branched rows, of whole rows and of what a cache holds.

The attention mask (a tree mask, for packed dialogues): the query at slot i sees the key at slot j iff j <= i and the
key's branch is the query's own or an ancestor of it. The root is branch 0, the canonical history. Thoughts are the
multiples of `BRANCH_RADIX`. A thought, or the history itself, has children at multiples of `CHILD_RADIX` after it (what
the options of a choice begin with); a child has children of its own, 1, 2, … beyond it (how the options continue). So a
branch and its descendants have the ids from its own up to its next sibling's. Without branches this is plain causal
attention. Padding needs no mask: it lies after every valid token of its row. Where dialogues share a row, a query sees
only keys of its own segment.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlver_jax.models.precision import accum_dtype, matmul_options
from rlver_jax.models.rope import Frequencies
from rlver_jax.parallel import rules

CHILD_RADIX = 64  # a child and its own children
BRANCH_RADIX = 64 * CHILD_RADIX  # a branch and its descendants
BLOCK, MOST_BLOCKS = 128, 8  # slots of a cache that are read at a time, at least; how often, at most
MASKED = -1e30  # finite: a padding row that sees nothing is garbage, but never NaN


class AttentionMask(NamedTuple):
    """Which keys each query may see."""

    q_slot: Int[Array, "B Q"] | None  # slot of each query among the keys; None: query i is slot i (no cache)
    q_branch: Int[Array, "B Q"] | None = None  # None: every token is canonical
    k_branch: Int[Array, "B C"] | None = None
    filled: Int[Array, ""] | None = None  # slots from here on are seen by no query; None: not known
    q_segment: Int[Array, "B Q"] | None = None  # dialogue of each query; None: a row is one dialogue
    k_segment: Int[Array, "B C"] | None = None
    blocks: Any = None  # the same in blocks, for `splash`


class PrefixKeys(NamedTuple):
    """Keys and values that neighbouring rows share: query row b sees those of row b // (B / P) before its own keys."""

    k: Float[Array, "P K L hd"]
    v: Float[Array, "P K L hd"]
    length: Int[Array, "P"]  # slots of each that are seen


class _Softmax(NamedTuple):
    """A softmax over some of the keys: it goes on over others (the running softmax of arXiv 1805.02867)."""

    highest: Float[Array, "B K R Q"]  # R = H / K
    total: Float[Array, "B K R Q"]
    out: Float[Array, "B K R Q hd"]


def visible(mask: AttentionMask, num_keys: int, first: Int[Array, ""] | int = 0) -> Array:
    """Boolean mask [B, Q, C] of the C keys from slot `first` on, to which k_branch and k_segment belong."""
    slots = jnp.arange(num_keys)[None] if mask.q_slot is None else mask.q_slot
    seen = (first + jnp.arange(num_keys))[None, None, :] <= slots[:, :, None]
    if mask.k_branch is not None and mask.q_branch is not None:
        query = mask.q_branch[:, :, None]
        seen &= (query >= mask.k_branch[:, None, :]) & (query < _next_sibling(mask.k_branch)[:, None, :])
    if mask.k_segment is not None and mask.q_segment is not None:
        seen &= mask.k_segment[:, None, :] == mask.q_segment[:, :, None]
    return seen


def _next_sibling(branch: Int[Array, "B C"]) -> Int[Array, "B C"]:
    """The first id after a branch and its descendants."""
    reach = jnp.where(branch % CHILD_RADIX > 0, 1, jnp.where(branch % BRANCH_RADIX > 0, CHILD_RADIX, BRANCH_RADIX))
    return jnp.where(branch == 0, jnp.iinfo(branch.dtype).max, branch + reach)


def dense_attention(
    q: Float[Array, "B Q H hd"],
    k: Float[Array, "B K C hd"],
    v: Float[Array, "B K C hd"],
    mask: AttentionMask,
    prefix: PrefixKeys | None = None,
) -> Float[Array, "B Q H hd"]:
    """softmax(q k^T / sqrt(hd)) v with scores and softmax in float32; H/K query heads share a key head.

    Of a cache only the blocks that hold `mask.filled` slots are read. The keys of a `prefix` are read once for all rows
    that share them (arXiv 2402.05099), and the softmax goes on over each row's own.
    """
    if prefix is None and (mask.filled is None or k.shape[2] < 2 * BLOCK):
        return _attend(q, k, v, mask)

    def seen(first: Array, size: int) -> Array:
        branch = None if mask.k_branch is None else jax.lax.dynamic_slice_in_dim(mask.k_branch, first, size, axis=1)
        return visible(mask._replace(k_branch=branch), size, first)

    by_key_head = grouped(q, k.shape[1])
    before = _unread(by_key_head) if prefix is None else _over_prefix(q, prefix)
    filled = k.shape[2] if mask.filled is None else mask.filled
    _, total, out = _in_blocks(by_key_head, k, v, seen, filled, before)
    return ungrouped(out / total[..., None], q)


def grouped(x: Float[Array, "B Q H hd"], kv_heads: int) -> Float[Array, "B K R Q hd"]:
    """Query heads that read the same keys together (R = H / K)."""
    return jnp.moveaxis(x.reshape(*x.shape[:2], kv_heads, -1, x.shape[-1]), 1, 3)


def ungrouped(x: Float[Array, "B K R Q hd"], like: Float[Array, "B Q H hd"]) -> Float[Array, "B Q H hd"]:
    """The inverse, in the dtype of `like`.

    Transposed after products: XLA's CPU backend has no bfloat16 product with the batch axes in that order.
    """
    return jnp.moveaxis(x, 3, 1).reshape(like.shape).astype(like.dtype)


def contract(of: str, x: Array, y: Array) -> Array:
    """An einsum in the dtype of `y`, accumulated in float32."""
    return jnp.einsum(of, x.astype(y.dtype), y, **matmul_options(y.dtype))


def scores(q: Float[Array, "B K R Q hd"], k: Float[Array, "B K C hd"], seen: Bool[Array, "B Q C"]) -> Array:
    """[B, K, R, Q, C] in float32; MASKED where a query doesn't see a key."""
    return jnp.where(seen[:, None, None], contract("bkrqd,bkcd->bkrqc", q, k) * q.shape[-1] ** -0.5, MASKED)


def weighted(weights: Float[Array, "B K R Q C"], v: Float[Array, "B K C hd"]) -> Float[Array, "B K R Q hd"]:
    """Values by weights, which are rounded to the values' dtype."""
    return contract("bkrqc,bkcd->bkrqd", weights, v)


def _unread(q: Float[Array, "B K R Q hd"]) -> _Softmax:
    """Before the first key."""
    dtype = accum_dtype(q.dtype)
    nothing = jnp.zeros(q.shape[:-1], dtype)
    return _Softmax(jnp.full_like(nothing, MASKED), nothing, jnp.zeros(q.shape, dtype))


def _over_prefix(q: Array, prefix: PrefixKeys) -> _Softmax:
    """Over the prefix of each row: the queries of the rows that share one stand together, as those of one row."""
    rows, kv_heads = prefix.k.shape[:2]
    folded = _by_key_head(grouped(q.reshape(rows, -1, *q.shape[2:]), kv_heads))
    length = prefix.length[:, None, None]
    seen = lambda first, size: first + jnp.arange(size) < length  # noqa: E731
    k, v = (x.astype(q.dtype) for x in (prefix.k, prefix.v))
    parts = _in_blocks(folded, k, v, seen, prefix.length.max(), _unread(folded))

    def unfold(x: Array) -> Array:
        x = _by_key_head(x)
        x = _by_key_head(x.reshape(*x.shape[:3], -1, q.shape[1], *x.shape[4:]))
        return _by_key_head(jnp.moveaxis(x, 3, 1).reshape(q.shape[0], kv_heads, -1, q.shape[1], *x.shape[5:]))

    return _Softmax(*map(unfold, parts))


def _by_key_head(x: Float[Array, "B K *rest"]) -> Float[Array, "B K *rest"]:
    """Split as keys are: from the shapes alone the compiler would gather the heads' sums in every layer."""
    return rules.constrain(x, "batch", "kv_heads", *(None,) * (x.ndim - 2))


def _in_blocks(
    q: Array, k: Array, v: Array, seen: Callable[[Array, int], Array], filled: Array | int, before: _Softmax
) -> _Softmax:
    """The softmax after `before` over the filled slots, a block at a time.

    A block is small enough to be copied into a core's own memory; a part of the cache of any size could not be read
    without a copy of it. `seen(first, size)`: bool [B, Q, size] of the keys from slot `first` on.
    """
    slots = k.shape[2]
    size = min(-(-slots // (MOST_BLOCKS * BLOCK)) * BLOCK, slots)

    def block(i: Array, softmax: _Softmax) -> _Softmax:
        highest, total, out = softmax
        first = jnp.minimum(i * size, slots - size)  # the last block begins earlier, where `size` doesn't divide
        keys, values = (jax.lax.dynamic_slice_in_dim(x, first, size, axis=2) for x in (k, v))
        block_scores = scores(q, keys, seen(first, size) & (first + jnp.arange(size) >= i * size))
        new = jnp.maximum(highest, block_scores.max(axis=-1))
        weights, decay = jnp.exp(block_scores - new[..., None]), jnp.exp(highest - new)
        return _Softmax(new, total * decay + weights.sum(axis=-1), out * decay[..., None] + weighted(weights, values))

    return jax.lax.fori_loop(0, -(-filled // size), block, before)


def _attend(q: Array, k: Array, v: Array, mask: AttentionMask) -> Array:
    """`dense_attention` over all keys at once."""
    weights = jax.nn.softmax(scores(grouped(q, k.shape[1]), k, visible(mask, k.shape[2])), axis=-1)
    return ungrouped(weighted(weights, v), q)


def rotate(x: Float[Array, "B S N hd"], positions: Int[Array, "B S"], rope: Frequencies) -> Float[Array, "B S N hd"]:
    """Rotary position embedding in float32 (arXiv 2104.09864, the half-split layout of Hugging Face)."""
    angle = positions.astype(accum_dtype(x.dtype))[:, :, None, None] * rope.inverse
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if rope.scale != 1:
        cos, sin = cos * rope.scale, sin * rope.scale
    x1, x2 = jnp.split(x.astype(accum_dtype(x.dtype)), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)
