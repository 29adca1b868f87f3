"""Checkpoints of bfloat16 runs that kept Adam's second moment in bfloat16, too, go on with it in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlver_jax.learning.optimizer import Optimizers, make_optimizer
from rlver_jax.learning.train_step import TrainState, init_state
from rlver_jax.training.checkpoints import Checkpoints, MismatchError


def states(dtype="bfloat16"):
    """(as older versions had it after an update: optax's own, now) of one model."""
    draw = np.random.default_rng(0)
    params = {"policy": {"w": jnp.asarray(draw.normal(size=(8, 16)), dtype), "b": jnp.ones(5, dtype)}}
    adam = optax.adamw(1e-3, weight_decay=0.01, mu_dtype=jnp.float32)
    old = optax.chain(optax.clip_by_global_norm(1.0), adam)
    gradient = jax.tree.map(lambda x: x * jnp.asarray(0.3, x.dtype), params["policy"])
    _, moments = old.update(gradient, old.init(params["policy"]), params["policy"])
    new = make_optimizer(
        learning_rate=1e-3, warmup_steps=0, grad_clip=1.0, beta1=0.9, beta2=0.999, weight_decay=0.01,
        moment_dtype="float32",
    )  # fmt: skip
    return TrainState(jnp.int32(1), params, {"policy": moments}, jnp.int32(0)), init_state(params, Optimizers(new))


def test_the_second_moment_is_widened(tmp_path):
    old, new = states()
    assert old.opt_state["policy"][1][0].nu["w"].dtype == jnp.bfloat16
    checkpoints = Checkpoints(tmp_path, keep_last=1, keep_best=0)
    checkpoints.save(1, old, {})
    restored = checkpoints.restore(new)
    checkpoints.close()
    assert jax.tree.map(lambda x: x.dtype, restored.state) == jax.tree.map(lambda x: x.dtype, new)
    for a, b in zip(*map(jax.tree.leaves, (restored.state, old)), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float64), np.asarray(b, np.float64))


def test_parameters_are_not(tmp_path):
    """Another precision of the parameters is another run."""
    checkpoints = Checkpoints(tmp_path, keep_last=1, keep_best=0)
    checkpoints.save(1, states()[0], {})
    with pytest.raises(MismatchError, match=r"params/policy/b is bfloat16\[5\], expected float32\[5\]"):
        checkpoints.restore(states("float32")[1])
    checkpoints.close()
