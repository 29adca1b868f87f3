"""Keys and values of past tokens as an explicit pytree, written in place at each row's own length."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlver_jax.models.config import Qwen2Config


class KVCache(NamedTuple):
    """Keys and values: one array [layers, B, K, C, hd] for scanned layers, a tuple of [B, K, C, hd] for unrolled ones.

    C is the capacity in slots. Which slots are valid is the caller's knowledge (`start` of `write` and the slots that
    queries may see); a cache never holds its own lengths.
    """

    k: Array | tuple[Array, ...]
    v: Array | tuple[Array, ...]

    @property
    def capacity(self) -> int:
        """Slots of a row."""
        return (self.k[0] if isinstance(self.k, tuple) else self.k).shape[-2]


def init_kv_cache(config: Qwen2Config, batch: int, capacity: int, dtype: jnp.dtype, *, scan_layers: bool) -> KVCache:
    """Zeroed cache for `batch` rows of `capacity` slots."""
    shape = (batch, config.num_kv_heads, capacity, config.head_dim)
    if scan_layers:
        return KVCache(jnp.zeros((config.num_layers, *shape), dtype), jnp.zeros((config.num_layers, *shape), dtype))
    layers = range(config.num_layers)
    return KVCache(tuple(jnp.zeros(shape, dtype) for _ in layers), tuple(jnp.zeros(shape, dtype) for _ in layers))


def write(
    cache: Float[Array, "*L B K C hd"],
    new: Float[Array, "B K S hd"],
    start: Int[Array, "B"],
    layer: Int[Array, ""] | None = None,
) -> Float[Array, "*L B K C hd"]:
    """Writes S new slots of every row at `start` (the row's own length); start + S must not exceed the capacity.

    One scatter with the batch as a batching dimension, so that it stays local when the batch is sharded, and with the
    layer as an index, so that scanned layers update the stacked cache without taking a layer out of it.
    """
    if layer is None:
        indices, window, batching = start[:, None], (1, 2, 3), (0,)
        operand_dims: tuple[int, ...] = (2,)
        inserted: tuple[int, ...] = ()
    else:
        indices = jnp.stack([jnp.broadcast_to(layer, start.shape), start], axis=1)
        window, batching, operand_dims, inserted = (1, 2, 3), (1,), (0, 3), (0,)
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=window,
        inserted_window_dims=inserted,
        scatter_dims_to_operand_dims=operand_dims,
        operand_batching_dims=batching,
        scatter_indices_batching_dims=(0,),
    )
    return jax.lax.scatter(
        cache,
        indices,
        new.astype(cache.dtype),
        numbers,
        indices_are_sorted=True,
        unique_indices=True,
        mode=jax.lax.GatherScatterMode.CLIP,
    )
