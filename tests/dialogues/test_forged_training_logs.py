"""Logs of a training run: groups, steps, openings that the user made up; each forgery of the set is found."""

import copy
import io
import json
import shutil

import jax
import pytest
from rich.console import Console

from configs import debug
from rlver_jax import verify
from rlver_jax.config.flags import config_from_flags
from rlver_jax.dialogues.log import read_dialogues, write_dialogues
from rlver_jax.parallel.mesh import make_mesh
from rlver_jax.training.loop import train

SIZE, STEPS = 8, 2
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(its folder, flags of its config): every second profile leaves its first words to the user."""
    folder = tmp_path_factory.mktemp("run")
    lines = [json.loads(line) for line in (debug.WORLD / "profiles.jsonl").read_text().splitlines()]
    for line in lines[::2]:
        line.pop("first_talk", None)
    (folder / "profiles.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    fields = {"data.train": folder / "profiles.jsonl", "eval.every": 0, "log.dialogues_every": 1}
    fields |= {"train.steps": STEPS, "log.tensorboard": False}
    flags = [f"--config={debug.__file__}", *(f"--config.{name}={value}" for name, value in fields.items())]
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    train(config_from_flags(flags, "")[0], folder / "run", mesh, Console(file=io.StringIO()))
    return folder / "run" / "dialogues", flags


@pytest.fixture
def check(run, capsys):
    def verified(*files, more=()):
        status = verify.main([*map(str, files), *run[1], *more])
        return status, capsys.readouterr().out

    return verified


def test_honest_logs(run, check):
    files = sorted(run[0].glob("*.jsonl"))
    records = [record for file in files for record in read_dialogues(file)]
    assert {record["messages"][0]["generated"] for record in records} == {True, False}
    status, output = check(*files)
    assert status == 0, output
    assert "recomputed 16 dialogues, 32 turns" in output
    assert check(files[1])[0] == 0


def step(run, number):
    return read_dialogues(run[0] / f"step_{number:06}.jsonl")


FORGED = {
    "dropped": (lambda rs: rs.pop(2), "dialogues 10 are missing of those that the config plays: 8 to 15"),
    "twice": (lambda rs: rs.append(rs[0]), "dialogues 8 are there more than once"),
    "renumbered": (lambda rs: rs[0].update(dialogue=900), "896 to 899, 901 to 903 are missing"),
    "another's": (lambda rs: rs[0].update(dialogue=12) or rs[4].update(dialogue=8), "but the config plays"),
    "best of its group": (lambda rs: rs.__setitem__(1, copy.deepcopy(rs[0]) | {"dialogue": 9}), "not the user's own"),
    "emotion": (lambda rs: rs[0].update(initial_emotion=40), "initial_emotion is 40"),
    "seed": (lambda rs: rs[0].update(seed=1), "seed is 1, but train.seed=0"),
    "beyond all steps": (lambda rs: rs[0].update(dialogue=2**32 - 1), "are none of those that the config plays"),
    "remote": (lambda rs: [r.update(remote={"policy": {}}) for r in rs], "remote is there"),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_sets(run, check, tmp_path, name):
    records = step(run, 2)
    FORGED[name][0](records)
    write_dialogues(tmp_path / "log.jsonl", records)
    status, output = check(tmp_path / "log.jsonl")
    assert status == 1, output
    assert FORGED[name][1] in output


def test_a_step_under_anothers_name(run, check, tmp_path):
    shutil.copy(run[0] / "step_000001.jsonl", tmp_path / "step_000002.jsonl")
    status, output = check(tmp_path / "step_000002.jsonl")
    assert status == 1
    assert "holds dialogues of step 1" in output


def test_a_sample_of_a_step(run, check, tmp_path):
    write_dialogues(tmp_path / "log.jsonl", step(run, 1)[3:6])
    assert check(tmp_path / "log.jsonl")[0] == 1
    status, output = check(tmp_path / "log.jsonl", more=["--partial"])
    assert status == 0, output
    assert "the set of dialogues (--partial)" in output


def test_another_order_of_profiles(run, check):
    status, output = check(run[0] / "step_000001.jsonl", more=["--config.data.seed=5"])
    assert status == 1
    assert "data.seed=5, rollout.batch=8, rollout.group=4" in output
