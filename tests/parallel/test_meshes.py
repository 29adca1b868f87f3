"""Whole runs on meshes: they play and learn what one device does, and move from one mesh to another."""

import functools
import io
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from rich.console import Console

from configs import debug, miniature
from rlver_jax.parallel.mesh import make_mesh
from rlver_jax.training.loop import train
from tests.training.test_loop import SEED, check_equal, policy_of

ROOT = Path(__file__).resolve().parents[2]
ONE = (1, 1, 1)
# Sampling has fewer parts of each matrix than training, and other rows on each device.
APART = {"mesh_sampling.replica": -1, "mesh_sampling.fsdp": 1}


def miniature_config(**fields) -> ConfigDict:
    config = miniature.get_config("ppo")
    config.update_from_flattened_dict(
        {
            "eval.every": 0, "rollout.batch": 8, "rollout.group": 1, "rollout.max_turns": 3,
            "train.minibatches": 1, "train.microbatches": 1,
            "log.dialogues_every": 1, "log.tensorboard": False, "alarms.readable_min": 0.0,
        } | fields
    )  # fmt: skip
    return config


def run(config: ConfigDict, workdir: Path, shape: tuple[int, int, int]) -> Path:
    """Trains on that many of the eight devices."""
    mesh = make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
    train(config, workdir, mesh, Console(file=io.StringIO()))
    return workdir


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Steps of a run -> the folder of such a run on one device."""
    play = lambda steps: run(miniature_config(**{"train.steps": steps}), tmp_path_factory.mktemp("alone"), ONE)  # noqa: E731
    return functools.cache(play)


@pytest.mark.parametrize(
    ("shape", "fields", "steps"),
    [
        pytest.param((1, 8, 1), {}, 5, marks=pytest.mark.long),
        pytest.param((1, 4, 2), {}, 5, marks=pytest.mark.long),
        pytest.param((2, 2, 2), {}, 5, marks=pytest.mark.long),
        pytest.param((1, 4, 2), APART, 5, marks=pytest.mark.long),
    ],
    ids=["fsdp8", "fsdp4-tensor2", "replica2-fsdp2-tensor2", "fsdp4-tensor2-apart"],
)
def test_the_miniature_learns_the_same_on_eight_devices(shape, fields, steps, alone, tmp_path):
    check_equal(run(miniature_config(**{"train.steps": steps}, **fields), tmp_path, shape), alone(steps))


@pytest.mark.long
def test_a_run_moves_from_8_to_4_to_16_devices(tmp_path):
    """Each part reads the checkpoint of the one before on another mesh, and ends as a run on one device."""
    steps = 5
    fields = {"train.seed": SEED, "eval.every": 0, "log.tensorboard": False, "log.dialogues_every": 1}
    moving = tmp_path / "moving"
    for last, devices, tensor in ((1, 8, 2), (3, 4, 1), (steps, 16, 2)):
        environ = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        overrides = fields | {"train.steps": last, "mesh.tensor": tensor}
        flags = [f"--config.{name}={value}" for name, value in overrides.items()]
        command = [sys.executable, "-m", "rlver_jax.train", f"--config={debug.__file__}", f"--workdir={moving}"]
        done = subprocess.run([*command, *flags], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        assert last == 1 or "resuming after step" in done.stdout
    config = debug.get_config()
    config.update_from_flattened_dict(fields | {"train.steps": steps})
    one = run(config, tmp_path / "one", ONE)
    check_equal(moving, one)
    for a, b in zip(jax.tree.leaves(policy_of(moving)), jax.tree.leaves(policy_of(one)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)
