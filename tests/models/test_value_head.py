import jax
import jax.numpy as jnp
import numpy as np

from rlver_jax.models.value_head import ValueHead


def test_starts_constant_and_learns_a_line():
    head = ValueHead(bias_init=0.3)
    hidden = jax.random.normal(jax.random.key(0), (2, 5, 8), jnp.bfloat16)
    params = head.init(jax.random.key(1), hidden)["params"]
    import flax.linen as nn

    params = nn.unbox(params)
    values = head.apply({"params": params}, hidden)
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, np.full((2, 5), 0.3), rtol=1e-6)
    kernel = np.arange(8, dtype=np.float32)
    moved = head.apply({"params": {"kernel": jnp.asarray(kernel), "bias": jnp.float32(-1)}}, hidden)
    np.testing.assert_allclose(moved, np.asarray(hidden, np.float32) @ kernel - 1, rtol=1e-5)
