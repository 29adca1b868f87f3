"""A whole run of configs/debug.py: its folder, its figures, going on after an interruption, its alarms."""

import contextlib
import io
import json
import re
import shutil
import time
import urllib.request
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from rich.console import Console
from transformers import AutoTokenizer

from configs import debug
from rlver_jax import evaluate, export, verify
from rlver_jax import train as command
from rlver_jax.evaluation.play import Evaluation
from rlver_jax.models.families import Qwen2Config
from rlver_jax.models.hf_weights import load_params
from rlver_jax.models.qwen import Qwen2, abstract_params
from rlver_jax.parallel.mesh import make_mesh
from rlver_jax.rollout.sampler import sample_dialogues
from rlver_jax.text.tokenizer import load_tokenizer
from rlver_jax.training import loop
from rlver_jax.training.alarms import CollapseError
from rlver_jax.training.checkpoints import Checkpoints
from rlver_jax.training.loop import train
from rlver_jax.training.metrics_file import read_metrics
from tests.test_serve import served

STEPS = 4
SEED = 3


def config_of(**fields):
    config = debug.get_config("")
    overrides = {"train.steps": STEPS, "train.seed": SEED, "eval.every": 2, "log.tensorboard": False}
    config.update_from_flattened_dict(overrides | fields)
    return config


def run(workdir, mesh=None, **fields) -> str:
    """Trains on one device, or on a mesh; returns what was printed."""
    text, mesh = io.StringIO(), mesh or make_mesh(1, 1, 1, devices=jax.devices()[:1])
    train(config_of(**fields), workdir, mesh, Console(file=text, width=200))
    return text.getvalue()


def rows_of(workdir) -> list[dict]:
    """Metrics without durations."""
    rows = read_metrics(workdir / "metrics.jsonl")
    return [{name: x for name, x in row.items() if not name.startswith("time/")} for row in rows]


def records_of(workdir, step) -> list[dict]:
    return [json.loads(line) for line in (workdir / "dialogues" / f"step_{step:06d}.jsonl").read_text().splitlines()]


def policy_of(workdir, step="last"):
    shapes, _ = abstract_params(Qwen2(Qwen2Config.from_hf(debug.WORLD), scan_layers=False))
    return Checkpoints.reader(workdir / "checkpoints").restore_part(step, shapes, "params/policy")


def same(a, b) -> bool:
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


def check_eventful(workdir, *steps) -> None:
    """So that equal runs say something: rewards differ, within each group too, and the policy moves."""
    for step in steps:
        rewards = [record["reward"] for record in records_of(workdir, step)]
        assert len(set(rewards)) >= 4, f"step {step}: {rewards}"
        assert len(set(rewards[:4])) > 1 < len(set(rewards[4:])), f"step {step}: {rewards}"
    saved = Checkpoints.reader(workdir / "checkpoints").steps()
    old, new = (policy_of(workdir, step) for step in saved[-2:])
    assert not any(jax.tree.leaves(jax.tree.map(np.array_equal, old, new))), "every array of the policy moves"


@contextlib.contextmanager
def evaluations_last(seconds):
    """As the trainer's clock sees it."""
    late, metrics = [0.0], Evaluation.metrics

    def slow(self, *args):
        late[0] += seconds
        return metrics(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluation, "metrics", slow)
        patch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + late[0]))
        yield


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """(folder of a finished run, what it printed, compilations of the sampler)."""
    folder = tmp_path_factory.mktemp("unbroken")
    sample_dialogues.clear_cache()  # another module may have compiled the same
    with evaluations_last(1e6):
        printed = run(folder)
    return folder, printed, sample_dialogues._cache_size()


def test_every_step_has_its_row(unbroken):
    folder, printed, compiled = unbroken
    rows = rows_of(folder)
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    scores = {row["step"]: row["eval/score"] for row in rows if "eval/score" in row}
    assert list(scores) == [0, 2, 4]
    assert len(set(scores.values())) == 3, "the policy that is evaluated moves"
    check_eventful(folder, 1, 2, 4)
    assert compiled == 2, "one for training, one for evaluation"
    assert [f"step {i}/{STEPS}" in printed for i in range(STEPS + 2)] == [False, *[True] * STEPS, False]
    for row in rows[1:]:
        assert abs(row["policy/ratio_max_first"] - 1) < 1e-4
        assert row["train/skipped_updates"] == 0


def test_an_evaluation_is_no_part_of_the_update(unbroken):
    for row in read_metrics(unbroken[0] / "metrics.jsonl"):
        assert all(name in row for name in ("time/rollout_s", "time/update_s")) == (row["step"] > 0)
        for name, value in row.items():
            if name.startswith("time/"):
                assert 0 < value < 1e5 if name != "time/eval_s" else 1e6 < value < 1.1e6, (row["step"], name)


def test_figures_are_those_of_the_logged_dialogues(unbroken):
    folder, _, _ = unbroken
    for step in (1, 2, 4):
        row, records = rows_of(folder)[step], records_of(folder, step)
        assert [record["dialogue"] for record in records] == list(range((step - 1) * 8, step * 8))
        assert row["emotion/final_mean"] == pytest.approx(np.mean([record["emotion"] for record in records]))
        assert row["reward/mean"] == pytest.approx(np.mean([record["emotion"] / 100 for record in records]))
        assert row["dialogue/turns_mean"] == np.mean([record["turns"] for record in records]) == 2
        profiles = [record["profile"] for record in records]
        assert profiles == [profiles[0]] * 4 + [profiles[4]] * 4, "two groups of four"


def test_training_logs_are_recomputed_completely(unbroken, tmp_path, capsys):
    folder, _, _ = unbroken
    logs = [str(folder / "dialogues" / f"step_00000{step}.jsonl") for step in (2, 4)]
    config = [f"--config={debug.__file__}", "--config.train.seed=3"]
    assert verify.main([*logs, *config]) == 0, capsys.readouterr().out
    assert "recomputed 16 dialogues, 32 turns" in capsys.readouterr().out
    record = records_of(folder, 4)[3]
    record["reward"] += 0.01
    (tmp_path / "edited.jsonl").write_text(json.dumps(record) + "\n")
    assert verify.main([logs[0], str(tmp_path / "edited.jsonl"), *config]) == 1
    assert f"{tmp_path / 'edited.jsonl'}, dialogue 27: reward" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_goes_on_equals_an_unbroken_one(unbroken, tmp_path):
    """To the bit: metrics, dialogues, parameters. The first part is cut off between two checkpoints."""
    run(tmp_path, **{"train.steps": 2})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "emotion/final_mean": 99.0}\n{"step": 4, "emo')  # as a killed process may leave it
    (tmp_path / "dialogues" / "step_000003.jsonl").write_text("{")
    printed = run(tmp_path)
    assert "resuming after step 2 of 4" in printed
    folder, _, _ = unbroken
    assert rows_of(tmp_path) == rows_of(folder)
    assert records_of(tmp_path, 4) == records_of(folder, 4)
    assert not (tmp_path / "dialogues" / "step_000003.jsonl").exists()
    assert same(policy_of(tmp_path), policy_of(folder))


def test_export_writes_the_checkpoint_that_is_asked_for(unbroken, tmp_path, capsys):
    folder, _, _ = unbroken
    model = Qwen2(Qwen2Config.from_hf(debug.WORLD), scan_layers=False)
    for step in (2, 4):
        out = tmp_path / str(step)
        assert export.main([f"--workdir={folder}", f"--out={out}", f"--step={step}", "--dtype=float32"]) == 0
        assert same(load_params(out, model), policy_of(folder, step))
        assert (out / "tokenizer.model").read_bytes() == (debug.WORLD / "tokenizer.model").read_bytes()
    ours, theirs = load_tokenizer(debug.WORLD), AutoTokenizer.from_pretrained(tmp_path / "4")
    texts = [
        message["content"] for record in records_of(folder, 1) for message in record["messages"] if message["content"]
    ]
    assert [theirs.encode(text) for text in texts] == [ours.encode(text) for text in texts]
    assert not same(policy_of(folder, 2), policy_of(folder, 4)), "the policy moves"

    def refused(*flags):
        assert export.main(list(flags)) == 2
        return capsys.readouterr().err.replace("\n", " ")

    assert "not empty; export into a new folder" in refused(f"--workdir={folder}", f"--out={tmp_path / '2'}")
    assert "there are steps 2, 4" in refused(f"--workdir={folder}", f"--out={tmp_path / 'x'}", "--step=3")
    assert "expected the checkpoints of a training run" in refused(f"--workdir={tmp_path}", f"--out={tmp_path / 'x'}")
    assert "no --out was given" in refused(f"--workdir={folder}")


@pytest.fixture(scope="module")
def moved(unbroken, tmp_path_factory):
    """(a run that went on after its base model's folder had moved, the same one with its base at hand, that base)."""
    folder = tmp_path_factory.mktemp("moved")
    base = folder / "base"
    assert export.main([f"--workdir={unbroken[0]}", f"--out={base}", "--step=2", "--dtype=float32"]) == 0
    fields = {"policy.path": str(base), "policy.init": "path", "eval.every": 0}
    run(folder / "run", **fields | {"train.steps": 1})
    shutil.copytree(folder / "run", folder / "at_hand")
    run(folder / "at_hand", **fields | {"train.steps": 2})
    base.rename(folder / "elsewhere")
    assert "resuming after step 1 of 2" in run(folder / "run", **fields | {"train.steps": 2})
    return folder / "run", folder / "at_hand", folder / "elsewhere"


@pytest.mark.slow
def test_a_run_goes_on_without_its_base_model(moved):
    without, at_hand, _ = moved
    assert rows_of(without) == rows_of(at_hand)
    assert same(policy_of(without), policy_of(at_hand))
    assert not same(policy_of(without), policy_of(without, 1))


def evaluate_flags(devices, monkeypatch) -> list[str]:
    """For as many devices; of one, programs are compiled in a third of the time."""
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    return [f"--config={debug.__file__}", "--config.mesh.fsdp=1", f"--config.mesh.tensor={devices}"]


@pytest.mark.slow
def test_a_run_without_its_base_model_is_exported_and_evaluated(moved, tmp_path, capsys, monkeypatch):
    folder, _, base = moved
    assert export.main([f"--workdir={folder}", f"--out={tmp_path / 'own'}", "--dtype=float32"]) == 0
    path_flag = f"--config.policy.path={base}"
    assert export.main([f"--workdir={folder}", f"--out={tmp_path / 'given'}", "--dtype=float32", path_flag]) == 0
    for file in (tmp_path / "own").iterdir():
        assert file.read_bytes() == (tmp_path / "given" / file.name).read_bytes()
    model = Qwen2(Qwen2Config.from_hf(debug.WORLD), scan_layers=False)
    assert same(load_params(tmp_path / "own", model), policy_of(folder))
    assert (tmp_path / "own" / "tokenizer.model").read_bytes() == (debug.WORLD / "tokenizer.model").read_bytes()
    flags = [*evaluate_flags(1, monkeypatch), f"--checkpoint={folder}"]
    assert evaluate.main([*flags, f"--out={tmp_path / 'played'}"]) == 0
    assert evaluate.main([*flags, f"--out={tmp_path / 'other'}", "--config.policy.path=/no/such"]) == 2
    error_text = capsys.readouterr().err.replace("\n", " ")
    assert re.search("policy.path='/no/such': no such folder.*; leave it out to take the run's own", error_text)


@pytest.mark.slow
def test_a_run_without_its_base_model_is_served(moved):
    """Nor does a server need the user's model."""
    with served(f"--checkpoint={moved[0]}", "--config.user.path=/no/such", "--rows=2") as (_, url):
        body = json.dumps({"model": "run", "messages": [{"role": "user", "content": "hello"}]}).encode()
        asked = urllib.request.Request(f"{url}/v1/chat/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=60) as answer:
            reply = json.loads(answer.read())
    assert reply["usage"]["completion_tokens"] > 0
    assert reply["choices"][0]["message"]["role"] == "assistant"


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_evaluate_scores_a_checkpoint_as_the_run_did(unbroken, tmp_path, devices, monkeypatch):
    folder, _, _ = unbroken
    flags = evaluate_flags(devices, monkeypatch)
    assert evaluate.main([*flags, f"--checkpoint={folder}", "--step=2", f"--out={tmp_path}"]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["score"] == pytest.approx(rows_of(folder)[2]["eval/score"])
    assert summary["settings"]["fingerprint.policy"] == Checkpoints.reader(folder / "checkpoints").fingerprint(2)


def test_an_alarm_stops_the_run_and_names_the_figure(unbroken, tmp_path):
    folder = shutil.copytree(unbroken[0], tmp_path / "run")
    (folder / "finished.json").unlink()
    with pytest.raises(CollapseError, match=r"step 5: policy/entropy is [\d.]+, above alarms.entropy_max=0.5") as error:
        run(folder, **{"train.steps": 6, "alarms.entropy_max": 0.5})
    assert "step_000005.jsonl" in str(error.value)
    assert len(records_of(folder, 5)) == 8, "the dialogues that show it"
    assert rows_of(folder)[-1]["step"] == 5
    assert Checkpoints.reader(folder / "checkpoints").steps() == [2, 4], "what was saved stays"


def test_the_command_refuses_what_cannot_be(unbroken, tmp_path, capsys):
    folder, _, _ = unbroken
    flags = [f"--config={debug.__file__}", "--config.eval.every=2", "--config.log.tensorboard=False"]
    flags += [f"--config.train.seed={SEED}"]

    def refused(*more):
        assert command.main([*flags, *more]) == 2
        return capsys.readouterr().err.replace("\n", " ")

    assert "holds a finished run of 4 steps" in refused(f"--workdir={folder}", "--config.train.steps=4")
    assert f"train.seed was {SEED}, is 1" in refused(f"--workdir={folder}", "--config.train.seed=1")
    assert "no --workdir was given" in refused()
    assert "data.train is empty" in refused(f"--workdir={tmp_path}", "--config.data.train=")
    assert "rollout.temperature=0" in refused(f"--workdir={tmp_path}", "--config.rollout.temperature=0.0")
    for main in (command.main, export.main):
        with pytest.raises(SystemExit) as left:
            main(["--help"])
        assert left.value.code == 0
        assert "--workdir" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [], "nothing is written before everything is checked"


def check_equal(actual, expected) -> None:
    """Equal dialogues at step 1; losses and emotions of every step that `actual` has within 1e-3."""
    says = [[m["content"] for r in records_of(folder, 1) for m in r["messages"]] for folder in (actual, expected)]
    assert says[0] == says[1]
    mine = [row for row in rows_of(actual) if row["step"]]
    theirs = {row["step"]: row for row in rows_of(expected)}
    assert len(mine) > 1
    for row in mine:
        names = [name for name in row if name.startswith("emotion/") or name.endswith("/loss")]
        assert {"emotion/final_mean", "policy/loss"} <= set(names)
        for name in names:
            assert row[name] == pytest.approx(theirs[row["step"]][name], abs=1e-3), f"step {row['step']}: {name}"


@pytest.mark.slow
def test_eight_devices_learn_what_one_does(unbroken, tmp_path):
    """With every axis in use, and dialogues played on another mesh than the one that learns: pairs of chips of
    `tensor` share a copy, with rows and columns of their own."""
    sampling_mesh = {"mesh_sampling.replica": -1, "mesh_sampling.fsdp": 1, "mesh_sampling.attention_data": 2}
    run(tmp_path, make_mesh(2, 2, 2), **{"train.steps": 2, "eval.every": 0} | sampling_mesh)
    check_equal(tmp_path, unbroken[0])
    for row in rows_of(tmp_path):
        assert row["emotion/final_mean"] != 30, "emotions move, so that there is something to learn"
        assert row["policy/grad_norm"] > 1e-3
