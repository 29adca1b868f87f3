"""`rlver sft` with an adapter: what it learns, saves and exports, and how it resumes."""

import json

import numpy as np
import pytest

from configs import debug
from rlver_jax import evaluate, export, sft
from rlver_jax.models.families import Qwen2Config
from rlver_jax.models.hf_weights import load_params
from rlver_jax.training.metrics_file import read_metrics
from rlver_jax.training.trained_policy import TrainedPolicy
from tests.compare_runs import differences
from tests.conftest import write_debug_model

pytestmark = pytest.mark.slow
FIELDS = {
    "sft.batch": 4, "sft.eval_every": 2, "train.steps": 3, "checkpoint.every": 1, "checkpoint.keep_last": 9,
    "sft.held_out": 0.4, "log.tensorboard": False, "lora.rank": 4, "lora.targets": "q,o,up", "user.init": "path",
    "train.learning_rate": 1e-2, "mesh.fsdp": 1, "mesh.tensor": 1, "mesh.replica": -1, "policy.dtype": "float32",
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    return folder, write_debug_model(folder)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    out = tmp_path_factory.mktemp("logs") / "played"
    played = ["--config=configs/debug.py", "--config.eval.batch=8", f"--out={out}", "--repeats=2"]
    assert evaluate.main(played) == 0
    return out / "dialogues.jsonl"


def learn(workdir, base, log, **fields):
    overrides = FIELDS | {name.replace("__", "."): value for name, value in fields.items()}
    words = ["--config=configs/debug.py", "--role=user", f"--data={log}", f"--workdir={workdir}"]
    words += [f"--config.user.path={base[0]}", *(f"--config.{name}={value}" for name, value in overrides.items())]
    assert sft.main(words) == 0
    return workdir


@pytest.fixture(scope="module")
def unbroken(base, log, tmp_path_factory):
    return learn(tmp_path_factory.mktemp("unbroken") / "run", base, log)


def test_it_learns(unbroken):
    held_out = [row["held_out/loss"] for row in read_metrics(unbroken / "metrics.jsonl") if "held_out/loss" in row]
    assert len(held_out) == 3
    assert held_out[-1] < held_out[0]
    record = json.loads((unbroken / "checkpoints" / "000003" / "record" / "metadata").read_text())["record"]
    names = {name for name in record["leaves"] if name.startswith("params/")}
    layers = Qwen2Config.from_hf(debug.WORLD).num_layers
    paths = [f"layer_{i}/{name}" for i in range(layers) for name in ("attn/q", "attn/o", "up")]
    assert names == {f"params/policy/{path}/lora_{factor}" for path in paths for factor in "ab"}


def test_resumed_it_ends_as_one_that_was_never_interrupted(unbroken, base, log, tmp_path):
    """The second process measures the held-out dialogues of step 1, its last, once more: all else is equal."""
    learn(tmp_path / "run", base, log, train__steps=1)
    learn(tmp_path / "run", base, log)
    assert all(what.startswith("step 1: held_out/") for what in differences(unbroken, tmp_path / "run"))


def test_what_was_fitted_plays_as_a_user(unbroken, base, tmp_path):
    out = tmp_path / "user"
    assert export.main([f"--workdir={unbroken}", f"--out={out}", "--step=last", "--merged", "--dtype=float32"]) == 0
    fitted, before = load_params(out, base[1]), load_params(base[0], base[1])
    layer, old = fitted["layer_0"], before["layer_0"]
    np.testing.assert_array_equal(layer["gate"]["kernel"], old["gate"]["kernel"])
    moved = np.asarray(layer["up"]["kernel"], np.float64) - np.asarray(old["up"]["kernel"])
    assert np.linalg.matrix_rank(moved, tol=1e-6) == 4
    assert TrainedPolicy.open(unbroken, "last").weights(base[1])["layer_0"]["up"]["lora_a"].shape[1] == 4
