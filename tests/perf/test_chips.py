"""What is said when a topology can't be planned for."""

import dataclasses
import importlib.util
import itertools
import os
import re

import jax
import numpy as np
import pytest
from jax.experimental import mesh_utils

from rlver_jax import plan
from rlver_jax.perf.chips import CHIPS, PlanError, Torus, chip_of, topology_devices


@pytest.mark.parametrize("topology", ["v9:2x2", "v5e", "", "2x4"])
def test_unknown_chips(topology):
    with pytest.raises(PlanError, match=r"expected FAMILY:SIZES with a family of v4, v5e, v5p, v6e, such as v5e:2x4"):
        chip_of(topology)


def test_every_chip_names_its_source():
    for chip in CHIPS.values():
        assert chip.source.startswith("https://docs.cloud.google.com/tpu/docs/")
        assert chip.dcn_bandwidth < chip.ici_bandwidth / 10
        assert 0.95 < chip.usable_gib / chip.hbm_gib < 1.01


def test_the_network_between_slices():
    """Interfaces of a host by its chips, as documented: v5e 2 x 100 Gbit/s for 8, v6e 4 x 200 for 8; v5p 50 a chip."""
    wanted = {"v5e": 2 * 100 / 8, "v6e": 4 * 200 / 8, "v5p": 50}
    assert {name: CHIPS[name].dcn_bandwidth * 8 / 1e9 for name in wanted} == wanted


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device of a topology."""

    coords: tuple[int, int, int]
    device_kind: str
    id: int
    platform: str = "tpu"
    slice_index: int = 0
    process_index: int = 0
    core_on_chip: int = 0


@pytest.mark.parametrize(
    ("kind", "sizes", "mesh", "axes", "hops"),
    [
        ("TPU v5", (4, 4, 4), (1, 16, 4), (2,), 2),  # a ring of four, both ways
        ("TPU v5", (4, 4, 4), (1, 16, 4), (0, 1, 2), 6),
        ("TPU v5", (2, 2, 1), (1, 1, 4), (2,), 2),  # no ring: once along each side of the square
        ("TPU v5 lite", (2, 4, 1), (1, 2, 4), (2,), 2),  # a square as well
        ("TPU v5 lite", (2, 4, 1), (1, 1, 8), (2,), 4),
        ("TPU v5 lite", (16, 16, 1), (1, 16, 16), (2,), 8),  # the one size of v5e and v6e that is a ring
        ("TPU v6 lite", (8, 8, 1), (1, 8, 8), (2,), 7),
    ],
)
def test_hops(kind, sizes, mesh, axes, hops):
    """To the farthest chip, by hand, of groups that lie where `make_mesh` puts them."""
    chips = [Chip(position, kind, i) for i, position in enumerate(itertools.product(*map(range, sizes)))]
    grid = mesh_utils.create_device_mesh(mesh, devices=chips, allow_split_physical_axes=True)
    torus, numbers = Torus.of(grid.flat), np.arange(len(chips)).reshape(mesh)
    group = numbers[tuple(slice(None) if axis in axes else 0 for axis in range(3))].ravel()
    assert torus.hops("all-gather", group) == hops
    assert torus.hops("all-reduce", group) == 2 * hops
    assert torus.hops("collective-permute", group) == 1
    assert torus.hops("DCN all-reduce", ()) == 0


def test_devices_without_coordinates_are_no_torus():
    assert Torus.of(jax.devices()).hops("all-reduce", range(len(jax.devices()))) == 0


def test_without_the_compiler(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert plan.main(["--config=configs/ppo_think_7b.py", "--topology=v5e:2x4"]) == 2
    assert "pip install -e '.[tpu]' in the clone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--topology=v5e:2x4"], "no --config was given"),
        (["--config=configs/base.py"], "no --topology was given"),
        (["--config=configs/base.py", "--topology=v5e:2x4", "x"], "found 'x', expected flags only"),
    ],
)
def test_bad_usage(argv, message, capsys):
    assert plan.main(argv) == 2
    assert message in re.sub(r"\s+", " ", capsys.readouterr().err)


@pytest.mark.slow
def test_limits_are_the_compilers():
    """One array of 200 GiB fits no chip, and the compiler says how much would."""
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install '.[tpu]'")
    import jax.numpy as jnp

    before = dict(os.environ)
    for family, topology in {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}.items():
        devices = topology_devices(topology)
        assert len(devices) == 4, "a chip is one device"
        assert dict(os.environ) == before, "what says that this is a TPU's host would make other programs look for it"
        sharding = jax.sharding.SingleDeviceSharding(devices[0])
        large = jax.ShapeDtypeStruct((200, 2**30), jnp.int8, sharding=sharding)
        with pytest.raises(
            jax.errors.JaxRuntimeError, match=rf"exceeds available HBM \({CHIPS[family].usable_gib}0*G\)"
        ):
            jax.jit(lambda x: x + 1).lower(large).compile()
    with pytest.raises(PlanError, match="knows no such topology"):
        topology_devices("v5e:3x7")
