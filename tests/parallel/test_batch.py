"""Rows taken and put by index, against NumPy, on one device and where a batch is spread."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlver_jax.parallel.batch import common_parts, gather_rows, scatter_rows
from rlver_jax.parallel.mesh import make_mesh

N, R, T = 12, 8, 3


@pytest.fixture(params=[1, 4], ids=["alone", "spread"])
def mesh(request):
    return make_mesh(1, request.param, 2, devices=jax.devices()[: 2 * request.param])


@pytest.fixture
def arrays(mesh):
    """x [N, T, 2], value [R, 2], and an index by which each part of four names its own rows (one of them none)."""
    draw = np.random.default_rng(0)
    x, value = (draw.standard_normal(shape).astype(np.float32) for shape in ((N, T, 2), (R, 2)))
    index = np.concatenate([part * 3 + draw.permutation(3)[:2] for part in range(4)])
    rows = NamedSharding(mesh, PartitionSpec(("replica", "fsdp")))
    return [jax.device_put(a, rows) for a in (x, value, index.astype(np.int32))]


def test_rows_are_taken(mesh, arrays):
    x, _, index = arrays
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(jax.jit(gather_rows)(x, index), np.asarray(x)[np.asarray(index)])


def test_rows_are_put(mesh, arrays):
    x, value, index = arrays
    column = np.random.default_rng(1).integers(0, T, R).astype(np.int32)
    index = index.at[3].set(N)  # writes nothing
    want = np.array(x)
    for r in range(R):
        if r != 3:
            want[int(index[r]), column[r]] = value[r]
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(jax.jit(scatter_rows)(x, index, jnp.asarray(column), value), want)


def test_nothing_travels_between_devices():
    mesh = make_mesh(2, 4, 1, devices=jax.devices()[:8])
    rows = NamedSharding(mesh, PartitionSpec(("replica", "fsdp")))
    like = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)  # noqa: E731
    index = like(R, dtype=jnp.int32)
    with jax.set_mesh(mesh):
        texts = [
            jax.jit(gather_rows).lower(like(16, T), index).compile().as_text(),
            jax.jit(scatter_rows).lower(like(16, T, 2), index, index, like(R, 2)).compile().as_text(),
        ]
    for text in texts:
        assert not [kind for kind in ("all-gather", "all-reduce", "all-to-all", "collective-permute") if kind in text]


def test_a_batch_that_cannot_be_divided_is_one_part():
    with jax.set_mesh(make_mesh(1, 4, 2, devices=jax.devices()[:8])):
        assert (common_parts(12, 8), common_parts(12, 6), common_parts(3)) == (4, 1, 1)
    assert common_parts(3, 5) == 1
