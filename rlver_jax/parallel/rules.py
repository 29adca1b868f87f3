"""The one table that maps logical axes to mesh axes, and the checks that make its errors readable.

Arrays at rest (parameters, optimizer moments, caches, batches) are sharded by `sharding`, which refuses what cannot
be divided. `constrain` only *hints* the sharding of activations inside a jitted function, and leaves an axis that does
not divide to the compiler.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

LogicalAxes = Sequence[str | None]

# Logical axis -> mesh axes, most significant first; those that a mesh lacks don't count. None: replicated.
RULES: Mapping[str, tuple[str, ...] | None] = {
    # parameters
    "vocab": ("tensor", "attention_data"),
    "embed": ("fsdp",),
    "heads": ("tensor",),  # query columns, H x head_dim, and query heads of activations
    "kv_heads": ("tensor",),  # key and value columns, K x head_dim, and key heads of caches
    "mlp": ("tensor", "attention_data"),
    "layers": None,
    "norm": None,
    "rank": None,  # of adapters
    # batches, caches, activations
    "batch": ("replica", "fsdp", "attention_data"),
    "mlp_batch": ("replica", "fsdp"),  # rows of a batch while MLP columns or the vocabulary are what is split
    "group": ("replica",),  # rows of a batch while their model dimension is the one that `fsdp` splits
    "length": None,
    "residual_length": ("tensor",),  # of hidden states between the products of rows without a cache (arXiv 2205.05198)
    "head_dim": None,
    "activation": None,  # the model dimension of hidden states
}


class ShardingError(ValueError):
    """An array cannot be laid out on the mesh as the rules ask."""


def mesh_axes(axis: str | None, rules: Mapping[str, tuple[str, ...] | None] = RULES) -> tuple[str, ...]:
    """Mesh axes of one logical axis; empty when the axis is replicated."""
    if axis is None:
        return ()
    if axis not in rules:
        raise ShardingError(f"unknown logical axis {axis!r}; known ones are {', '.join(sorted(rules))}")
    return rules[axis] or ()


def axes_on(mesh: Any, axis: str | None, rules: Mapping[str, tuple[str, ...] | None] = RULES) -> tuple[str, ...]:
    """Those of the mesh axes of a logical axis that a mesh has."""
    return tuple(name for name in mesh_axes(axis, rules) if name in mesh.shape)


def partition_spec(
    axes: LogicalAxes,
    shape: Sequence[int],
    mesh: Any,
    name: str = "array",
    rules: Mapping[str, tuple[str, ...] | None] = RULES,
) -> PartitionSpec:
    """PartitionSpec of an array with the given logical axes.

    Raises:
        ShardingError: a logical axis is unknown, two dimensions want one mesh axis, or a dimension does not divide
            by the devices along its mesh axes. The message names the array, the axis and the sizes.
    """
    if len(axes) != len(shape):
        raise ShardingError(
            f"{name}: {len(axes)} logical axes {tuple(axes)} for {len(shape)} dimensions {tuple(shape)}"
        )
    used: dict[str, str] = {}
    entries: list[tuple[str, ...] | None] = []
    for axis, size in zip(axes, shape, strict=True):
        wanted = axes_on(mesh, axis, rules)
        for mesh_axis in wanted:
            if mesh_axis in used:
                raise ShardingError(
                    f"{name}: logical axes {used[mesh_axis]!r} and {axis!r} both map to mesh axis {mesh_axis!r}; "
                    f"an array can use a mesh axis once. Change one of them in parallel/rules.py."
                )
            used[mesh_axis] = str(axis)
        parts = 1
        for mesh_axis in wanted:
            parts *= mesh.shape[mesh_axis]
        if size % parts:
            raise ShardingError(
                f"{name} {tuple(shape)}: axis {axis!r} of size {size} cannot be divided over mesh "
                f"{' x '.join(f'{a}={mesh.shape[a]}' for a in wanted)} = {parts} devices; choose mesh sizes whose "
                f"product divides {size}"
            )
        entries.append(wanted or None)
    return PartitionSpec(*entries)


def sharding(axes: LogicalAxes, shape: Sequence[int], mesh: Mesh, name: str = "array") -> NamedSharding:
    """NamedSharding of an array at rest; raises ShardingError as `partition_spec` does."""
    return NamedSharding(mesh, partition_spec(axes, shape, mesh, name))


def tree_shardings(axes_tree: Any, shapes_tree: Any, mesh: Mesh) -> Any:
    """Shardings for a pytree of arrays (or ShapeDtypeStructs) from an equal tree of PartitionSpecs of logical axes."""

    def one(path: Any, leaf: Any, axes: PartitionSpec) -> NamedSharding:
        padded = tuple(axes) + (None,) * (len(leaf.shape) - len(axes))
        return sharding(padded, leaf.shape, mesh, jax.tree_util.keystr(path, simple=True, separator="/"))

    return jax.tree_util.tree_map_with_path(one, shapes_tree, axes_tree)


def parts(axis: str) -> int:
    """Parts that an axis of that name is split into under the mesh set by `jax.set_mesh`; without a mesh, 1."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape.get(mesh_axis, 1) for mesh_axis in mesh_axes(axis)) if not mesh.empty else 1


def constrain_tree(tree: Any, axes_tree: Any) -> Any:
    """`constrain` for every leaf, from an equal tree of PartitionSpecs of logical axes, as `tree_shardings`."""
    return jax.tree.map(lambda x, axes: constrain(x, *axes, *(None,) * (x.ndim - len(axes))), tree, axes_tree)


def constrain_rows(tree: Any) -> Any:
    """`constrain` for arrays that all have the batch in front and are whole in every other axis."""
    return jax.tree.map(lambda x: constrain(x, "batch", *(None,) * (x.ndim - 1)), tree)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Hints the layout of an activation under the mesh set by `jax.set_mesh`; no mesh, no hint.

    A dimension that its mesh axes do not divide (14 heads on 4 devices) stays with the compiler: the weights on both
    sides of it are columns that do divide, so the program is right either way.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    entries: list[Any] = []
    for axis, size in zip(axes, x.shape, strict=True):
        wanted = axes_on(mesh, axis)
        parts = 1
        for mesh_axis in wanted:
            parts *= mesh.shape[mesh_axis]
        entries.append(PartitionSpec.UNCONSTRAINED if size % parts else (wanted or None))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*entries))
