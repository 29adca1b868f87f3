"""Splash attention against the dense one, by the kernels' own steps on CPU: values, gradients, and what is left out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlver_jax.models import qwen
from rlver_jax.models.attention import BRANCH_RADIX, AttentionMask, dense_attention, visible
from rlver_jax.models.families import Qwen2Config
from rlver_jax.models.kv_cache import init_kv_cache
from rlver_jax.models.qwen import Qwen2, abstract_params, init_params
from rlver_jax.models.splash import blocks_of, splash_attention
from rlver_jax.parallel.mesh import make_mesh

LENGTH = 300  # blocks of 128, the last one filled up


def rows_of(draw, count, length):
    """Branches and segments as packed rows have them: dialogues of turns, a thought in most; padding at the end."""
    branch, segment = np.zeros((count, length), np.int32), np.zeros((count, length), np.int32)
    for row in range(count):
        position, end = 0, length - int(draw.integers(0, 40))
        while position < end:
            stop, first, turn = min(position + int(draw.integers(60, 140)), end), position, 1
            segment[row, position:stop] = first
            while position < stop:
                position += int(draw.integers(5, 30))
                thought = int(draw.integers(0, 25))
                branch[row, position : min(position + thought, stop)] = turn * BRANCH_RADIX
                position, turn = min(position + thought, stop), turn + 1
        segment[row, end:] = end
        branch[row, end:] = 0
    return jnp.asarray(branch), jnp.asarray(segment)


def problem(dtype, length=LENGTH, rows=2):
    """q of four heads, k and v of two, and what is seen."""
    draw = np.random.default_rng(0)
    q = jnp.asarray(draw.normal(size=(rows, length, 4, 64)), dtype)
    k, v = (jnp.asarray(draw.normal(size=(rows, 2, length, 64)), dtype) for _ in range(2))
    branch, segment = rows_of(draw, rows, length)
    return q, k, v, AttentionMask(None, branch, branch, q_segment=segment, k_segment=segment)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.float32, 3e-6), pytest.param(jnp.bfloat16, 2e-2, marks=pytest.mark.slow)]
)
def test_values_and_gradients_are_those_of_dense_attention(dtype, tolerance):
    q, k, v, mask = problem(dtype)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), jnp.float32)
    blocks = jax.jit(blocks_of, static_argnums=1)(visible(mask, LENGTH), 128)
    assert blocks.size == 128

    def graded(attend):
        def total(q, k, v):
            out = attend(q, k, v)
            return (out.astype(jnp.float32) * weights).sum(), out

        return jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(q, k, v)

    (_, want), want_gradients = graded(lambda *x: dense_attention(*x, mask))
    (_, actual), gradients = graded(lambda *x: splash_attention(*x, blocks, interpret=True))
    assert actual.dtype == dtype
    for mine, theirs in zip((actual, *gradients), (want, *want_gradients), strict=True):
        mine, theirs = (np.asarray(x, np.float32) for x in (mine, theirs))
        np.testing.assert_allclose(mine, theirs, atol=tolerance * max(np.abs(theirs).max(), 1))


def test_blocks_that_nobody_sees_are_left_out():
    """NaN in the keys and values of one dialogue reaches another one's result, and gradient, only if it is read."""
    q, k, v, _ = problem(jnp.float32, length=384, rows=1)
    segment = jnp.repeat(jnp.array([[0, 128, 256]]), 128, axis=1)
    attention_mask = AttentionMask(None, q_segment=segment, k_segment=segment)
    mask = visible(attention_mask, 384)
    blocks = blocks_of(mask, 128)
    np.testing.assert_array_equal(blocks.forward.block_mask[0, 0], np.eye(3))
    np.testing.assert_array_equal(blocks.backward.block_mask[0, 0], np.eye(3))
    k, v = (x.at[:, :, 128:256].set(jnp.nan) for x in (k, v))

    def total(q, k, v):
        out = splash_attention(q, k, v, blocks, interpret=True)
        others = jnp.concatenate([out[:, :128], out[:, 256:]], axis=1)
        return (others**2).sum()

    value, gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2)))(q, k, v)
    assert np.isfinite(value)
    of_q, of_k, of_v = map(np.asarray, gradients)
    for mine, axis in ((of_q, 1), (of_k, 2), (of_v, 2)):
        assert np.isfinite(np.delete(mine, np.s_[128:256], axis)).all()
    dense = jax.jit(lambda *x: dense_attention(*x, attention_mask))(q, k, v)
    assert np.isnan(dense[:, 256:]).any(), "dense attention multiplies what is masked by 0"


def test_every_other_block_is_read():
    """Counted from the mask itself."""
    mask = np.asarray(visible(problem(jnp.float32)[3], LENGTH))
    blocks = blocks_of(jnp.asarray(mask), 128)
    whole = np.zeros((2, 384, 384), bool)
    whole[:, :LENGTH, :LENGTH] = mask
    whole[:, range(LENGTH, 384), range(LENGTH, 384)] = True
    any_visible = whole.reshape(2, 3, 128, 3, 128).any((2, 4))
    np.testing.assert_array_equal(np.asarray(blocks.forward.block_mask)[:, 0] > 0, any_visible)
    np.testing.assert_array_equal(np.asarray(blocks.backward.block_mask)[:, 0] > 0, any_visible)
    assert any_visible.mean() < 0.9


CONFIG = Qwen2Config(96, 32, 48, 2, num_heads=4, num_kv_heads=2, head_dim=8)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_model_learns_the_same_with_it(scan, remat, monkeypatch):
    """Through all layers, scanned or not, by the interpreter without callbacks, which rematerialization refuses."""
    monkeypatch.setattr(qwen, "splash_attention", functools.partial(splash_attention, interpret=True))
    draw = np.random.default_rng(2)
    branch, segment = rows_of(draw, 1, 160)
    tokens = jnp.asarray(draw.integers(0, 96, (1, 160)))
    model = Qwen2(CONFIG, scan_layers=scan, remat=remat)
    params = init_params(model, jax.random.key(0))

    def graded(model):
        def total(params):
            return (model.apply({"params": params}, tokens, tokens, branch, segment=segment)[0] ** 2).mean()

        return jax.jit(jax.value_and_grad(total))(params)

    want, want_gradient = graded(model)
    actual, gradient = graded(model.clone(attention="splash"))
    np.testing.assert_allclose(actual, want, rtol=1e-5)
    for mine, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(want_gradient), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5 * max(float(jnp.abs(theirs).max()), 1e-2))


def test_a_cache_is_refused():
    model = Qwen2(CONFIG, attention="splash")
    cache = init_kv_cache(CONFIG, 1, 8, jnp.float32, scan_layers=True)
    tokens = jnp.zeros((1, 4), jnp.int32)
    shapes, _ = abstract_params(model)
    with pytest.raises(ValueError, match="attention='splash' reads rows without a cache"):
        jax.eval_shape(
            lambda p: model.apply({"params": p}, tokens, tokens, None, cache, jnp.zeros(1, jnp.int32)), shapes
        )


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 1, 8), "2 key and value heads can't be divided over mesh.tensor=8"),
        ((2, 4, 1), "2 rows can't be divided over 8 groups of devices"),
    ],
)
def test_what_a_mesh_cannot_divide_is_refused(shape, message):
    q, k, v, mask = problem(jnp.float32, length=128, rows=2)
    blocks = blocks_of(visible(mask, 128))
    with jax.set_mesh(make_mesh(*shape)), pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda *x: splash_attention(*x, blocks, interpret=True), q, k, v)


@pytest.mark.slow
def test_on_a_mesh_each_device_has_its_rows_and_heads():
    q, k, v, attention_mask = problem(jnp.float32, rows=4)
    mask = visible(attention_mask, LENGTH)
    want = dense_attention(q, k, v, attention_mask)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        actual = jax.jit(lambda *x: splash_attention(*x[:3], blocks_of(x[3], 128), interpret=True))(q, k, v, mask)
    np.testing.assert_allclose(actual, want, atol=3e-6)
