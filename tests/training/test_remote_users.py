"""Training against users behind a real server on loopback: whole runs, faults, budgets, people who stay away."""

import io
import json

import jax
import pytest
from rich.console import Console

from configs import debug
from rlver_jax.parallel.mesh import make_mesh
from rlver_jax.training.loop import train
from rlver_jax.training.metrics import read_metrics
from tests.endpoints.server import ChatServer

STEPS = 3
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


def run(workdir, url, **fields) -> str:
    """Trains on one device; returns what was printed."""
    config = debug.get_config("")
    config.update_from_flattened_dict(FIELDS | {"remote.user.url": url} | fields)
    text, mesh = io.StringIO(), make_mesh(1, 1, 1, devices=jax.devices()[:1])
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
    total = 0.0
    for row in rows[1:]:
        assert row["remote/left_out"] == 0
        assert row["policy/grad_norm"] > 0
        cost = (2 * row["remote/tokens_in"] + 8 * row["remote/tokens_out"]) / 1e6
        assert row["remote/cost"] == pytest.approx(cost) != 0
        total += row["remote/cost"]
    assert rows[-1]["remote/cost_total"] == pytest.approx(total + sum(row["eval/cost"] for row in evaluated))
