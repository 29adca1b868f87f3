"""Optimizers whose arithmetic and second moments are float32, whatever the parameters are kept in."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlver_jax.models.precision import accum_dtype


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` on float32 parameters, gradients and state; returns float32 updates, to be rounded when they are added.

    Left to itself optax computes in the parameters' precision. In bfloat16 a norm over many arrays stops growing, and
    a second moment never falls, since 0.999 of it is rounded back to all of it. For float32 this changes nothing.
    """

    def init(params: Any) -> Any:
        return inner.init(widened(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return inner.update(widened(updates), widened(state), widened(params))

    return optax.GradientTransformation(init, update)


def widened(tree: Any) -> Any:
    """Floats of less than float32 in float32; everything else as it is."""
    float_ = lambda x: jnp.issubdtype(x.dtype, jnp.floating)  # noqa: E731
    return jax.tree.map(lambda x: x.astype(accum_dtype(x.dtype)) if float_(x) else x, tree)
