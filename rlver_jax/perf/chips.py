"""TPU chips: their limits, with the source of every number; and devices of a topology without the hardware."""

import contextlib
import dataclasses
import importlib.util
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rlver_jax.config.extras import install_command

DOCS = "https://docs.cloud.google.com/tpu/docs/"
# A message from a chip to its neighbour takes that long, however short it is: "typically around 1us", of all families,
# https://jax-ml.github.io/scaling-book/sharding (a note on ICI latency).
HOP_S = 1e-6


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, with all its cores.

    Attributes:
        hbm_gib: memory, GiB.
        usable_gib: what the compiler gives to one program, as its message says when a program exceeds it.
        flops: peak of bfloat16 products, FLOP/s.
        hbm_bandwidth: bytes/s.
        ici_bandwidth: bytes/s out of a chip over all its links: half of what the documents call bidirectional.
        dcn_bandwidth: bytes/s into a chip from other slices: its share of its host's network interfaces.
        cores: name of libtpu's configuration in which all cores of a chip are one device.
        source: where the numbers are from.
    """

    hbm_gib: float
    usable_gib: float
    flops: float
    hbm_bandwidth: float
    ici_bandwidth: float
    dcn_bandwidth: float
    cores: str
    source: str


CHIPS = {
    # Links: 6 of 50 GB/s each way, table 4 of arXiv 2304.01433. Its hosts' network is not published: 50 Gbit/s a chip,
    # as v5p, whose hosts have as many chips.
    "v4": Chip(32, 30.75, 275e12, 1200e9, 300e9, 6.25e9, "megacore", f"{DOCS}v4, arXiv 2304.01433; DCN as v5p"),
    "v5e": Chip(16, 15.75, 197e12, 819e9, 200e9, 3.125e9, "default", f"{DOCS}v5e"),  # 2 x 100 Gbit/s for 8 chips
    "v5p": Chip(95, 95.74, 459e12, 2765e9, 600e9, 6.25e9, "default", f"{DOCS}v5p"),  # 50 Gbit/s a chip
    "v6e": Chip(32, 31.25, 918e12, 1638e9, 400e9, 12.5e9, "default", f"{DOCS}v6e"),  # 4 x 200 Gbit/s for 8 chips
}

_HOST = {
    "TPU_SKIP_MDS_QUERY": "1",  # it would wait for a metadata server
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is used: other plans may be made at the same time
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # any: what isn't set, libtpu asks for, and complains
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Torus:
    """Where the chips of a program are, and how they are linked.

    Attributes:
        coordinates: of each chip, by its number in the program; empty: they have none, as devices of a CPU.
        sizes: chips along each axis.
        rings: whether the last chip of an axis is linked with the first one.
    """

    coordinates: tuple[tuple[int, ...], ...] = ()
    sizes: tuple[int, ...] = ()
    rings: tuple[bool, ...] = ()

    @classmethod
    def of(cls, devices: Iterable[Any]) -> "Torus":
        """Of a mesh's devices, in its order.

        v4 and v5p are rings where every axis is a multiple of 4, v5e and v6e along an axis of 16
        (https://jax-ml.github.io/scaling-book/tpus).
        """
        devices = list(devices)
        if not hasattr(devices[0], "coords"):
            return cls()
        coordinates = tuple(tuple(device.coords) for device in devices)
        sizes = tuple(max(along) + 1 for along in zip(*coordinates, strict=True))
        if "lite" in devices[0].device_kind:
            return cls(coordinates, sizes, tuple(size == 16 for size in sizes))
        return cls(coordinates, sizes, (all(size % 4 == 0 for size in sizes),) * len(sizes))

    def hops(self, kind: str, chips: Sequence[int]) -> int:
        """Hops that a collective inside a slice makes one after another: as many as to the farthest of its chips.

        An all-reduce scatters sums and gathers them again. A permutation, or a send, goes to a neighbour.
        """
        if kind in ("collective-permute", "send"):
            return 1
        coordinates = [self.coordinates[chip] for chip in chips if self.coordinates]
        way = max((self._distance(one, other) for one in coordinates for other in coordinates), default=0)
        return way * (2 if kind == "all-reduce" else 1)

    def _distance(self, one: Sequence[int], other: Sequence[int]) -> int:
        steps = [abs(a - b) for a, b in zip(one, other, strict=True)]
        return sum(min(n, size - n) if ring else n for n, size, ring in zip(steps, self.sizes, self.rings, strict=True))


class PlanError(ValueError):
    """A plan that cannot be made; the message says why and what to do."""


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as "v5p:4x4x4".

    Raises:
        PlanError: another family, or no sizes.
    """
    family, _, sizes = topology.partition(":")
    if family not in CHIPS or not sizes:
        raise PlanError(
            f"--topology={topology!r}: expected FAMILY:SIZES with a family of {', '.join(CHIPS)}, such as v5e:2x4 "
            f"(one host of 8 chips) or v5p:4x4x4 (64 chips)"
        )
    return CHIPS[family]


def topology_devices(topology: str, slices: int = 1) -> list[Any]:
    """Devices of a topology, so many slices of it, for compiling only; nothing is asked of a network.

    Raises:
        PlanError: libtpu, which holds the TPU compiler, is not installed, or knows no such topology.
    """
    chip = chip_of(topology)
    if slices < 1:
        raise PlanError(f"--slices={slices}: expected 1 or more slices of {topology}")
    if importlib.util.find_spec("libtpu") is None:
        raise PlanError(
            f"the TPU compiler is not installed: {install_command('tpu')} (it runs on any machine, without a TPU)"
        )
    from jax.experimental import topologies  # heavy, and of no use without libtpu

    try:
        with _as_if_on_a_host():
            description = topologies.get_topology_desc(topology, "tpu", chip_config_name=chip.cores, num_slices=slices)
    except Exception as error:  # libtpu's errors have no common type
        raise PlanError(f"--topology={topology!r}: the TPU compiler knows no such topology: {error}") from error
    return list(description.devices)


@contextlib.contextmanager
def _as_if_on_a_host() -> Iterator[None]:
    """Sets what libtpu reads once, when it is loaded; removed afterwards: other programs detect TPU hosts by it."""
    missing = {name: value for name, value in _HOST.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            del os.environ[name]
