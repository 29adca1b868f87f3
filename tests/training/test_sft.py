"""`rlver sft` as a command: what it reads and refuses, what it leaves behind, how it resumes after kill -9."""

import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import debug
from rlver_jax import evaluate, export, sft
from rlver_jax.config.validate import ConfigError
from rlver_jax.dialogues.log import read_dialogues, write_dialogues
from rlver_jax.models.hf_weights import load_params
from rlver_jax.profiles.held_out import held_out
from rlver_jax.rollout.agents import make_model
from rlver_jax.training import sft as fitting
from rlver_jax.training.checkpoints import Checkpoints
from rlver_jax.training.metrics_file import read_metrics
from rlver_jax.training.sft_data import examples_of, field_weights, open_dialogues
from rlver_jax.training.sft_data import read_dialogues as read_sft
from rlver_jax.training.sft_metrics import change_agreement, expected_change
from rlver_jax.training.trained_policy import take_checkpoint
from tests.compare_runs import differences
from tests.quick import QUICK

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6
FIELDS = {"sft.batch": 4, "sft.eval_every": 4, "train.steps": STEPS, "checkpoint.every": 2, "checkpoint.keep_last": 9}
FIELDS |= {"sft.held_out": 0.4, "log.tensorboard": False}


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """Two files of dialogues that the debug world's random models have played, with eight profiles."""
    out = tmp_path_factory.mktemp("logs")
    played = ["--config=configs/debug.py", "--config.eval.batch=8", f"--out={out / 'played'}", "--repeats=2"]
    assert evaluate.main(played) == 0
    records = read_dialogues(out / "played" / "dialogues.jsonl")
    assert len(records) == 16
    write_dialogues(out / "a.jsonl", records[:10])
    write_dialogues(out / "b.jsonl", records[10:])
    return [out / "a.jsonl", out / "b.jsonl"]


def command(workdir, role, logs, **fields):
    overrides = {name.replace("__", "."): value for name, value in fields.items()}
    flags = [f"--config.{name}={value}" for name, value in (FIELDS | overrides).items()]
    files = ",".join(map(str, logs))
    return ["--config=configs/debug.py", f"--role={role}", f"--data={files}", f"--workdir={workdir}", *flags]


@pytest.fixture(scope="module")
def unbroken(logs, tmp_path_factory):
    """role -> the folder of a finished run."""

    @functools.cache
    def of(role):
        folder = tmp_path_factory.mktemp(role) / "run"
        done = start(folder, role, logs)
        assert done.wait(600) == 0, done.stdout.read()
        return folder

    return of


def start(workdir, role, logs):
    words = [sys.executable, "-m", "rlver_jax.sft", *command(workdir, role, logs)]
    environment = os.environ | {"XLA_FLAGS": QUICK}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(words, cwd=ROOT, env=environment, **pipe)


ROLES = ["user", pytest.param("policy", marks=pytest.mark.slow)]


@pytest.mark.parametrize("role", ROLES)
def test_a_run_learns_and_says_so(unbroken, role):
    rows = read_metrics(unbroken(role) / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    evaluated = [row["step"] for row in rows if "held_out/loss" in row]
    assert evaluated == [0, 4, STEPS], "before, every four steps, and at the end"
    fields = {"user": ["content", "target", "change", "tone", "reply"], "policy": ["thought", "reply"]}[role]
    for row in rows[1:]:
        assert {name for name in row if name.startswith("sft/loss_")} == {f"sft/loss_{name}" for name in fields}
        assert all(math.isfinite(row[f"sft/loss_{name}"]) for name in fields)
    assert {name for name in rows[0] if "loss_" in name} == {f"held_out/loss_{name}" for name in fields}
    assert np.mean([row["sft/loss"] for row in rows[-2:]]) < np.mean([row["sft/loss"] for row in rows[1:3]])
    names = ("spearman", "partial_spearman", "first_replies_spearman", "mae")
    agreement = {f"held_out/change_{name}_given_appraisal" for name in names}
    assert {name for name in rows[0] if "change_" in name} == (agreement if role == "user" else set())
    assert rows[-1]["data/epoch"] == pytest.approx(STEPS * 4 / learned_of(unbroken(role), role))
    checkpoints = Checkpoints.reader(unbroken(role) / "checkpoints")
    best = min((row for row in rows[1:] if "held_out/loss" in row), key=lambda row: row["held_out/loss"])
    assert checkpoints.best_step() == best["step"]
    checkpoints.close()


def learned_of(folder, role):
    """Dialogues of profiles that are not held out, by the hash alone."""
    files = json.loads((folder / "config.json").read_text())["sft.data"].split(",")
    return sum(not held_out(record["profile"], 0.4) for file in files for record in read_dialogues(file))


@pytest.mark.parametrize(
    ("role", "rows"),
    [pytest.param("user", [3], marks=pytest.mark.slow), pytest.param("policy", [3, 5], marks=pytest.mark.long)],
    ids=["user", "policy"],
)
def test_killed_and_resumed_it_ends_as_one_that_never_was(unbroken, role, rows, logs, tmp_path):
    folder = tmp_path / "run"
    for row in rows:
        run, began = start(folder, role, logs), time.monotonic()
        path = folder / "metrics.jsonl"
        while not (path.exists() and any(r["step"] >= row for r in read_metrics(path))):
            if run.poll() is not None:
                break  # so fast that it ended before it was seen
            assert time.monotonic() - began < 600
            time.sleep(0.001)
        run.kill()
        output = run.communicate()[0]
        assert run.returncode in (-signal.SIGKILL, 0), output
        assert (folder / "checkpoints").exists(), output
    last = start(folder, role, logs)
    output = last.communicate(timeout=600)[0]
    assert last.returncode == 0 or "holds a finished run" in output, output
    assert differences(unbroken(role), folder) == []


@pytest.mark.parametrize("role", ROLES)
def test_what_was_fitted_is_exported_and_played(unbroken, role, tmp_path, capsys):
    """Weights of the folder are those of the checkpoint; `user.path` and `policy.path` read it."""
    out = tmp_path / "model"
    words = [f"--workdir={unbroken(role)}", f"--out={out}", "--step=last", "--dtype=float32"]
    assert export.main(words) == 0
    config = debug.get_config()
    model = make_model(config.policy, "policy")
    held = load_params(out, model)
    saved = Checkpoints.reader(unbroken(role) / "checkpoints")
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), held)
    wanted = saved.restore_part(STEPS, like, "params/policy")
    saved.close()
    jax.tree.map(np.testing.assert_array_equal, held, wanted)
    play = ["--config=configs/debug.py", f"--config.{role}.path={out}", f"--config.{role}.init=path"]
    assert evaluate.main([*play, "--config.eval.num_profiles=2", f"--out={tmp_path / 'played'}"]) == 0
    assert len(read_dialogues(tmp_path / "played" / "dialogues.jsonl")) == 2
    capsys.readouterr()


def test_a_fitted_user_is_no_policy(unbroken):
    with pytest.raises(ValueError, match="a simulated user that sft has fitted, and no policy; export it"):
        take_checkpoint(debug.get_config(), str(unbroken("user")), "")


@pytest.mark.slow
def test_a_fitted_policy_is_one(unbroken):
    assert take_checkpoint(debug.get_config(), str(unbroken("policy")), "last").step == STEPS


def load(config_fields, logs):
    config = debug.get_config()
    config.update_from_flattened_dict({"sft.batch": 1, "sft.data": ",".join(map(str, logs)), **config_fields})
    fitting.settle_role(config)
    source = open_dialogues(config)
    make = examples_of(config, fitting.without_weights(config, source)[0])
    return read_sft(config, source, make), make


def test_profiles_are_held_out_by_their_ids_whatever_the_lines(logs, tmp_path):
    loaded, _ = load({"sft.held_out": 0.4}, logs)
    learned, held = ({one.profile for one in part} for part in (loaded.learned, loaded.held_out))
    assert learned
    assert held
    assert not learned & held
    records = [record for file in logs for record in read_dialogues(file)]
    write_dialogues(tmp_path / "other.jsonl", [*reversed(records), *records[3:5]])
    again, _ = load({"sft.held_out": 0.4}, [tmp_path / "other.jsonl"])
    assert {one.profile for one in again.held_out} == held
    assert len(again.learned) + len(again.held_out) == len(records) + 2


def test_replies_that_weigh_nothing_are_not_read(logs):
    rows, weightless = {}, "tone=0,reply=0"
    for weights in ("", "reply=0", weightless):
        loaded, make = load({"sft.role": "user", "sft.weights": weights}, logs)
        rows[weights] = sum(map(len, loaded.learned))
        assert make.replies == (weights != weightless)
    assert rows[weightless] < rows["reply=0"] == rows[""]


def test_held_out_dialogues_are_measured_evenly(logs):
    every, _ = load({"sft.held_out": 0.7}, logs)
    sampled, _ = load({"sft.held_out": 0.7, "sft.eval_dialogues": 3}, logs)
    count = len(every.held_out)
    assert count > 5
    wanted = [every.held_out[i].tokens.tolist() for i in (0, count // 3, 2 * count // 3)]
    assert [one.tokens.tolist() for one in sampled.held_out] == wanted
    assert len(sampled.learned) == len(every.learned)
    assert f"measured: 3 of the {count} held out" in sampled.summary


@pytest.mark.slow
def test_a_run_goes_on_without_its_base_model(logs, tmp_path, capsys):
    """Config and tokenizer are the run's own then, weights those of the checkpoint; of the user, too."""
    world = shutil.copytree(debug.WORLD, tmp_path / "world")
    flags = command(tmp_path / "run", "user", logs, user__path=world)
    assert sft.main([*flags, "--config.train.steps=2"]) == 0
    world.rename(tmp_path / "elsewhere")
    assert sft.main([*flags, "--config.train.steps=3"]) == 0
    assert "resuming after step 2 of 3" in capsys.readouterr().out
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    other = command(tmp_path / "unbroken", "user", logs, user__path=tmp_path / "elsewhere")
    assert sft.main([*other, "--config.train.steps=3"]) == 0
    folders = (
        Checkpoints.reader(tmp_path / "run" / "checkpoints"),
        Checkpoints.reader(tmp_path / "unbroken" / "checkpoints"),
    )
    assert folders[0].fingerprint(3) == folders[1].fingerprint(3)
    for one in folders:
        one.close()


def test_a_policy_learns_from_dialogues_that_end_well(logs):
    records = [record for file in logs for record in read_dialogues(file)]
    emotions = [record["emotion"] for record in records]
    border = int(np.median(emotions)) + 1
    loaded, _ = load({"sft.role": "policy", "sft.held_out": 0.0, "sft.min_emotion": border}, logs)
    wanted = [record["profile"] for record in records if record["emotion"] >= border]
    assert 0 < len(wanted) < len(records)
    assert [one.profile for one in loaded.learned] == wanted
    best, _ = load({"sft.role": "policy", "sft.held_out": 0.0, "sft.best_of_profile": 1}, logs)
    assert sorted(one.profile for one in best.learned) == sorted({record["profile"] for record in records})
    own = {}
    for record in records:
        if record["profile"] not in own or record["emotion"] > own[record["profile"]]["emotion"]:
            own[record["profile"]] = record
    every, _ = load({"sft.role": "policy", "sft.held_out": 0.0}, logs)
    by_tokens = {one.tokens.tobytes(): record for one, record in zip(every.learned, records, strict=True)}
    for one in best.learned:
        assert by_tokens[one.tokens.tobytes()]["dialogue"] == own[one.profile]["dialogue"]


def test_weights_of_fields():
    assert field_weights("", ["a", "b"]) == [1.0, 1.0]
    assert field_weights("b=0, a=2.5", ["a", "b"]) == [2.5, 0.0]
    for text in ("c=1", "a", "a=-1", "a=nan", "a=inf", "a=0,b=0"):
        with pytest.raises(ConfigError, match="sft.weights="):
            field_weights(text, ["a", "b"])


def test_agreement_by_hand():
    p = np.full((2, 21), -np.inf)
    p[0, [10, 12]] = np.log([0.25, 0.75])  # 0 and +2
    p[1, [0, 20]] = -3.0  # -10 and +10, not normalized
    np.testing.assert_allclose(expected_change(p), [1.5, 0.0], atol=1e-12)
    emotion, reply = np.array([40, 30, 40, 50]), np.array([0, 1, 0, 1])
    result = change_agreement(np.array([1.0, 2.0, 3.0, 4.0]), np.array([-5, 0, 5, 1]), emotion, reply)
    # Ranks 1 2 3 4, 1 2 4 3 and 2.5 1 2.5 4: r of the first two 0.8, with the third 3 and 1.5 by sqrt(22.5).
    u, c = 3 / math.sqrt(22.5), 1.5 / math.sqrt(22.5)
    partial = (0.8 - u * c) / math.sqrt((1 - u * u) * (1 - c * c))
    wanted = {"spearman": 0.8, "partial_spearman": partial, "first_replies_spearman": 1.0, "mae": (6 + 2 + 2 + 3) / 4}
    assert result == pytest.approx(wanted)
    never = change_agreement(np.ones(3), np.arange(3), np.arange(3), np.zeros(3))
    assert all(math.isnan(value) for name, value in never.items() if name != "mae")


def spoil(name, lines):
    """Lines of a log with one that can't be used."""
    record = json.loads(lines[1])
    if name == "cut":
        return [lines[0], lines[1][:50] + "\n"]
    if name == "no dialogue":
        return [lines[0], '{"a": 1}\n']
    if name == "style":
        record["style"] = "gloomy"
    elif name == "language":
        record["language"] = "zh"
    elif name == "profile":
        record["profile"] = "nobody"
    elif name == "field":
        del record["messages"][2]["change"]
    return [lines[0], json.dumps(record) + "\n"]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("cut", ":2: not a JSON object"),
        ("no dialogue", ":2: no field dialogue"),
        ("field", ":2: no field messages[2].change"),
        ("style", "dialogue 1: was played with style 'gloomy', expected vanilla or challenging"),
        ("language", "dialogue 1: was played with language 'zh', expected en as in data.language"),
        ("profile", "its profile 'nobody' is not among the"),
    ],
)
def test_lines_that_cannot_be_learned_are_told_at_once(name, told, logs, tmp_path, capsys):
    file = tmp_path / "spoilt.jsonl"
    file.write_text("".join(spoil(name, logs[0].read_text().splitlines(keepends=True))))
    assert sft.main(command(tmp_path / "run", "user", [file], sft__batch=1, sft__held_out=0.0)) == 2
    error = capsys.readouterr().err
    assert told in error
    assert len(error.splitlines()) == 1
    assert "Traceback" not in error
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"sft__batch": 99}, "sft.batch=99: only"),
        ({"sft__held_out": 1.0}, "only 0 of 16 dialogues are learned from, 16 are held out"),
        ({"sft__weights": "chance=2"}, "sft.weights='chance=2': found 'chance=2', expected NAME=NUMBER"),
        ({"sft__soft": 21}, "sft.soft=21: expected 0 to 20 points"),
        ({"sft__role": "judge"}, "--role"),
        ({"user__path": "nowhere/at/all"}, "nowhere/at/all"),
        ({"data": "none.jsonl"}, "sft.data='none.jsonl': none.jsonl is not a file"),
        ({"data": ""}, "sft.data is empty; name dialogues with --data"),
        ({"workdir": ""}, "no --workdir was given"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_fitted_are_refused(fields, told, logs, tmp_path, capsys):
    fields, role = dict(fields), "user"
    files = [fields.pop("data")] if "data" in fields else logs
    workdir = fields.pop("workdir", tmp_path / "run")
    if "sft__role" in fields:
        role = fields.pop("sft__role")
    assert sft.main(command(workdir, role, files, **fields)) == 2
    error = capsys.readouterr().err
    assert told in error
    assert "Traceback" not in error
    assert not (tmp_path / "run" / "config.json").exists()


def test_other_dialogues_or_settings_do_not_resume(unbroken, logs, tmp_path, capsys):
    assert sft.main(command(unbroken("user"), "user", logs[:1], train__steps=9)) == 2
    assert "holds a run that began with others than these: the dialogues (sft.data=" in capsys.readouterr().err
    assert sft.main(command(unbroken("user"), "user", logs, train__steps=9, sft__soft=1)) == 2
    assert "holds a run with another config" in capsys.readouterr().err
    assert sft.main(command(unbroken("user"), "policy", logs, train__steps=9)) == 2
    assert "sft.role" in capsys.readouterr().err
    assert sft.main(command(unbroken("user"), "user", logs)) == 2
    assert "holds a finished run of 6 steps" in capsys.readouterr().err


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_the_run(logs, tmp_path, capsys):
    """At an absurd learning rate the second update's loss is NaN or infinite: an alarm, exit status 1, its row kept."""
    fields = {"train__learning_rate": 1e38, "train__grad_clip": 0.0, "train__weight_decay": 0.0}
    assert sft.main(command(tmp_path / "run", "policy", logs, **fields)) == 1
    error = capsys.readouterr().err
    assert "stopped by an alarm at step" in error
    assert "train.learning_rate" in error
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1]["sft/loss"] is None or rows[-1]["policy/grad_norm"] is None
    assert rows[-1]["step"] < STEPS


@pytest.mark.slow
def test_a_user_without_its_appraisal_leaves_the_prompts_to_play_it(logs, tmp_path, capsys):
    """And the figures of its change are plain: no appraisal gave it away."""
    fields = {"sft__appraisal": False, "train__steps": 1, "sft__soft": 2}
    fields |= {"rollout__max_turns": 500, "rollout__batch": 7}  # as a rollout they would be refused
    assert sft.main(command(tmp_path / "run", "user", logs, **fields)) == 0
    capsys.readouterr()
    (row, *_) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    figures = ("spearman", "partial_spearman", "first_replies_spearman", "mae")
    assert {name for name in row if "change_" in name} == {f"held_out/change_{figure}" for figure in figures}
    prompts = tmp_path / "run" / "prompts"
    play = ["--config=configs/debug.py", f"--config.user.prompts={prompts}", "--config.eval.num_profiles=1"]
    assert evaluate.main([*play, f"--out={tmp_path / 'played'}"]) == 0
    (record,) = read_dialogues(tmp_path / "played" / "dialogues.jsonl")
    assert record["messages"][2]["appraisal"] == {}
    assert record["messages"][2]["considerations"].keys() == {"tone"}
