"""Leaves of a state by their names, and what a checkpoint records of each: shape, dtype and checksum."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32


def flatten(tree: Any) -> dict[str, Any]:
    """{"a/b/0": leaf}; None and empty containers have no leaves.

    Raises:
        ValueError: two leaves have one name.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    flat = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(flat) != len(leaves):
        raise ValueError("two leaves of the state have one name; expected keys without slashes")
    return flat


def check_leaf(name: str, leaf: Any) -> None:
    """Refuses what a checkpoint can't hold.

    Raises:
        ValueError: it is no array, or a typed key.
    """
    if not isinstance(leaf, jax.Array):
        raise ValueError(f"{name} is {type(leaf).__name__}, expected an array; put what is none into `extra`")
    if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        raise ValueError(f"{name} is a typed key ({leaf.dtype}); save jax.random.key_data of it")


def describe(flat: dict[str, Array]) -> dict[str, dict[str, Any]]:
    """Shape, dtype and checksum of each leaf. All processes take part: a leaf may lie on all of them."""
    # One by one: many small programs at once, each with a sum over devices, can block each other on CPU.
    return {
        name: {"shape": list(leaf.shape), "dtype": leaf.dtype.name, "checksum": int(checksum(leaf))}
        for name, leaf in flat.items()
    }


@jax.jit
def checksum(x: Array) -> UInt32[Array, ""]:
    """A sum over all bits, each element with an odd weight of its own, modulo 2**32.

    Any one changed element changes it; other changes go unnoticed with a chance of 2**-32. It doesn't depend on how
    the array is split over devices.
    """
    if x.dtype != jnp.bool_:
        x = jax.lax.bitcast_convert_type(x, f"uint{8 * min(x.dtype.itemsize, 4)}")  # 8 bytes become two of 4
    position, stride = jnp.uint32(0), 1
    for axis in reversed(range(x.ndim)):
        position = position + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    position = position * jnp.uint32(0x9E3779B1)
    position = (position ^ (position >> 15)) * jnp.uint32(0x85EBCA6B)
    return jnp.sum(x.astype(jnp.uint32) * ((position ^ (position >> 13)) | 1), dtype=jnp.uint32)
