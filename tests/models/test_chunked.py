"""Attention in chunks, whose backward pass is written out: values and gradients are those of dense attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlver_jax.models.attention import BRANCH_RADIX, AttentionMask, dense_attention
from rlver_jax.models.chunked import chunked_attention


def row(length, labelled, dtype, seed=0):
    """Queries [2, L, 4, 8], keys and values of two heads, a cotangent, and who sees whom."""
    draw = np.random.default_rng(seed)
    shapes = [(2, length, 4, 8), (2, 2, length, 8), (2, 2, length, 8), (2, length, 4, 8)]
    arrays = [jnp.asarray(draw.normal(size=shape), dtype) for shape in shapes]
    if not labelled:
        return arrays, AttentionMask(None)
    ids = [0, 0, 0, 64, 66, 128, BRANCH_RADIX, BRANCH_RADIX + 64]
    branch = jnp.asarray(draw.choice(ids, (2, length)), jnp.int32)
    segment = jnp.asarray(np.sort(draw.integers(0, 3, (2, length)), axis=1), jnp.int32)
    return arrays, AttentionMask(None, branch, branch, q_segment=segment, k_segment=segment)


def graded(attend, arrays):
    @jax.jit
    def value_and_pullback(*arrays):
        *inputs, cotangent = arrays
        value, pull = jax.vjp(attend, *inputs)
        return value, pull(cotangent)

    return jax.tree.map(lambda x: np.asarray(x, np.float64), value_and_pullback(*arrays))


@pytest.mark.parametrize(
    ("length", "labelled"),  # one part, parts of two chunks, whole ones, a shorter last one
    [
        (9, False),
        (75, True),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((9, True), (75, False))),
        *(pytest.param(length, seen, marks=pytest.mark.slow) for length in (33, 64) for seen in (False, True)),
    ],
)
def test_values_and_gradients_are_those_of_dense_attention(length, labelled):
    """In float64 they agree but for rounding; float32 and bfloat16 are as close to them as dense attention is."""
    with jax.enable_x64(True):
        arrays, mask = row(length, labelled, jnp.float64)
        expected = graded(lambda *x: dense_attention(*x, mask), arrays)
        actual = graded(lambda *x: chunked_attention(*x, mask, 4), arrays)
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-12)
    for dtype, tolerance in ((jnp.float32, 4e-6), (jnp.bfloat16, 0.06)):
        arrays, mask = row(length, labelled, dtype)
        expected = graded(lambda *x, mask=mask: dense_attention(*x, mask), [x.astype(jnp.float32) for x in arrays])
        actual = graded(lambda *x, mask=mask: chunked_attention(*x, mask, 4), arrays)
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, atol=tolerance)


def test_scores_exist_a_chunk_at_a_time():
    """Of 1,024 queries 32 at a time: less than a quarter of the memory in which the scores of all of them lie."""
    arrays, mask = row(1024, True, jnp.float32)

    def temporaries(attend) -> int:
        gradient = jax.jit(jax.grad(lambda *x: (attend(*x[:3]) * x[3]).sum(), argnums=(0, 1, 2)))
        return gradient.lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    scores = 2 * 4 * 1024**2 * 4
    assert temporaries(lambda *x: dense_attention(*x, mask)) >= scores
    assert temporaries(lambda *x: chunked_attention(*x, mask, 32)) < scores / 4


def test_what_hangs_on_large_scores_is_finite():
    """Scores of thousands: weights of 0 and 1, and no gradient but the values'."""
    (q, k, v, cotangent), mask = row(40, False, jnp.float32)
    value, pull = jax.vjp(lambda *x: chunked_attention(*x, mask, 4), 300 * q, 300 * k, v)
    assert np.isfinite(value).all()
    assert all(np.isfinite(x).all() for x in pull(cotangent))
