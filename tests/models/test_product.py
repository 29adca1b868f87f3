"""The product of activations and weights against plain matrix products and their derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlver_jax.models.product import product


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_value_and_gradients_equal_plain_products(dtype):
    draw = np.random.default_rng(0)
    x, kernel, weight = (draw.normal(size=shape).astype(np.float32) for shape in ((3, 5, 8), (8, 4), (3, 5, 4)))
    x, kernel = (np.asarray(jnp.asarray(a, dtype), np.float32) for a in (x, kernel))  # numbers that the dtype has

    def total(x, kernel):
        return (product(x, kernel) * weight).sum()

    arguments = jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)
    assert product(*arguments).dtype == jnp.float32
    np.testing.assert_allclose(product(*arguments), x @ kernel, rtol=1e-5, atol=1e-5)
    to_x, to_kernel = jax.jit(jax.grad(total, (0, 1)))(*arguments)
    assert (to_x.dtype, to_kernel.dtype) == (jnp.dtype(dtype), jnp.dtype(dtype))
    loose = 1e-5 if dtype == "float32" else 1e-2  # rounded once, to 8 bits
    np.testing.assert_allclose(np.asarray(to_x, np.float32), weight @ kernel.T, rtol=loose, atol=loose)
    expected = np.einsum("bsi,bso->io", x, weight)
    np.testing.assert_allclose(np.asarray(to_kernel, np.float32), expected, rtol=loose, atol=loose)


def test_finite_differences_in_float64():
    with jax.enable_x64(True):
        draw = np.random.default_rng(1)
        x, kernel = draw.normal(size=(2, 3, 4)), draw.normal(size=(4, 3))
        total = lambda k: jnp.sin(product(jnp.asarray(x), k)).sum()  # noqa: E731
        gradient = np.asarray(jax.grad(total)(jnp.asarray(kernel)))
        for position in np.ndindex(kernel.shape):
            step = np.zeros_like(kernel)
            step[position] = 1e-6
            slope = (np.sin(x @ (kernel + step)).sum() - np.sin(x @ (kernel - step)).sum()) / 2e-6
            assert abs(gradient[position] - slope) < 1e-7
