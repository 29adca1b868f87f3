"""Value head: one number per position on the hidden states of a trunk (the critic of PPO)."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlver_jax.models.layers import partitioned
from rlver_jax.models.precision import matmul_options


class ValueHead(nn.Module):
    """value = hidden . kernel + bias, in float32.

    The kernel starts at zero, so an untrained critic predicts `bias_init` everywhere: the first advantages are then
    rewards against one constant instead of noise. RLVER's starts at normal deviates.
    """

    bias_init: float = 0.0  # in units of reward
    kernel_std: float = 0.0  # deviation of the kernel's first values
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, hidden: Float[Array, "*b D"]) -> Float[Array, "*b"]:
        """Values in units of reward."""
        normal, constant = nn.initializers.normal(self.kernel_std), nn.initializers.constant(self.bias_init)
        start = normal if self.kernel_std else nn.initializers.zeros_init()
        kernel = self.param("kernel", partitioned(start, "embed"), (hidden.shape[-1],), self.param_dtype)
        bias = self.param("bias", constant, (), self.param_dtype)
        product = jnp.einsum("...d,d->...", hidden, kernel.astype(hidden.dtype), **matmul_options(hidden.dtype))
        return product + bias.astype(product.dtype)
