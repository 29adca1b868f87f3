"""The device mesh: `replica` (across slices), `fsdp` (weights and batch), `tensor` (heads, MLP columns, vocabulary)."""

import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

AXES = ("replica", "fsdp", "tensor")


def resolve_mesh_shape(replica: int, fsdp: int, tensor: int, num_devices: int) -> tuple[int, int, int]:
    """Sizes of the three axes; at most one may be -1 and takes what the others leave.

    Raises:
        ValueError: a size is zero or below -1, two are -1, or the product is not the number of devices.
    """
    sizes = dict(zip(AXES, (replica, fsdp, tensor), strict=True))
    text = ", ".join(f"mesh.{name}={size}" for name, size in sizes.items())
    free = [name for name, size in sizes.items() if size == -1]
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


def make_mesh(replica: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh over all devices (or the given ones), `tensor` innermost so that its neighbours are the closest chips."""
    devices = list(jax.devices() if devices is None else devices)
    shape = resolve_mesh_shape(replica, fsdp, tensor, len(devices))
    grid = mesh_utils.create_device_mesh(shape, devices=devices)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
