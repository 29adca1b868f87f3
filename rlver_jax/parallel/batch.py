"""Gathers and scatters rows between arrays that are sharded alike.

An index refers to rows of the whole array, as without a mesh. Where a batch is sharded, each shard refers to rows of
its own only: written like this, the compiler can see it, and no data moves between devices.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from rlver_jax.parallel import rules


def common_parts(*sizes: int) -> int:
    """Parts that batches of these sizes are all divided into under the mesh that is set; 1 if one can't be."""
    parts = rules.parts("batch")
    return 1 if any(size % parts for size in sizes) else parts


def gather_rows(x: Array, index: Int[Array, "R"]) -> Array:
    """x[index] for x [N, …]."""
    parts = common_parts(x.shape[0], index.shape[0])
    if parts == 1:
        return x[index]
    taken = jax.vmap(lambda x, i: x[i])(_split(x, parts), _local(index, x.shape[0], parts))
    return rules.constrain_rows(taken.reshape(index.shape[0], *x.shape[1:]))


def scatter_rows(x: Array, index: Int[Array, "R"], column: Int[Array, "R"], value: Array) -> Array:
    """x with x[index[r], column[r]] = value[r], for x [N, T, …]; an index of N writes nothing."""
    parts = common_parts(x.shape[0], index.shape[0])

    def put(x: Array, i: Array, c: Array, v: Array) -> Array:
        return x.at[i, c].set(v, mode="drop")

    if parts == 1:
        return put(x, index, column, value)
    local = _local(index, x.shape[0], parts)
    new = jax.vmap(put)(_split(x, parts), local, _split(column, parts), _split(value, parts))
    return rules.constrain_rows(new.reshape(x.shape))


def _split(x: Array, parts: int) -> Array:
    return x.reshape(parts, x.shape[0] // parts, *x.shape[1:])  # not -1: a script may have no fields, and x no size


def _local(index: Array, rows: int, parts: int) -> Array:
    return _split(index, parts) - jnp.arange(parts)[:, None] * (rows // parts)
