"""Attention in chunks of queries, equal to `dense_attention`: of all scores only a chunk's exist, [B, H, chunk, C].

For rows without a cache the backward pass is written out (arXiv 2205.14135): it computes a chunk's weights again from
the sums of the forward pass, where automatic differentiation would attend once more.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlver_jax.models.attention import (
    AttentionMask,
    PrefixKeys,
    contract,
    dense_attention,
    grouped,
    scores,
    ungrouped,
    visible,
    weighted,
)
from rlver_jax.models.precision import accum_dtype

PARTS = 8  # of a row without a cache, at most: each is compiled, so their number decides how long that takes


def chunked_attention(
    q: Float[Array, "B Q H hd"],
    k: Float[Array, "B K C hd"],
    v: Float[Array, "B K C hd"],
    mask: AttentionMask,
    chunk: int,
    prefix: PrefixKeys | None = None,
) -> Float[Array, "B Q H hd"]:
    """`dense_attention`, `chunk` queries at a time.

    Without a cache, keys after the last query of a chunk's part of the row are left out: nearly half of the products.
    """
    if q.shape[1] <= chunk:
        return dense_attention(q, k, v, mask, prefix)
    if mask.q_slot is not None:
        return _over_cache(q, k, v, mask, chunk, prefix)
    return _rows(chunk, q, k, v, _Labels(mask.q_branch, mask.q_segment))


def _over_cache(q: Array, k: Array, v: Array, mask: AttentionMask, chunk: int, prefix: PrefixKeys | None) -> Array:
    def one(piece: tuple[Array, Array, Array | None]) -> Array:
        q, slot, branch = piece
        part = mask._replace(q_slot=slot, q_branch=branch, filled=None if mask.filled is None else slot.max() + 1)
        return dense_attention(q, k, v, part, prefix)

    assert mask.q_slot is not None
    out = jax.lax.map(one, jax.tree.map(lambda x: _split(x, chunk, 1), (q, mask.q_slot, mask.q_branch)))
    return _joined(out, 1)[:, : q.shape[1]]


def _split(x: Array, chunk: int, axis: int) -> Array:
    """An axis in chunks, which stand in front; padded at the end."""
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, -x.shape[axis] % chunk)
    x = jnp.pad(x, pad)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, chunk, *x.shape[axis + 1 :]), axis, 0)


def _joined(x: Array, axis: int) -> Array:
    """The inverse of `_split`, padding included."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


class _Labels(NamedTuple):
    """Branches and dialogues of a row's tokens; None: all are canonical, of one dialogue."""

    branch: Array | None
    segment: Array | None


class _Part(NamedTuple):
    """Queries first..end-1 of a row: they see no key from `end` on."""

    first: int
    end: int
    chunk: int

    def seen(self, labels: _Labels, number: Array) -> Array:
        """Boolean mask [B, chunk, end] of chunk `number`; padding sees what it may."""
        slots = self.first + number * self.chunk + jnp.arange(self.chunk)
        of_queries = (None if x is None else jnp.take(x, slots, axis=1, mode="clip") for x in labels)
        of_keys = (None if x is None else x[:, : self.end] for x in labels)
        (q_branch, q_segment), (k_branch, k_segment) = of_queries, of_keys
        mask = AttentionMask(slots[None], q_branch, k_branch, q_segment=q_segment, k_segment=k_segment)
        return visible(mask, self.end)

    def split(self, x: Array) -> Array:
        """[B, K, R, Q, …] -> the part's chunks [N, B, K, R, chunk, …]."""
        return _split(x[:, :, :, self.first : self.end], self.chunk, 3)


def _parts(length: int, chunk: int) -> Iterator[_Part]:
    size = -(-length // (chunk * PARTS)) * chunk
    return (_Part(first, min(first + size, length), chunk) for first in range(0, length, size))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows(chunk: int, q: Array, k: Array, v: Array, labels: _Labels) -> Array:
    return _forward(chunk, q, k, v, labels)[0]


def _forward(chunk: int, q: Array, k: Array, v: Array, labels: _Labels) -> tuple[Array, tuple]:
    queries, outs = grouped(q, k.shape[1]), []
    for part in _parts(q.shape[1], chunk):
        keys, values = k[:, :, : part.end], v[:, :, : part.end]

        def one(piece: tuple[Array, Array], part=part, keys=keys, values=values) -> tuple[Array, Array]:
            number, q = piece
            part_scores = scores(q, keys, part.seen(labels, number))
            highest = part_scores.max(axis=-1)
            weights = jnp.exp(part_scores - highest[..., None])
            total = weights.sum(axis=-1)
            out = weighted(weights, values) / total[..., None]
            return out, highest + jnp.log(total)

        outs.append(_map(one, part, part.split(queries)))
    out, normalizer = (jnp.concatenate(x, axis=3) for x in zip(*outs, strict=True))
    return ungrouped(out, q), (q, k, v, labels, ungrouped(out, q), normalizer)


def _map(one: Callable[[tuple[Array, Array]], Any], part: _Part, q: Array) -> Any:
    """`one` for each of a part's chunks, without the padding of the last."""
    out = jax.lax.map(one, (jnp.arange(q.shape[0]), q))
    return jax.tree.map(lambda x: _joined(x, 3)[:, :, :, : part.end - part.first], out)


def _backward(chunk: int, saved: tuple, cotangent: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, labels, out, normalizer = saved
    kv_heads, dtype = k.shape[1], accum_dtype(q.dtype)
    queries, d_out, out = (grouped(x, kv_heads) for x in (q, cotangent.astype(q.dtype), out))
    inner = (d_out.astype(dtype) * out.astype(dtype)).sum(axis=-1)  # sum_c p d_p, as sum_d d_out out
    d_k, d_v = (jnp.zeros(x.swapaxes(2, 3).shape, dtype) for x in (k, v))
    d_q = []
    for part in _parts(q.shape[1], chunk):
        keys, values = k[:, :, : part.end], v[:, :, : part.end]

        def one(sums: Any, piece: Any, part=part, keys=keys, values=values) -> tuple[Any, Array]:
            number, (q, d_out, normalizer, inner) = piece
            weights = jnp.exp(scores(q, keys, part.seen(labels, number)) - normalizer[..., None])
            d_weights = contract("bkrqd,bkcd->bkrqc", d_out, values)
            d_scores = (weights * (d_weights - inner[..., None]) * q.shape[-1] ** -0.5).astype(q.dtype)
            d_keys, d_values = _pulled(q, d_scores), _pulled(d_out, weights.astype(q.dtype))
            return (sums[0] + d_keys, sums[1] + d_values), weighted(d_scores, keys)

        pieces = jax.tree.map(part.split, (queries, d_out, normalizer, inner))
        sums = d_k[..., : part.end], d_v[..., : part.end]
        sums, d = jax.lax.scan(one, sums, (jnp.arange(pieces[0].shape[0]), pieces))
        d_q.append(_joined(d, 3)[:, :, :, : part.end - part.first])
        d_k, d_v = (x.at[..., : part.end].set(new) for x, new in zip((d_k, d_v), sums, strict=True))
    d_k, d_v = (x.swapaxes(2, 3).astype(k.dtype) for x in (d_k, d_v))
    return ungrouped(jnp.concatenate(d_q, axis=3), q), d_k, d_v, None


def _pulled(x: Float[Array, "B K R Q hd"], weights: Float[Array, "B K R Q C"]) -> Float[Array, "B K hd C"]:
    """What the keys of weights have from the queries' side, transposed: so the small operand is, not the large one."""
    flatten_groups = lambda x: x.reshape(*x.shape[:2], -1, x.shape[-1])  # noqa: E731
    return contract("bkdn,bknc->bkdc", flatten_groups(x).swapaxes(2, 3), flatten_groups(weights))


_rows.defvjp(_forward, _backward)
