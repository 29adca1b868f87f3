"""A miniature built in seconds: too small to judge, whole enough to be trained in."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from rlver_jax.miniature import assets, build, check
from rlver_jax.profiles.schema import read_profiles
from rlver_jax.training.metrics_file import read_metrics

ROOT = Path(__file__).resolve().parents[2]


def run(module: str, *flags: str) -> subprocess.CompletedProcess:
    """An entry point in a process with one device."""
    code = f"import sys\nfrom rlver_jax.miniature import assets, check\nfrom rlver_jax.{module} import main\n"
    code += "assets.EVAL_COUNT, check.ATTACKED = 16, 8\nsys.exit(main())"  # measured on few people
    command = [sys.executable, "-c", code, *flags]
    environ = os.environ | {"XLA_FLAGS": ""}
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=1800, check=False)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(folder, flags that it was built with)."""
    folder = tmp_path_factory.mktemp("miniature") / "built"
    flags = [f"--out={folder}", "--user_steps=4", "--policy_steps=40", "--base_steps=2", "--rl_steps=0"]
    result = run("miniature.build", *flags, f"--json={folder.parent / 'figures.json'}")
    assert result.returncode == 1, f"so little training cannot hold the gates: {result.stderr}"
    return folder, flags


def test_a_folder_without_manifest_is_not_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(check, "measure", lambda folder: pytest.fail("minutes of measuring before the error"))
    assert build.main(["--check", f"--out={tmp_path}"]) == 2
    assert "manifest.json" in capsys.readouterr().err.replace("\n", "")


def test_what_is_shipped_is_measured_by_default_and_keeps_its_bounds(capsys, monkeypatch):
    """By the manifest's own figures, gates on the trained policy's text among them; files are those that it names."""
    shipped = json.loads((assets.shipped() / assets.MANIFEST).read_text())
    folders = []
    monkeypatch.setattr(check, "measure", lambda folder: folders.append(folder) or shipped["quality"])
    assert build.main(["--check"]) == 0
    assert folders == [assets.shipped()]
    assert "spearman, trained policy" in capsys.readouterr().out
    assert build.main([]) == 2
    assert "expected --out=DIR, or --check" in capsys.readouterr().err


@pytest.mark.long
def test_a_built_miniature_trains_and_is_judged_twice(built, tmp_path):
    (folder, flags_of_build), workdir = built, tmp_path / "run"
    quality = json.loads((folder.parent / "figures.json").read_text())
    assert set(quality["attacks"]) == set(check.ATTACKS)
    assert quality["agreement_base"]["turns"] > 0
    assert json.loads((folder / assets.MANIFEST).read_text())["quality"] == quality
    assert len(read_profiles([folder / "train.jsonl"])) == 512
    assert (folder / "user" / "model.safetensors").stat().st_size < 6e6
    result = run("miniature.build", *flags_of_build)
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


@pytest.mark.long
def test_the_user_learns_again_from_what_a_run_said(built, tmp_path, monkeypatch):
    """With so untrained a policy that its alarms must be off; few, short dialogues."""
    folder = tmp_path / "again"
    shutil.copytree(built[0], folder)
    original = build.miniature_config

    def small(arg, out):
        config = original(arg, out)
        config.rollout.batch, config.rollout.group, config.rollout.max_turns = 16, 2, 2
        config.eval.num_profiles, config.eval.batch, config.eval.max_turns = 16, 16, 2
        config.alarms.readable_min = config.alarms.reply_tokens_min = 0.0
        return config

    monkeypatch.setattr(build, "miniature_config", small)
    before = (folder / assets.USER / "model.safetensors").read_bytes()
    build.learn_from_rl(folder, build.Steps(0, 0, 0, rl=1, again=2), Console(file=io.StringIO()))
    assert (folder / "runs" / assets.USER / "model.safetensors").read_bytes() == before
    assert (folder / assets.USER / "model.safetensors").read_bytes() != before
    replies = check.read_replies(folder / assets.TRAINED)
    assert list(replies) == [f"mini-{i}" for i in range(16)]
    assert all(1 <= len(says) <= 2 for says in replies.values())
    assert "trained.jsonl" in assets.changed_files(folder), "the manifest is older"
