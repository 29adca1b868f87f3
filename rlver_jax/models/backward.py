"""Backward passes that differ from JAX's own in when they begin, or in how precisely they sum."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlver_jax.models.precision import accum_dtype


def late(layer: Any) -> Any:
    """The same function, whose backward pass cannot begin before the cotangent of its result is known.

    What `jax.checkpoint` recomputes depends only on what was saved, and XLA's CPU backend drops the barriers
    that JAX puts before it. Its scheduler may then run the second forward pass of every layer beside the first, and
    keeps all that it meant to save.

    Args:
        layer: of parameters and further arguments; returns ((x [B, S, D], keys, values), None).
    """
    made = jax.custom_vjp(layer)

    def forward(*arguments):
        return jax.vjp(layer, *arguments)

    def backward(pull, cotangents):
        gone = jnp.isnan(cotangents[0][0][..., 0])  # [B, S]; where it is NaN the gradient is, too

        def after(x):
            if not jnp.issubdtype(x.dtype, jnp.floating) or x.shape[:2] != gone.shape:
                return x
            return jnp.where(gone.reshape(*gone.shape, *(1,) * (x.ndim - 2)), jnp.nan, x)

        return jax.tree.map(after, pull)(cotangents)

    made.defvjp(forward, backward)
    return made


def lookup(table: Float[Array, "V D"], tokens: Int[Array, "B S"]) -> Float[Array, "B S D"]:
    """table[tokens]; a row's gradient is summed over the positions of its token in float32 and rounded once.

    JAX sums it in the table's dtype: in bfloat16 a frequent token's stops growing after some 256 terms.
    """
    if table.dtype == accum_dtype(table.dtype):
        return table[tokens]
    return _narrow_lookup(table.shape[0], table, tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _narrow_lookup(size: int, table: Array, tokens: Array) -> Array:
    return table[tokens]


def _lookup_forward(size, table, tokens):
    return table[tokens], tokens


def _lookup_backward(size, tokens, cotangent):
    terms = cotangent.astype(accum_dtype(cotangent.dtype))
    total = jnp.zeros((size, terms.shape[-1]), terms.dtype).at[tokens].add(terms)
    return total.astype(cotangent.dtype), None


_narrow_lookup.defvjp(_lookup_forward, _lookup_backward)
