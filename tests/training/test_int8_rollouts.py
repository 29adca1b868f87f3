"""Rollouts by a policy whose weights are rounded once a step: what plays, what learns, and who recomputes it."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from configs import debug
from rlver_jax import evaluate, verify
from rlver_jax.config.validate import ConfigError, check_training, validate
from rlver_jax.models.families import Qwen2Config
from rlver_jax.models.quantization import quantize, unrounded
from rlver_jax.models.qwen import Qwen2, init_params
from rlver_jax.parallel.mesh import make_mesh, sampling_mesh
from rlver_jax.rollout.ready import is_ready, rollout_model, sampling_copy, sampling_params
from rlver_jax.training.loop import train
from rlver_jax.training.metrics_file import read_metrics

CONFIG = Qwen2Config(96, 32, 48, 2, num_heads=4, num_kv_heads=2, head_dim=8)
FIELDS = {"rollout.param_dtype": "int8", "loss.recompute": True, "loss.importance_cap": 2.0}


def config_of(**fields):
    config = debug.get_config()
    overrides = {"train.steps": 2, "eval.every": 2, "checkpoint.every": 1, "log.dialogues_every": 1}
    config.update_from_flattened_dict(overrides | FIELDS | {name.replace("__", "."): x for name, x in fields.items()})
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rounded") / "run"
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    train(config_of(), folder, mesh, Console(file=io.StringIO(), width=200))
    return folder


@pytest.mark.parametrize(("scan", "dtype"), [(True, jnp.float32), (False, jnp.bfloat16)])
def test_the_copy_that_plays_is_the_rounded_model(scan, dtype):
    """On meshes of their own, from float32 weights: `quantize`'s own values, which other tests hold against NumPy."""
    plain = Qwen2(CONFIG, dtype=dtype, param_dtype=jnp.float32, scan_layers=scan)
    model = rollout_model(config_of(), plain)
    mesh = make_mesh(1, 4, 2)
    played = sampling_mesh(mesh, config_of(mesh_sampling__replica=4, mesh_sampling__fsdp=1).mesh_sampling)
    params = init_params(plain, jax.random.key(0), mesh)
    played_params = sampling_copy(model, played)(params)
    assert is_ready(played_params, sampling_params(model, played))
    as_float32 = unrounded(model).clone(dtype=jnp.float32)
    alone = init_params(as_float32.clone(param_dtype=jnp.float32), jax.random.key(0))
    want = quantize(alone, model)
    for path, x in jax.tree_util.tree_leaves_with_path(want):
        y = played_params
        for key in path:
            y = y[key.key]
        np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(x.astype(y.dtype), np.float32), str(path))
        if path[-1].key == "kernel" and path[0].key != "embed":
            assert y.dtype == jnp.int8


@pytest.mark.slow
def test_every_word_is_recomputed_from_rounded_weights(run, capsys):
    """The first step from what training began with, the second from a checkpoint of float32 weights."""
    logs = [str(run / "dialogues" / f"step_{step:06d}.jsonl") for step in (1, 2)]
    fields = [f"--config.{name}={value}" for name, value in FIELDS.items()]
    assert verify.main([*logs, "--config=configs/debug.py", *fields, f"--policy={run}"]) == 0
    words = capsys.readouterr().out
    assert "0 faults" in words
    assert "not recomputed" not in words
    assert verify.main([*logs[1:], "--config=configs/debug.py", f"--policy={run}"]) == 2
    assert "give --config.rollout.param_dtype=int8" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_the_trainers_policy_is_not_quite_the_samplers(run):
    """Their divergence is that of weights rounded to 255 steps; without rounding it is that of float32."""
    rows = [row for row in read_metrics(run / "metrics.jsonl") if row["step"]]
    for row in rows:
        assert 1e-7 < row["policy/rollout_kl"] < 1e-2


@pytest.mark.slow
def test_evaluations_are_played_by_what_is_exported(run, tmp_path, capsys):
    """`evaluate` knows no rounding, and reaches the same score as the evaluation in training."""
    known = read_metrics(run / "metrics.jsonl")[-1]["eval/score"]
    command = ["--config=configs/debug.py", f"--checkpoint={run}", "--step=2", f"--out={tmp_path / 'out'}"]
    assert evaluate.main(command) == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["score"] == pytest.approx(known, abs=1e-4)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"loss__recompute": False, "loss__importance_cap": 0.0}, "set loss.recompute=True and loss.importance_cap"),
        ({"loss__importance_cap": 0.0}, "set loss.recompute=True and loss.importance_cap"),
        ({"lora__rank": 4}, "set policy.param_dtype=int8"),
    ],
)
def test_refused(fields, words):
    with pytest.raises(ConfigError, match=f"rollout.param_dtype='int8'.*{words}"):
        check_training(config_of(**fields))


def test_other_dtypes_are_refused():
    with pytest.raises(ConfigError, match=r"rollout.param_dtype='int4': expected one of , int8"):
        validate(config_of(rollout__param_dtype="int4"))
