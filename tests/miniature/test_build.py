"""A miniature built in seconds: too small to judge, whole enough to be trained in."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlver_jax.miniature import assets, check
from rlver_jax.profiles.schema import read_profiles
from rlver_jax.runs.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]


def run(module: str, *flags: str) -> subprocess.CompletedProcess:
    """An entry point in a process with one device."""
    command = [sys.executable, "-m", f"rlver_jax.{module}", *flags]
    environ = os.environ | {"XLA_FLAGS": ""}
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.slow
def test_a_built_miniature_trains_and_is_judged_twice(tmp_path):
    folder, workdir = tmp_path / "built", tmp_path / "run"
    build = [f"--out={folder}", "--user_steps=20", "--policy_steps=10", "--rl_steps=0"]
    result = run("miniature.build", *build, f"--json={tmp_path / 'figures.json'}")
    assert result.returncode == 1, f"so little training cannot hold the gates: {result.stderr}"
    found = json.loads((tmp_path / "figures.json").read_text())
    assert set(found["attacks"]) == set(check.ATTACKS)
    assert found["agreement_base"]["turns"] > 0
    assert json.loads((folder / assets.MANIFEST).read_text())["quality"] == found
    assert len(read_profiles([folder / "train.jsonl"])) == 512
    assert (folder / "user" / "model.safetensors").stat().st_size < 6e6
    result = run("miniature.build", *build)
    assert (result.returncode, "holds a finished miniature" in result.stderr) == (2, True)
    flags = [f"--config={folder / 'config.py'}", f"--workdir={workdir}", "--config.train.steps=1"]
    flags += [
        "--config.rollout.batch=16",
        "--config.rollout.group=2",
        "--config.alarms.readable_min=0.0",
        "--config.alarms.reply_tokens_min=0.0",
    ]
    flags += ["--config.eval.num_profiles=16", "--config.eval.batch=16", "--config.eval.every=1"]
    result = run("train", *flags)
    assert result.returncode == 0, result.stderr
    rows = read_metrics(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1]
    assert all(0 <= row[name] <= 100 for row in rows for name in ("eval/score", "eval/rule_score"))
    assert "by the gold judge" in result.stdout
