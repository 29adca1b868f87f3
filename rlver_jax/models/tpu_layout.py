"""What keeps the TPU compiler from laying large arrays out anew between the loops of a rollout.

Each loop of a program may want its operands in an order of its own. Where two loops differ, the compiler copies what
passes from one to the other: the weights of all layers, or a whole cache. On other platforms nothing changes.
"""

import jax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from rlver_jax.parallel import rules

TILE = 8, 128  # rows and columns


def stored_transposed(rows: int, columns: int) -> bool:
    """Whether the compiler stores a matrix of this size on a device column by column: where that takes less padding.

    For matrices of 128 rows and columns at the least, of any dtype.
    """

    def padded(major: int, minor: int) -> int:
        return -(-major // TILE[0]) * TILE[0] * -(-minor // TILE[1]) * TILE[1]

    return padded(columns, rows) < padded(rows, columns)


def as_stored(kernel: Float[Array, "I O"], axes: tuple[str, str]) -> Float[Array, "I O"]:
    """A kernel with these logical axes, which is to be read in the order in which a program takes it.

    Each device hints the order of its own part: a hint for the whole array would gather it.
    """
    rows, columns = (size // rules.parts(axis) for size, axis in zip(kernel.shape, axes, strict=True))
    if min(rows, columns) < TILE[1] or not stored_transposed(rows, columns):
        return kernel
    hint = lambda x: with_layout_constraint(x, Layout(major_to_minor=(1, 0)))  # noqa: E731
    mesh = jax.sharding.get_abstract_mesh()
    names = {name for axis in axes for name in rules.axes_on(mesh, axis)}
    if names:
        spec = rules.partition_spec(axes, kernel.shape, mesh)
        hint = jax.shard_map(hint, in_specs=spec, out_specs=spec, axis_names=names, check_vma=False)
    return jax.lax.platform_dependent(kernel, tpu=hint, default=lambda x: x)


def apart(x: Float[Array, "B S O"]) -> Float[Array, "B S O"]:
    """A product that is split into heads next. Else the compiler splits the kernel, transposed where rows are few."""
    return jax.lax.platform_dependent(x, tpu=jax.lax.optimization_barrier, default=lambda x: x)
