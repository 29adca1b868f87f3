"""The device mesh: `replica` (across slices), `fsdp` (weights and batch), `tensor` (heads, MLP columns, vocabulary).

Training and sampling may look at the same devices as two meshes: a decode step that finds its weights split over
`fsdp` gathers them all for one token a row, so that sampling wants fewer `fsdp` and more `replica` or `tensor`. Where
there are no more key heads for `tensor`, `attention_data` lets more devices share a copy: each has rows of its own in
attention (data parallelism), and columns of its own in MLPs and in the vocabulary, for all their rows.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

AXES = ("replica", "fsdp", "tensor")
ATTENTION_DATA = "attention_data"  # of the sampling mesh alone, between fsdp and tensor; a mesh of 1 has no such axis


def resolve_mesh_shape(
    replica: int, fsdp: int, tensor: int, num_devices: int, name: str = "mesh"
) -> tuple[int, int, int]:
    """Sizes of the three axes; at most one may be -1 and takes what the others leave.

    Args:
        name: of the config's fields, for messages.

    Raises:
        ValueError: a size is zero or below -1, two are -1, or the product is not the number of devices.
    """
    sizes = dict(zip(AXES, (replica, fsdp, tensor), strict=True))
    text = ", ".join(f"{name}.{axis}={size}" for axis, size in sizes.items())
    free = [axis for axis, size in sizes.items() if size == -1]
    if any(size == 0 or size < -1 for size in sizes.values()) or len(free) > 1:
        raise ValueError(f"{text}: each size must be at least 1, and at most one of them -1 (= whatever is left)")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free:
        if num_devices % fixed:
            raise ValueError(f"{text}: {num_devices} devices cannot be divided by {fixed}; choose a divisor")
        sizes[free[0]] = num_devices // fixed
    elif fixed != num_devices:
        raise ValueError(
            f"{text}: product {fixed}, but there are {num_devices} devices; set one size to -1 to fill them"
        )
    return sizes["replica"], sizes["fsdp"], sizes["tensor"]


def resolve_sampling_shape(sizes: Mapping[str, int], training: Sequence[int]) -> tuple[int, int, int, int]:
    """Sizes of the sampling mesh over the devices of a training mesh: replica, fsdp, attention_data, tensor.

    Args:
        sizes: by axis, as in config.mesh_sampling; 0: as in training.
        training: sizes of AXES.

    Raises:
        ValueError: as `resolve_mesh_shape`, or the devices can't be divided by attention_data.
    """
    count, rows = math.prod(training), sizes.get(ATTENTION_DATA, 1)
    if count % rows:
        raise ValueError(
            f"mesh_sampling.attention_data={rows}: {count} devices cannot be divided by it; choose a divisor"
        )
    replica, fsdp, tensor = (sizes[axis] or size for axis, size in zip(AXES, training, strict=True))
    try:
        replica, fsdp, tensor = resolve_mesh_shape(replica, fsdp, tensor, count // rows, "mesh_sampling")
    except ValueError as error:
        if rows == 1:
            raise
        reason = f"mesh_sampling.attention_data={rows} leaves {count // rows} of {count} devices for the other axes"
        raise ValueError(f"{error} ({reason})") from None
    return replica, fsdp, rows, tensor


def make_mesh(replica: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh over all devices (or the given ones), `tensor` innermost so that its neighbours are the closest chips.

    Where the devices are of several TPU slices, `replica` goes across slices: only gradients, once an update, take
    the slow way between them.

    Raises:
        ValueError: the sizes don't fit the devices, or `replica` is not a multiple of the number of slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = resolve_mesh_shape(replica, fsdp, tensor, len(devices))
    return _mesh(device_grid(shape, devices))


def device_grid(shape: tuple[int, int, int], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices by (replica, fsdp, tensor); raises ValueError as `make_mesh` does."""
    replica, fsdp, tensor = shape
    slices = _slices(replica, devices, "mesh")
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices=devices, allow_split_physical_axes=True)
    inside = (replica // slices, fsdp, tensor)
    return mesh_utils.create_hybrid_device_mesh(
        inside, (slices, 1, 1), devices=devices, allow_split_physical_axes=True
    )  # fmt: skip


def sampling_mesh(mesh: Mesh, sizes: Mapping[str, int]) -> Mesh:
    """The devices of a training mesh as the mesh that dialogues are played on; the same mesh for equal sizes.

    It takes the devices in the training mesh's order, so that weights and dialogues pass between the two in jitted
    programs, and each group of `tensor` neighbours stays one.

    Args:
        sizes: as in `resolve_sampling_shape`.

    Raises:
        ValueError: the sizes don't fit the devices.
    """
    replica, fsdp, rows, tensor = resolve_sampling_shape(sizes, mesh.devices.shape)
    _slices(replica, mesh.devices.flat, "mesh_sampling")
    if rows > 1:
        return _mesh(mesh.devices.reshape(replica, fsdp, rows, tensor), (*AXES[:2], ATTENTION_DATA, AXES[2]))
    shape = replica, fsdp, tensor
    return mesh if shape == mesh.devices.shape else _mesh(mesh.devices.reshape(shape))


def make_sampling_mesh(training: Mapping[str, int], sampling: Mapping[str, int]) -> Mesh | None:
    """For programs that only play: the sampling mesh over all devices; None on a single one, which needs none."""
    if jax.device_count() == 1:
        return None
    replica, fsdp, tensor = (training[axis] for axis in AXES)
    return sampling_mesh(make_mesh(replica, fsdp, tensor), sampling)


def batch_parts(mesh: Mesh | None) -> int:
    """Devices, or groups of `tensor` neighbours, that a batch's rows are split over."""
    return 1 if mesh is None else mesh.shape["replica"] * mesh.shape["fsdp"] * mesh.shape.get(ATTENTION_DATA, 1)


def _slices(replica: int, devices: Iterable[jax.Device], name: str) -> int:
    """TPU slices that the devices are of; raises ValueError where another axis than `replica` would cross them."""
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if replica % slices:
        raise ValueError(
            f"{name}.replica={replica}: the devices are of {slices} slices, and only replica may go across them; "
            f"choose {name}.replica={slices} or a multiple of it"
        )
    return slices


def _mesh(grid: np.ndarray, axes: tuple[str, ...] = AXES) -> Mesh:
    return Mesh(grid, axes, axis_types=(AxisType.Auto,) * len(axes))
