"""Layers of the model: products with weights, norms and the embedding, each with the layout of its parameters."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from rlver_jax.models.backward import lookup
from rlver_jax.models.precision import accum_dtype
from rlver_jax.models.product import LORA_A, LORA_B, LORA_ROWS, low_rank, product
from rlver_jax.models.tpu_layout import as_stored
from rlver_jax.parallel import rules

WEIGHT_PRODUCT = "weight_product"  # what a product's result is called where the backward pass may save it


def partitioned(init: Any, *axes: str) -> Any:
    """An initializer whose parameter remembers its logical axes."""
    return nn.with_logical_partitioning(init, axes)  # plain partitioning would take the names for mesh axes


def unquantized_dtype(param_dtype: Any, dtype: Any) -> Any:
    """The dtype of what is not rounded where `param_dtype` is int8: all but the weight matrices of layers."""
    return dtype if param_dtype == jnp.int8 else param_dtype


class Linear(nn.Module):
    """x @ kernel (+ bias), kernel [in, out] with logical axes. The result is float32: the caller rounds it, once.

    A kernel in int8 has a scale for each column (`quantization`). An adapter beside it, if any, is added (`lora`).
    `decoding`: what TPU needs in the loops of a rollout is hinted to its compiler (`tpu_layout`).
    """

    features: int
    axes: tuple[str, str]
    use_bias: bool
    dtype: Any
    param_dtype: Any
    init_std: float = 0.02
    decoding: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B S I"]) -> Float[Array, "B S O"]:
        """Operands in `dtype`, accumulated and returned in float32."""
        zeros, shape = nn.initializers.zeros_init(), (x.shape[-1], self.features)
        rounded = self.param_dtype == jnp.int8
        kernel_init = partitioned(zeros if rounded else nn.initializers.normal(self.init_std), *self.axes)
        kernel = self.param("kernel", kernel_init, shape, self.param_dtype)
        kernel = as_stored(kernel, self.axes) if self.decoding else kernel
        y = checkpoint_name(product(x, kernel.astype(self.dtype)), WEIGHT_PRODUCT)
        if rounded:
            ones = partitioned(nn.initializers.ones_init(), *self.axes[1:])
            y *= self.param("scale", ones, (self.features,), jnp.float32).astype(y.dtype)
        if self.has_variable("params", LORA_A):
            y += low_rank(x, *(self.get_variable("params", name) for name in (LORA_A, LORA_B, LORA_ROWS)))
        if self.use_bias:
            dtype = unquantized_dtype(self.param_dtype, self.dtype)
            bias = self.param("bias", partitioned(zeros, *self.axes[1:]), (self.features,), dtype)
            y += bias.astype(y.dtype)
        return y


class RMSNorm(nn.Module):
    """x / rms(x) * scale, statistics in float32 (arXiv 1910.07467)."""

    eps: float
    dtype: Any
    param_dtype: Any
    rounded: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        """Result in `dtype`, rounded once; float32 where the caller rounds it (`rounded=False`)."""
        init = partitioned(nn.initializers.ones_init(), "norm")
        scale = self.param("scale", init, (x.shape[-1],), unquantized_dtype(self.param_dtype, self.dtype))
        y = x.astype(accum_dtype(x.dtype))
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        y = scale.astype(y.dtype) * y
        return y.astype(self.dtype) if self.rounded else y


class Embedding(nn.Module):
    """Token embedding [V, D]; also the output head when the model ties them."""

    vocab_size: int
    features: int
    dtype: Any
    param_dtype: Any
    init_std: float = 0.02

    @nn.compact
    def __call__(self, tokens: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        """Rows of the table in `dtype`."""
        init = partitioned(nn.initializers.normal(self.init_std), "vocab", "embed")
        table = self.param(
            "kernel", init, (self.vocab_size, self.features), unquantized_dtype(self.param_dtype, self.dtype)
        )
        # Each device looks up its part of the model dimension for all rows that share it: tokens travel, not the table.
        tokens = rules.constrain(tokens, "group", "length")
        embedded = lookup(table, tokens)
        return rules.constrain(embedded, "group", "length", "embed").astype(self.dtype)
