"""What `import rlver_jax` offers to scripts: every name, nothing before it is used, and a script that uses them."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import rlver_jax

ROOT = Path(__file__).resolve().parents[1]
NAMES = [name for name in rlver_jax.__all__ if name != "__version__"]


def run(code, folder):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_what_is_defined(name):
    module, _, defined = rlver_jax._PUBLIC[name].partition(":")
    value = getattr(importlib.import_module(f"rlver_jax.{module}"), defined)
    assert getattr(rlver_jax, name) is value
    assert value.__module__ == f"rlver_jax.{module}", "where it is defined, not where it is imported"
    assert value.__doc__


def test_type_checkers_are_told_the_same():
    tree = ast.parse(Path(rlver_jax.__file__).read_text(encoding="utf-8"))
    told = {
        alias.asname or alias.name: f"{node.module.removeprefix('rlver_jax.')}:{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rlver_jax.")
        for alias in node.names
    }
    assert told == rlver_jax._PUBLIC
    assert sorted(told) == sorted(NAMES)
    assert dir(rlver_jax) == sorted(rlver_jax.__all__)


def test_names_that_are_not_there():
    with pytest.raises(AttributeError, match="module 'rlver_jax' has no attribute 'trian'"):
        rlver_jax.trian  # noqa: B018
    from rlver_jax import train

    assert train.main, "the commands stay modules"


def test_importing_it_imports_nothing_else(tmp_path):
    code = """
import sys
before = set(sys.modules)
import rlver_jax
assert rlver_jax.__version__ and "Agents" in dir(rlver_jax)
ours = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(ours - set(sys.stdlib_module_names)))
"""
    assert run(code, tmp_path) == "['rlver_jax']\n"


SCRIPT = """
import jax
import rich.console
import rlver_jax

config = rlver_jax.load_config("configs/debug.py", {"train.steps": 1, "log.dialogues_every": 1, "eval.every": 0})
mesh = rlver_jax.make_mesh(**config.mesh, devices=jax.devices()[:1])
assert rlver_jax.train_policy(config, "run", mesh, rich.console.Console(quiet=True)) == 1
row = rlver_jax.read_metrics("run/metrics.jsonl")[-1]
records = rlver_jax.read_dialogues("run/dialogues/step_000001.jsonl")
settings = rlver_jax.reward_settings(config)
rewards = rlver_jax.recomputed_rewards(records, settings)
assert all(abs(one.value - record["reward"]) <= one.rounding for one, record in zip(rewards, records, strict=True))
assert abs(sum(one.value for one in rewards) / len(rewards) - row["reward/mean"]) < 1e-6

policy = rlver_jax.TrainedPolicy.open("run")
profiles = rlver_jax.read_profiles([config.data.eval])[:2]
played = rlver_jax.load_evaluation(config, profiles, policy_weights=policy.weights).play_all()
print(policy.step, len(records), [record["profile"] for record in played] == [profile.id for profile in profiles])
"""


@pytest.mark.slow
def test_a_script_trains_reads_recomputes_and_plays(tmp_path):
    assert run(SCRIPT, tmp_path).splitlines()[-1] == "1 8 True"


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"train.stpes": 1}, r"train\.stpes: unknown field; did you mean train\.steps\?"),
        ({"train": 1}, "train: unknown field"),
        ({"train.steps": "many"}, "configs/debug.py: .*field 'steps'"),
    ],
)
def test_fields_that_a_config_has_not(fields, told):
    with pytest.raises(rlver_jax.ConfigError, match=told):
        rlver_jax.load_config("configs/debug.py", fields)
