"""The next batch is played while the update runs; and what a step takes where users answer after 300 ms."""

import random
import time

import jax
import numpy as np
import pytest
from rich.console import Console

from configs import debug, miniature
from rlver_jax import train as command
from rlver_jax.parallel.mesh import make_mesh
from rlver_jax.training.loop import train
from rlver_jax.training.metrics_file import read_metrics
from tests.endpoints.server import ChatServer
from tests.training.test_loop import policy_of, same
from tests.training.test_remote_users import records_of, rows_of, run

FIELDS = {"loss.recompute": True, "loss.importance_cap": 2.0, "train.steps": 3, "eval.every": 0, "checkpoint.every": 50}
LATENCY, TURNS = 0.3, 6


@pytest.fixture(scope="module")
def server():
    with ChatServer() as running:
        yield running


@pytest.fixture(scope="module")
def overlapped(server, tmp_path_factory):
    """A run whose answers come after delays of their own."""
    folder, draw = tmp_path_factory.mktemp("overlapped"), random.Random(0)
    server.before = lambda: time.sleep(draw.random() * 0.05)
    run(folder, server.url, **FIELDS, **{"rollout.overlap": 1})
    server.before = lambda: None
    return folder


@pytest.mark.slow
def test_a_batch_is_played_by_the_policy_before_the_update(server, overlapped, tmp_path):
    """Step 2 by the policy that step 1 was played by, which a run without learning plays with throughout."""
    run(tmp_path / "still", server.url, **FIELDS, **{"train.learning_rate": 0.0})
    played = [records_of(overlapped, step) for step in (1, 2, 3)]
    still = [records_of(tmp_path / "still", step) for step in (1, 2, 3)]
    assert played[:2] == still[:2]
    assert played[2] != still[2], "step 3 has learned from step 1"
    rows = rows_of(overlapped)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(np.isfinite(row["policy/loss"]) for row in rows)


@pytest.mark.slow
def test_who_is_faster_changes_nothing(server, overlapped, tmp_path):
    run(tmp_path / "run", server.url, **FIELDS, **{"rollout.overlap": 1})
    assert rows_of(tmp_path / "run") == rows_of(overlapped)
    assert same(policy_of(tmp_path / "run"), policy_of(overlapped))


@pytest.mark.slow
def test_after_a_checkpoint_the_newest_policy_plays(server, tmp_path):
    """So that a run which resumes there has the same bits."""
    fields = FIELDS | {"rollout.overlap": 1, "checkpoint.every": 1, "train.steps": 2}
    run(tmp_path / "overlapped", server.url, **fields)
    run(tmp_path / "exact", server.url, **fields | {"rollout.overlap": 0})
    assert rows_of(tmp_path / "overlapped") == rows_of(tmp_path / "exact")


@pytest.mark.slow
def test_a_run_resumes_with_the_same_bits(server, tmp_path):
    """Four steps at once, and two by two: batch 2 is played ahead in both, batch 3 in neither."""
    fields = FIELDS | {"rollout.overlap": 1, "checkpoint.every": 2}
    run(tmp_path / "whole", server.url, **fields | {"train.steps": 4})
    for steps in (2, 4):
        run(tmp_path / "parts", server.url, **fields | {"train.steps": steps})
    assert rows_of(tmp_path / "parts") == rows_of(tmp_path / "whole")
    assert same(policy_of(tmp_path / "parts"), policy_of(tmp_path / "whole"))


@pytest.mark.parametrize("field", ["loss.importance_cap=0.0", "loss.recompute=False", "remote.user.url="])
def test_it_needs_a_correction_and_an_endpoint(tmp_path, capsys, field):
    overrides = FIELDS | {"rollout.overlap": 1, "remote.user.url": "http://x/v1", "remote.user.model": "m"}
    if field.startswith("loss.recompute"):
        overrides["loss.importance_cap"] = 0.0
    flags = [f"--config.{name}={value}" for name, value in overrides.items()]
    assert command.main([f"--config={debug.__file__}", f"--workdir={tmp_path / 'x'}", *flags, f"--config.{field}"]) == 2
    assert "rollout.overlap=1" in capsys.readouterr().err


@pytest.mark.long  # a time, which other work on the machine changes
@pytest.mark.parametrize(("overlap", "most"), [(0, 1.3), (1, 1.15)])
def test_a_step_takes_little_more_than_the_slower_side(server, tmp_path, overlap, most):
    """The miniature's 64 dialogues, 300 ms a request, beside the same run with a server that answers at once.

    A run before both compiles what they need: rows of new lengths are met in later steps as well. Then they take turns,
    since a machine's speed changes within minutes.
    """

    def seconds(folder, latency) -> list[float]:
        """Of each step but the first, which compiles, and the last, beside which nothing is played."""
        config = miniature.get_config("")
        fields = FIELDS | {"remote.user.url": server.url, "remote.user.model": "m", "remote.concurrency": 64}
        fields |= {"rollout.overlap": overlap, "train.steps": 4, "log.tensorboard": False, "alarms.readable_min": 0.0}
        config.update_from_flattened_dict(fields)
        server.before = lambda: time.sleep(latency)
        try:
            train(config, folder, make_mesh(1, 1, 1, devices=jax.devices()[:1]), Console(quiet=True))
        finally:
            server.before = lambda: None
        rows = read_metrics(folder / "metrics.jsonl")[1:-1]
        return [row["time/rollout_s"] + row["time/update_s"] for row in rows]

    seconds(tmp_path / "compiles", 0.0)
    at_once, late = [], []
    for i in range(3):
        at_once += seconds(tmp_path / f"at_once{i}", 0.0)
        late += seconds(tmp_path / f"late{i}", LATENCY)
    device, step = (float(np.median(times)) for times in (at_once, late))
    endpoint = (2 * TURNS - 1) * LATENCY  # an appraisal and a reply a turn, no reply in the last one
    print(
        f"overlap={overlap}: a step takes {step:.2f} s, the device {device:.2f} s, the endpoint {endpoint:.2f} s",
        at_once,
        late,
    )
    assert step <= most * max(device, endpoint)
