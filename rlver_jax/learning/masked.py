"""Masked reductions. What stands outside a mask, NaN and inf too, reaches no value and no gradient.

Results are float32 (float64 for float64 arrays, which the gradient checks use), whatever the input's precision.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num


def zero_outside(x: Num[Array, "*s"], mask: Bool[Array, "*s"]) -> Float[Array, "*s"]:
    """The entries of `x` inside `mask`, in float32 or wider; 0 elsewhere.

    Clean every argument with it *before* computing: a `where` only after, say, an exp leaves 0 * inf = NaN in the
    gradient. Raises ValueError for a mask of another shape (it would broadcast silently) or not bool.
    """
    if mask.dtype != jnp.bool_ or mask.shape != x.shape:
        raise ValueError(
            f"got an array {x.shape} and a {mask.dtype} mask {mask.shape}; expected a bool mask, same shape"
        )
    return jnp.where(mask, x.astype(jnp.promote_types(x.dtype, jnp.float32)), 0.0)


def masked_sum(x: Num[Array, "*s"], mask: Bool[Array, "*s"], *, axis: int | None = None) -> Float[Array, "*r"]:
    """Sum of the entries inside `mask`, over everything or along `axis`; 0 for none."""
    return zero_outside(x, mask).sum(axis)


def masked_mean(x: Num[Array, "*s"], mask: Bool[Array, "*s"], *, axis: int | None = None) -> Float[Array, "*r"]:
    """Mean of the entries inside `mask`, over everything or along `axis`; 0 for none."""
    return masked_sum(x, mask, axis=axis) / jnp.maximum(mask.sum(axis), 1)


def masked_max(x: Num[Array, "*s"], mask: Bool[Array, "*s"], *, empty: float) -> Float[Array, ""]:
    """Largest entry inside `mask`; `empty` for none."""
    return jnp.where(mask.any(), jnp.max(jnp.where(mask, zero_outside(x, mask), -jnp.inf)), empty)


def centred(x: Num[Array, "*s"], mask: Bool[Array, "*s"]) -> Float[Array, "*s"]:
    """x minus its mean over `mask`, 0 elsewhere; entries that are all equal give exactly 0.

    The mean of equal numbers is off by rounding; taking one of them off first leaves zeros, whose mean is exact.
    """
    one = jax.lax.stop_gradient(masked_max(x, mask, empty=0.0))
    shifted = zero_outside(x, mask) - one
    return zero_outside(shifted - masked_mean(shifted, mask), mask)


def masked_var(x: Num[Array, "*s"], mask: Bool[Array, "*s"]) -> Float[Array, ""]:
    """Population variance (ddof 0) of the entries inside `mask`; 0 for none, and exactly 0 for equal ones."""
    return masked_mean(centred(x, mask) ** 2, mask)


def whiten(x: Num[Array, "*s"], mask: Bool[Array, "*s"], eps: float = 1e-8) -> Float[Array, "*s"]:
    """(x - mean) / sqrt(var + eps) over `mask`, 0 elsewhere; entries that are all equal give exactly 0."""
    return centred(x, mask) * jax.lax.rsqrt(masked_var(x, mask) + eps)
