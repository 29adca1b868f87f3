"""Training against users behind a real server on loopback: whole runs, faults, budgets, people who stay away."""

import collections
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from rich.console import Console

from configs import debug
from rlver_jax import train as command
from rlver_jax import verify
from rlver_jax.config.validate import ConfigError
from rlver_jax.parallel.mesh import make_mesh
from rlver_jax.training.checkpoints import Checkpoints
from rlver_jax.training.loop import train
from rlver_jax.training.metrics_file import read_metrics
from rlver_jax.training.stops import StoppedError
from tests.endpoints.server import ChatServer, one_in_five
from tests.quick import QUICK
from tests.training.test_loop import policy_of, same

ROOT = Path(__file__).resolve().parents[2]
STEPS = 2
FIELDS = {
    "train.steps": STEPS,
    "train.seed": 3,
    "eval.every": 2,
    "checkpoint.every": 1,
    "log.dialogues_every": 1,
    "log.tensorboard": False,
    "rollout.context": 1600,
    "remote.user.model": "m",
    "remote.user.price_in": 2.0,
    "remote.user.price_out": 8.0,
    "remote.deadline": 60.0,
    "remote.concurrency": 8,
}


def run(workdir, url, mesh=None, **fields) -> str:
    """Trains on one device, or on a mesh; returns what was printed."""
    config = debug.get_config("")
    config.update_from_flattened_dict(FIELDS | {"remote.user.url": url} | fields)
    text, mesh = io.StringIO(), mesh or make_mesh(1, 1, 1, devices=jax.devices()[:1])
    train(config, workdir, mesh, Console(file=text, width=200))
    return text.getvalue()


def rows_of(workdir) -> list[dict]:
    """Metrics without durations, and without what depends on interruptions."""
    rows = read_metrics(workdir / "metrics.jsonl")
    return [{name: x for name, x in row.items() if not name.startswith(("time/", "traffic/"))} for row in rows]


def records_of(workdir, step) -> list[dict]:
    return [json.loads(line) for line in (workdir / "dialogues" / f"step_{step:06d}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """(folder of a finished run, requests that were answered, url)."""
    folder = tmp_path_factory.mktemp("unbroken")
    with ChatServer() as server:
        run(folder / "run", server.url)
        yield folder / "run", list(server.bodies), server


def test_every_step_has_its_row(unbroken):
    folder, bodies, _ = unbroken
    rows = rows_of(folder)
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    requests = sum(row.get("remote/requests", 0) for row in rows)
    evaluated = [row for row in rows if "eval/score" in row]
    assert [row["step"] for row in evaluated] == [0, 2]
    assert len({row["eval/score"] for row in evaluated}) == 2, "the policy moves"
    assert requests < len(bodies), "evaluations ask as well"
    for row in read_metrics(folder / "metrics.jsonl")[1:]:
        waited = row["time/policy_s"] + row["time/users_s"]
        assert waited <= row["time/rollout_s"] + 0.1, "playing is no part of the update"
        assert row["traffic/rounds"] >= 2
    total = 0.0
    for row in rows[1:]:
        assert row["remote/left_out"] == 0
        assert row["policy/grad_norm"] > 0
        cost = (2 * row["remote/tokens_in"] + 8 * row["remote/tokens_out"]) / 1e6
        assert row["remote/cost"] == pytest.approx(cost) != 0
        total += row["remote/cost"]
    before = evaluated[0]["eval/cost"]  # that of the last step comes after its row's sum
    assert total < rows[-1]["remote/cost_total"] == pytest.approx(total + before)


def same_run(folder, other) -> None:
    """Equal rows, dialogues and policies."""
    assert rows_of(folder) == rows_of(other)
    for step in range(1, STEPS + 1):
        assert records_of(folder, step) == records_of(other, step)
    assert same(policy_of(folder), policy_of(other))


@pytest.mark.slow
def test_faults_change_nothing(unbroken, tmp_path):
    """A fifth of all requests fails: nothing is lost, nothing is asked twice for the same answer."""
    folder, bodies, server = unbroken
    server.fault = one_in_five(1)
    try:
        (tmp_path / "run").mkdir()
        before = len(server.bodies)
        run(tmp_path / "run", server.url, **{"remote.concurrency": 3})
    finally:
        server.fault = lambda n: ""
    same_run(tmp_path / "run", folder)
    asked = server.bodies[before:]
    key = lambda body: json.dumps(body, sort_keys=True)  # noqa: E731
    assert sorted(map(key, asked)) == sorted(map(key, bodies))
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert sum(row.get("traffic/failed", 0) for row in rows) > 5


@pytest.mark.slow
def test_what_has_been_answered_is_not_asked_again(unbroken, tmp_path):
    """A run whose checkpoints are gone plays all of it out of the file of answers."""
    folder, _, server = unbroken
    shutil.copy(folder / "answers.sqlite", tmp_path / "answers.sqlite")
    count = server.count
    run(tmp_path / "run", server.url, **{"remote.cache": str(tmp_path / "answers.sqlite")})
    assert server.count == count
    same_run(tmp_path / "run", folder)


@pytest.mark.slow
def test_a_budget_stops_the_run_and_a_larger_one_resumes_it(unbroken, tmp_path, capsys):
    folder, _, server = unbroken
    first = rows_of(folder)[1]["remote/cost_total"]
    with pytest.raises(StoppedError, match=r"after step 1: requests have cost .* remote.budget=.*larger") as error:
        run(tmp_path / "run", server.url, **{"remote.budget": first})
    assert Checkpoints.reader(tmp_path / "run" / "checkpoints").steps() == [1]
    assert f"{first:.4f}" in str(error.value)
    count = server.count
    fields = FIELDS | {"remote.user.url": server.url, "remote.budget": first, "mesh.fsdp": 1, "mesh.tensor": 8}
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    assert command.main([f"--config={debug.__file__}", f"--workdir={tmp_path / 'run'}", *flags]) == 1
    assert "train: stopped after step 1: requests have cost" in " ".join(capsys.readouterr().err.split())
    assert server.count == count, "with the same budget nothing more is asked"
    run(tmp_path / "run", server.url, **{"remote.budget": 100 * first})
    same_run(tmp_path / "run", folder)


def test_unanswered_dialogues_are_left_out_and_too_many_stop_the_run(unbroken, tmp_path):
    """One dialogue of eight is refused by a filter: its group learns without it, and `verify` knows it."""
    folder = unbroken[0]
    last = records_of(folder, 1)[2]["messages"][2]["content"]  # the user's words before the second reply
    filtered = lambda body: any(m["content"] == last for m in body["messages"][:-1])  # noqa: E731

    with ChatServer() as other:
        whole = other._respond

        def respond(handler, body, fault):
            return whole(handler, body, "400 filtered" if filtered(body) else fault)

        other._respond = respond
        run(tmp_path / "run", other.url, **{"eval.every": 0, "train.steps": 1})
        record = records_of(tmp_path / "run", 1)[2]
        assert record["end_reason"] == "unanswered"
        row = rows_of(tmp_path / "run")[0]
        assert row["remote/left_out"] == 1
        others = [r for r in records_of(tmp_path / "run", 1) if r["end_reason"] != "unanswered"]
        assert len(others) == 7
        assert row["emotion/final_mean"] == pytest.approx(sum(r["emotion"] for r in others) / 7)
        with pytest.raises(StoppedError, match="1 of 8 dialogues stay unanswered.*unanswered_max=0.1.*filtered"):
            run(tmp_path / "strict", other.url, **{"eval.every": 0, "remote.unanswered_max": 0.1})
        fields = FIELDS | {"remote.user.url": other.url, "mesh.fsdp": 1}
    flags = [f"--config={debug.__file__}", *(f"--config.{name}={value}" for name, value in fields.items())]
    assert verify.main([str(tmp_path / "run" / "dialogues" / "step_000001.jsonl"), *flags]) == 0


def test_several_processes_do_not_overlap_batches(tmp_path, monkeypatch):
    """Refused before anything is loaded."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    paths = {"policy.path": "/no/such", "user.path": "/no/such"}
    with pytest.raises(ConfigError, match="rollout.overlap=1: .* one process alone, and there are 2"):
        run(tmp_path / "run", "http://x/v1", **paths, **{"rollout.overlap": 1, "loss.recompute": True})
    assert not (tmp_path / "run").exists()


def test_the_command_says_what_it_cannot_do(tmp_path, capsys):
    flags = [f"--config={debug.__file__}", f"--workdir={tmp_path / 'run'}", "--config.remote.user.url=http://x/v1"]

    def refused(*more):
        assert command.main([*flags, *more]) == 2
        return " ".join(capsys.readouterr().err.split())

    assert "remote.user.model is empty" in refused()
    assert "remote.budget=5.0: nothing costs anything" in refused(
        "--config.remote.user.model=m", "--config.remote.budget=5.0"
    )
    assert "no such variable" in refused("--config.remote.user.model=m", "--config.remote.user.key_env=NO_SUCH_KEY")


@pytest.mark.slow
def test_two_devices_play_what_one_does(unbroken, tmp_path):
    folder, _, server = unbroken
    mesh = make_mesh(1, 2, 1, devices=jax.devices()[:2])
    run(tmp_path / "run", server.url, mesh, **{"train.steps": 1, "eval.every": 0})
    texts = [[m["content"] for r in records_of(each, 1) for m in r["messages"]] for each in (folder, tmp_path / "run")]
    assert texts[0] == texts[1]


def start(workdir, url) -> subprocess.Popen:
    """A run in a process of its own."""
    fields = FIELDS | {"remote.user.url": url, "mesh.fsdp": 1}
    flags = [f"--config={debug.__file__}", f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in fields.items())]
    environment = os.environ | {"XLA_FLAGS": QUICK}
    return subprocess.Popen([sys.executable, "-m", "rlver_jax.train", *flags], cwd=ROOT, env=environment)


@pytest.mark.slow
def test_a_killed_run_pays_for_nothing_twice(tmp_path):
    """Killed with -9 twice, in the middle of requests: at most those that were on their way are asked again."""
    key = lambda body: json.dumps(body, sort_keys=True)  # noqa: E731
    with ChatServer() as server:
        assert start(tmp_path / "whole", server.url).wait(timeout=900) == 0
        bodies, before = list(server.bodies), len(server.bodies)
        for part in (0.3, 0.7):
            process = start(tmp_path / "run", server.url)
            until = time.monotonic() + 600
            while len(server.bodies) - before < part * len(bodies):
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.01)
            process.kill()
            process.wait()
        assert start(tmp_path / "run", server.url).wait(timeout=900) == 0
        same_run(tmp_path / "run", tmp_path / "whole")
        asked = collections.Counter(map(key, server.bodies[before:]))
    assert set(asked) == set(map(key, bodies))
    assert sum(asked.values()) - len(asked) <= 2 * FIELDS["remote.concurrency"]


def test_verify_recomputes_a_run(unbroken, capsys):
    """Sums, ends and rewards; with --policy every token of the policy and its log-probs."""
    folder, _, server = unbroken
    log = str(folder / "dialogues" / f"step_{STEPS:06d}.jsonl")
    fields = FIELDS | {"remote.user.url": server.url, "mesh.fsdp": 1}
    flags = [f"--config={debug.__file__}", *(f"--config.{name}={value}" for name, value in fields.items())]
    assert verify.main([log, *flags]) == 0, capsys.readouterr()
    assert "8 dialogues" in capsys.readouterr().out
    assert verify.main([log, *flags, f"--policy={folder}"]) == 0
    output = capsys.readouterr().out
    tokens = sum(len(m["tokens"]) for record in records_of(folder, STEPS) for m in record["messages"][1::2])
    assert f"{tokens} tokens" in output
    assert "0 faults" in output
    records = records_of(folder, STEPS)
    records[0]["messages"][2]["change"] += 1 if records[0]["messages"][2]["change"] < 10 else -1
    forged = folder / f"step_{STEPS:06d}.jsonl"
    forged.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert verify.main([str(forged), *flags]) == 1
