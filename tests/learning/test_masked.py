"""Masked reductions against plain NumPy on the picked entries, with garbage outside the mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlver_jax.learning import masked

# Compiled whole, as training does it, which is also faster than op by op.
masked_sum, masked_mean = (jax.jit(f, static_argnames="axis") for f in (masked.masked_sum, masked.masked_mean))
zero_outside, centred, masked_max, masked_var, whiten = map(
    jax.jit, (masked.zero_outside, masked.centred, masked.masked_max, masked.masked_var, masked.whiten)
)

MASK = np.array([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]], bool)
CLEAN = np.array([[1.5, 0, -2.0, 0.25], [0, 0, 0, 0], [0, 4.0, 0, 0]], np.float32)
DIRTY = np.where(MASK, CLEAN, [[np.nan, np.nan, np.inf, -np.inf], [np.nan, np.inf, -np.inf, 3e38], [np.inf] * 4])
DIRTY = DIRTY.astype(np.float32)


def close(got, expected, atol=1e-6):
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=0, atol=atol)


def test_by_hand():
    close(masked_sum(DIRTY, MASK), 3.75)
    close(masked_sum(DIRTY, MASK, axis=1), [-0.25, 0, 4])
    close(masked_mean(DIRTY, MASK), 3.75 / 4)
    close(masked_mean(DIRTY, MASK, axis=1), [-0.25 / 3, 0, 4])
    close(masked_mean(DIRTY, MASK, axis=0), [1.5, 4, -2, 0.25])
    close(masked_max(DIRTY, MASK, empty=7.0), 4)
    # Squares: 2.25 + 4 + 0.0625 + 16 = 22.3125; mean 0.9375.
    close(masked_var(DIRTY, MASK), 22.3125 / 4 - 0.9375**2)
    close(zero_outside(DIRTY, MASK), CLEAN)


def test_nothing_inside_the_mask():
    none = np.zeros_like(MASK)
    for reduce in (masked_sum, masked_mean, masked_var):
        close(reduce(DIRTY, none), 0)
    close(masked_max(DIRTY, none, empty=7.0), 7)
    close(whiten(DIRTY, none), np.zeros_like(CLEAN))


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_, jnp.bfloat16, jnp.float16])
def test_results_are_float32(dtype):
    close(masked_mean(jnp.asarray([1, 0, 1, 1], dtype), jnp.asarray([True, True, True, False])), 2 / 3)


def test_whiten_has_mean_zero_and_std_one():
    got = np.asarray(whiten(DIRTY, MASK), np.float64)
    picked = CLEAN[MASK].astype(np.float64)
    np.testing.assert_allclose(got[MASK], (picked - picked.mean()) / picked.std(), atol=1e-6)
    np.testing.assert_array_equal(got[~MASK], 0)


@settings(max_examples=30, deadline=None)
@given(value=st.floats(-1e4, 1e4, width=32), bits=st.lists(st.booleans(), min_size=12, max_size=12))
def test_equal_entries_whiten_to_exactly_zero(value, bits):
    """A mean in float32 is often an ulp off; divided by a standard deviation of an ulp that would be an advantage."""
    mask = np.array(bits).reshape(3, 4)
    x = np.where(mask, np.float32(value), np.float32(np.nan))
    np.testing.assert_array_equal(centred(x, mask), np.zeros((3, 4)))
    np.testing.assert_array_equal(whiten(x, mask), np.zeros((3, 4)))
    assert masked_var(x, mask) == 0


@pytest.mark.parametrize("reduce", [masked_sum, masked_mean, masked_var, lambda x, m: (whiten(x, m) ** 3).sum()])
def test_gradients_are_clean_and_stay_inside(reduce):
    slope = jax.jit(jax.grad(reduce))
    gradient = slope(DIRTY, MASK)
    np.testing.assert_array_equal(np.asarray(gradient)[~MASK], 0)
    close(gradient, slope(CLEAN, MASK))
    if reduce is masked_mean:
        close(gradient, MASK / 4)


def test_whiten_of_equal_entries_has_a_finite_gradient():
    gradient = jax.jit(jax.grad(lambda x: (whiten(x, MASK) ** 2).sum()))(np.full(MASK.shape, 0.3, np.float32))
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("mask", [MASK[:, :1], MASK[0], MASK.astype(np.float32)])
def test_a_mask_that_does_not_fit_is_an_error(mask):
    with pytest.raises(ValueError, match="expected a bool mask, same shape"):
        masked_mean(DIRTY, mask)
