"""Logical axes to mesh axes, and what is refused."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from rlver_jax.parallel.mesh import (
    ATTENTION_DATA,
    batch_parts,
    device_grid,
    make_mesh,
    resolve_mesh_shape,
    resolve_sampling_shape,
    sampling_mesh,
)
from rlver_jax.parallel.rules import RULES, ShardingError, constrain, partition_spec, sharding


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(replica=2, fsdp=2, tensor=2)


def test_layout(mesh):
    assert partition_spec(("layers", "embed", "mlp"), (3, 8, 6), mesh) == PartitionSpec(None, ("fsdp",), ("tensor",))
    assert partition_spec(("batch", "length"), (8, 5), mesh) == PartitionSpec(("replica", "fsdp"), None)
    array = jax.device_put(jnp.zeros((8, 6)), sharding(("batch", "heads"), (8, 6), mesh))
    assert {s.data.shape for s in array.addressable_shards} == {(2, 3)}


def test_errors_name_array_axis_and_sizes(mesh):
    with pytest.raises(ShardingError, match=r"tokens \(6, 5\): axis 'batch' of size 6 .* replica=2 x fsdp=2 = 4"):
        partition_spec(("batch", "length"), (6, 5), mesh, "tokens")
    with pytest.raises(ShardingError, match=r"layer/w: logical axes 'heads' and 'mlp' both map to mesh axis 'tensor'"):
        partition_spec(("heads", "mlp"), (8, 8), mesh, "layer/w")
    with pytest.raises(ShardingError, match="unknown logical axis 'hidden'"):
        partition_spec(("hidden",), (8,), mesh)
    with pytest.raises(ShardingError, match="2 logical axes"):
        partition_spec(("batch", "length"), (8,), mesh)


def test_every_rule_names_mesh_axes(mesh):
    for axes in RULES.values():
        assert set(axes or ()) <= {*mesh.axis_names, ATTENTION_DATA}


def test_hints_are_hints(mesh):
    """No mesh: nothing happens. With one: laid out where it divides, left alone where it does not."""
    x = jnp.arange(24.0).reshape(4, 6)
    assert constrain(x, "batch", "heads") is x
    with jax.set_mesh(mesh):
        laid_out = jax.jit(lambda x: constrain(x, "batch", "heads"))(x)
        odd = jax.jit(lambda x: constrain(x, "batch", "heads"))(jnp.arange(20.0).reshape(4, 5))
    assert {s.data.shape for s in laid_out.addressable_shards} == {(1, 3)}
    assert (laid_out == x).all()
    assert odd.shape == (4, 5)


def test_mesh_sizes():
    assert resolve_mesh_shape(1, -1, 2, 8) == (1, 4, 2)
    assert resolve_mesh_shape(2, 2, 2, 8) == (2, 2, 2)
    for bad, message in [
        ((1, 3, -1), "cannot be divided by 3"),
        ((1, 4, 4), "product 16, but there are 8"),
        ((-1, -1, 1), "at most one"),
        ((0, 1, 1), "at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            resolve_mesh_shape(*bad, 8)
    assert dict(make_mesh(tensor=2).shape) == {"replica": 1, "fsdp": 4, "tensor": 2}


def test_sampling_mesh_sizes():
    """0 is the size in training; the devices keep their order, and groups of `tensor` stay together."""
    none = {"replica": 0, "fsdp": 0, "tensor": 0, "attention_data": 1}
    assert resolve_sampling_shape(none, (2, 2, 2)) == (2, 2, 1, 2)
    assert resolve_sampling_shape(none | {"replica": -1, "fsdp": 1}, (1, 4, 2)) == (4, 1, 1, 2)
    training = make_mesh(1, 4, 2)
    assert sampling_mesh(training, none) is training
    playing = sampling_mesh(training, none | {"fsdp": -1, "tensor": 4})
    assert playing.devices.shape == (1, 2, 4)
    assert list(playing.devices.flat) == list(training.devices.flat)
    with pytest.raises(ValueError, match=r"mesh_sampling.fsdp=4, mesh_sampling.tensor=8: product 32, but there are 8"):
        sampling_mesh(training, none | {"tensor": 8})


def test_a_sampling_mesh_whose_chips_share_a_copy_beyond_the_key_heads():
    """Two of `attention_data`, neighbours of those of `tensor`: each its rows, and its columns of MLPs and head."""
    sizes = {"replica": -1, "fsdp": 1, "tensor": 0, "attention_data": 2}
    playing = sampling_mesh(make_mesh(1, 4, 2), sizes)
    assert dict(playing.shape) == {"replica": 2, "fsdp": 1, "attention_data": 2, "tensor": 2}
    assert batch_parts(playing) == 4
    spec = lambda *axes: tuple(partition_spec(axes, (8,) * len(axes), playing))  # noqa: E731
    assert spec("embed", "mlp") == ("fsdp", ("tensor", "attention_data"))
    assert spec("embed", "heads") == ("fsdp", "tensor")
    assert spec("batch", "kv_heads") == (("replica", "fsdp", "attention_data"), "tensor")
    assert spec("mlp_batch", "mlp") == (("replica", "fsdp"), ("tensor", "attention_data"))
    with pytest.raises(ValueError, match=r"product 8, but there are 4 devices; .*=2 leaves 4 of 8 devices"):
        sampling_mesh(make_mesh(1, 4, 2), {"replica": 0, "fsdp": 0, "tensor": 0, "attention_data": 2})
    with pytest.raises(ValueError, match=r"mesh_sampling.attention_data=3: 8 devices cannot be divided by it"):
        sampling_mesh(make_mesh(1, 4, 2), sizes | {"attention_data": 3})


def test_replica_alone_goes_across_slices():
    """Devices of two slices, in any order; the TPU compiler's own ones are in test_programs."""
    chips = [SimpleNamespace(slice_index=i % 2, id=i, platform="cpu", device_kind="cpu") for i in range(8)]
    grid = device_grid((2, 2, 2), chips)
    assert [[d.slice_index for d in half.flat] for half in grid] == [[0] * 4, [1] * 4]
    assert device_grid((4, 1, 2), chips).shape == (4, 1, 2)
    with pytest.raises(ValueError, match=r"mesh.replica=1: the devices are of 2 slices.*mesh.replica=2 or a multiple"):
        device_grid((1, 4, 2), chips)
