"""Whole runs on meshes: they play and learn what one device does, and move from one mesh to another."""

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
from rlver_jax.trainer import train

from .test_trainer import policy_of, records_of, rows_of

ROOT = Path(__file__).resolve().parents[1]
ONE = (1, 1, 1)
# Sampling has fewer parts of each matrix than training, and other rows on each device.
APART = {"mesh_sampling.replica": -1, "mesh_sampling.fsdp": 1}


def debug_config(**fields) -> ConfigDict:
    config = debug.get_config("ppo")
    config.update_from_flattened_dict({"train.steps": 2, "eval.every": 0, "log.tensorboard": False} | fields)
    return config


def miniature_config(**fields) -> ConfigDict:
    config = miniature.get_config("ppo")
    config.update_from_flattened_dict(
        {
            "train.steps": 5, "eval.every": 0, "rollout.batch": 8, "rollout.group": 1, "rollout.max_turns": 3,
            "train.microbatches": 1, "log.dialogues_every": 1, "log.tensorboard": False, "alarms.readable_min": 0.0,
        } | fields
    )  # fmt: skip
    return config


def run(config: ConfigDict, workdir: Path, shape: tuple[int, int, int]) -> Path:
    """Trains on that many of the eight devices."""
    mesh = make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
    train(config, workdir, mesh, Console(file=io.StringIO()))
    return workdir


def check_equal(found: Path, expected: Path) -> None:
    """Equal dialogues at step 1; losses and emotions of every step within 1e-3."""
    says = [[m["content"] for r in records_of(folder, 1) for m in r["messages"]] for folder in (found, expected)]
    assert says[0] == says[1]
    mine, theirs = rows_of(found), rows_of(expected)
    assert len(mine) == len(theirs) > 1
    for a, b in zip(mine, theirs, strict=True):
        names = [name for name in b if name.startswith("emotion/") or name.endswith("/loss")]
        assert {"emotion/final_mean", "policy/loss", "critic/loss"} <= set(names)
        for name in names:
            assert a[name] == pytest.approx(b[name], abs=1e-3), f"step {b['step']}: {name}"


@pytest.fixture(scope="module")
def debug_run(tmp_path_factory) -> Path:
    return run(debug_config(), tmp_path_factory.mktemp("debug"), ONE)


def test_eight_devices_learn_what_one_does(debug_run, tmp_path):
    """With every axis in use, and dialogues played on another mesh than the one that learns."""
    check_equal(run(debug_config(**APART), tmp_path, (2, 2, 2)), debug_run)


@pytest.fixture(scope="module")
def miniature_run(tmp_path_factory) -> Path:
    return run(miniature_config(), tmp_path_factory.mktemp("miniature"), ONE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "fields"),
    [((1, 8, 1), {}), ((1, 4, 2), {}), ((2, 2, 2), {}), ((1, 4, 2), APART)],
    ids=["fsdp8", "fsdp4-tensor2", "replica2-fsdp2-tensor2", "fsdp4-tensor2-apart"],
)
def test_the_miniature_learns_the_same_on_eight_devices(shape, fields, miniature_run, tmp_path):
    check_equal(run(miniature_config(**fields), tmp_path, shape), miniature_run)


@pytest.mark.slow
def test_a_run_moves_from_8_to_4_to_16_devices(debug_run, tmp_path):
    """Each part reads the checkpoint of the one before on another mesh, and ends as a run on one device."""
    steps = 5
    for last, devices, tensor in ((1, 8, 2), (3, 4, 1), (steps, 16, 2)):
        environ = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        fields = {
            "train.steps": last, "eval.every": 0, "log.tensorboard": False, "mesh.tensor": tensor,
            "checkpoint.keep_last": 9,
        }  # fmt: skip
        flags = [f"--config.{name}={value}" for name, value in fields.items()]
        command = [sys.executable, "-m", "rlver_jax.train", f"--config={debug.__file__}:ppo", f"--workdir={tmp_path}"]
        done = subprocess.run([*command, *flags], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
    one = run(debug_config(**{"train.steps": steps}), tmp_path / "one", ONE)
    check_equal(tmp_path, one)
    for a, b in zip(jax.tree.leaves(policy_of(tmp_path)), jax.tree.leaves(policy_of(one)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)
