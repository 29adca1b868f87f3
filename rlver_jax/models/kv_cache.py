"""Keys and values of past tokens as an explicit pytree, written in place at each row's own length."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from rlver_jax.models.families import Qwen2Config
from rlver_jax.parallel import rules

UNROLLED_ROWS = 16  # more rows are written in a loop, except on TPU: the program stays small


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


class Prefix(NamedTuple):
    """What neighbouring rows of a batch share: row b begins with row b // (B / P) of this, before its own cache."""

    kv: KVCache  # of P rows
    length: Int[Array, "P"]  # valid slots of each


def init_kv_cache(config: Qwen2Config, batch: int, capacity: int, dtype: jnp.dtype, *, scan_layers: bool) -> KVCache:
    """Zeroed cache for `batch` rows of `capacity` slots."""
    shape = (batch, config.num_kv_heads, capacity, config.head_dim)
    if scan_layers:
        k, v = (jnp.zeros((config.num_layers, *shape), dtype) for _ in range(2))
        return laid_out(KVCache(k, v))
    layers = range(config.num_layers)
    keys, values = (tuple(jnp.zeros(shape, dtype) for _ in layers) for _ in range(2))
    return laid_out(KVCache(keys, values))


def laid_out(cache: KVCache) -> KVCache:
    """Hints the layout of a cache: rows are split as the batch, heads over `tensor`."""
    axes = ("batch", "kv_heads", "length", "head_dim")
    return jax.tree.map(lambda x: rules.constrain(x, *("layers",) * (x.ndim - 4), *axes), cache)


def write(
    cache: Float[Array, "*L B K C hd"],
    new: Float[Array, "B K S hd"],
    start: Int[Array, "B"],
    layer: Int[Array, ""] | None = None,
) -> Float[Array, "*L B K C hd"]:
    """Writes S new slots of every row at `start` (the row's own length); start + S must not exceed the capacity.

    Row by row, in place. XLA compiles one scatter into something far slower on CPU. For TPU a scatter, or a loop over
    rows, makes it lay the cache of all layers out anew in each layer of each decoded token. So each device writes the
    rows that it has; only a batch that devices can't split evenly is written by a scatter.
    """
    new, parts = new.astype(cache.dtype), rules.parts("batch")
    if parts == 1:
        return _write_rows(cache, new, start, layer)
    if new.shape[0] % parts:
        return _scatter(cache, new, start, layer)
    axes = rules.axes_on(jax.sharding.get_abstract_mesh(), "batch")
    rows, of_cache = PartitionSpec(axes), PartitionSpec(*(None,) * (cache.ndim - 4), axes)
    in_specs = (of_cache, rows, rows, PartitionSpec())
    local = jax.shard_map(_write_rows, in_specs=in_specs, out_specs=of_cache, axis_names=set(axes), check_vma=False)
    return local(cache, new, start, layer)


def _write_rows(cache: Array, new: Array, start: Array, layer: Array | None) -> Array:
    rows = new.shape[0]

    def row(b: Array | int, cache: Array) -> Array:
        update = jax.lax.dynamic_slice_in_dim(new, b, 1)
        index = (b, 0, start[b], 0) if layer is None else (layer, b, 0, start[b], 0)
        return jax.lax.dynamic_update_slice(cache, update if layer is None else update[None], index)

    unrolled = lambda cache: functools.reduce(lambda cache, b: row(b, cache), range(rows), cache)  # noqa: E731
    if rows <= UNROLLED_ROWS:
        return unrolled(cache)
    looped = lambda cache: jax.lax.fori_loop(0, rows, row, cache)  # noqa: E731
    return jax.lax.platform_dependent(cache, tpu=unrolled, default=looped)


def _scatter(cache: Array, new: Array, start: Array, layer: Array | None) -> Array:
    if layer is None:
        indices, batching = start[:, None], (0,)
        operand_dims: tuple[int, ...] = (2,)
        inserted: tuple[int, ...] = ()
    else:
        indices = jnp.stack([jnp.broadcast_to(layer, start.shape), start], axis=1)
        batching, operand_dims, inserted = (1,), (0, 3), (0,)
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2, 3),
        inserted_window_dims=inserted,
        scatter_dims_to_operand_dims=operand_dims,
        operand_batching_dims=batching,
        scatter_indices_batching_dims=(0,),
    )
    clip = jax.lax.GatherScatterMode.CLIP
    return jax.lax.scatter(cache, indices, new, numbers, indices_are_sorted=True, unique_indices=True, mode=clip)
