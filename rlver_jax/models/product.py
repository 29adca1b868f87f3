"""Products of activations and weights, with a backward pass that XLA's CPU compiler does not spoil."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlver_jax.models.precision import matmul_options

# Names of an adapter's two factors beside a kernel, and of which rows of a batch take which of their ranks (`lora`).
LORA_A, LORA_B, LORA_ROWS = "lora_a", "lora_b", "lora_rows"


@jax.custom_vjp
def product(x: Float[Array, "B S I"], kernel: Float[Array, "I O"]) -> Float[Array, "B S O"]:
    """x @ kernel, both of one dtype; accumulated and returned in float32 (float64 for float64)."""
    return jnp.matmul(x, kernel, **matmul_options(x.dtype))


def _forward(x, kernel):
    return product(x, kernel), (x, kernel)


def _backward(operands, cotangent):
    """Of the same values as plain differentiation.

    On CPU, XLA would compute the elementwise operations in front of this product once more inside the transposition
    that the weights' gradient needs, walking memory in strides; the barrier makes it compute them once, in order.
    """
    x, kernel = operands
    barrier = jax.lax.optimization_barrier
    cotangent = jax.lax.platform_dependent(cotangent, cpu=barrier, default=lambda g: g)
    to_x = jnp.matmul(cotangent, kernel.T, **matmul_options(x.dtype))
    to_kernel = jnp.einsum("bsi,bso->io", x, cotangent, **matmul_options(x.dtype))
    return to_x.astype(x.dtype), to_kernel.astype(kernel.dtype)


product.defvjp(_forward, _backward)


def low_rank(
    x: Float[Array, "B S I"],
    a: Float[Array, "I R"],
    b: Float[Array, "R O"],
    rows: Float[Array, "B R"] | None = None,
) -> Float[Array, "B S O"]:
    """x A B, operands in x's dtype; returned in float32 (float64 for float64). Ranks count as `rows` says, 0 or 1."""
    inner = product(x, a.astype(x.dtype))
    if rows is not None:
        inner *= rows[:, None].astype(inner.dtype)
    return product(inner.astype(x.dtype), b.astype(x.dtype))
