"""A run that is killed again and again ends as one that never was: processes, signals, real files."""

import dataclasses
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from configs import debug
from rlver_jax.training.metrics_file import read_metrics
from rlver_jax.training.workdir import FINISHED
from tests.quick import QUICK
from tests.training.test_loop import records_of, rows_of

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow
FIELDS = {"checkpoint.every": 2, "log.dialogues_every": 1}
STEPS = 14  # two more than the last kill of the plan saves
# (moment, the row of metrics that it follows), each moment once a line. After odd rows nothing is evaluated or saved.
PLAN = [
    *(("start", 0), ("playing", 1), ("update", 1), ("saving", 0), ("saved", 0)),
    *(("start", 0), ("playing", 3), ("update", 5), ("saving", 0), ("saved", 0)),
    *(("start", 0), ("playing", 7), ("update", 9), ("saving", 0), ("saved", 0)),
    *(("start", 0), ("playing", 11), ("update", 11), ("saving", 0), ("saved", 0)),
]


@dataclasses.dataclass(frozen=True)
class Unbroken:
    """A run that nobody disturbed: its folder, steps and steps between evaluations, and the seconds of each moment."""

    folder: Path
    steps: int
    evaluated: int
    seconds: dict[str, float]


def start(workdir: Path, steps: int = STEPS, evaluated: int = 4, **changes: object) -> subprocess.Popen:
    """A run in a process of its own."""
    fields = FIELDS | {"train.steps": steps, "eval.every": evaluated}
    fields |= {name.replace("__", "."): value for name, value in changes.items()}
    fields = [f"--config.{name}={value}" for name, value in fields.items()]
    command = [sys.executable, "-m", "rlver_jax.train", f"--config={debug.__file__}", f"--workdir={workdir}"]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, *fields], cwd=ROOT, env=os.environ | {"XLA_FLAGS": QUICK}, **pipe)


def undisturbed(folder: Path, steps: int, evaluated: int) -> Unbroken:
    began = time.monotonic()
    run = start(folder, steps, evaluated)
    wait_for(run, lambda: has_row(folder, 0, 0))
    ready = time.monotonic() - began
    printed = run.communicate(timeout=600)[0]
    assert run.returncode == 0, printed
    rows = read_metrics(folder / "metrics.jsonl")[1:]
    playing, update = (statistics.median(row[f"time/{name}_s"] for row in rows) for name in ("rollout", "update"))
    return Unbroken(folder, steps, evaluated, {"start": ready, "playing": playing, "update": update})


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """Without evaluations, whose program takes as long to compile as all steps to run."""
    return undisturbed(tmp_path_factory.mktemp("short"), 4, 0)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return undisturbed(tmp_path_factory.mktemp("unbroken"), STEPS, 4)


def test_a_run_goes_on_with_less_memory(short, tmp_path):
    """As after a step that ran out of it; what is recomputed or summed in parts differs by rounding."""
    folder = tmp_path / "run"
    less = {"policy__remat": "full", "train__microbatches": 2, "loss__vocab_chunk": 64}
    for steps, changes in ((2, {}), (3, less)):
        run = start(folder, steps, 0, **changes)
        printed = run.communicate(timeout=600)[0]
        assert run.returncode == 0, printed
    wanted, row = read_metrics(short.folder / "metrics.jsonl")[2], read_metrics(folder / "metrics.jsonl")[2]
    assert row["step"] == wanted["step"] == 3
    for name in ("policy/loss", "policy/grad_norm", "reward/mean"):
        assert row[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-6), name
    assert json.loads((folder / "config.json").read_text())["policy.remat"] == "full"


def state_of(folder: Path, step: int) -> dict[str, np.ndarray]:
    """Everything that a checkpoint holds, as Orbax alone reads it: parameters, optimizer state, counters."""
    restored = ocp.PyTreeCheckpointHandler().restore(folder / "checkpoints" / f"{step:06d}" / "state")
    return {name: np.asarray(leaf) for name, leaf in restored.items()}


def saved(folder: Path) -> set[str]:
    """Names of whole checkpoints: Orbax writes them under another name first."""
    return {path.name for path in (folder / "checkpoints").glob("*") if path.name.isdigit()}


def unfinished(folder: Path) -> set[str]:
    return {path.name for path in (folder / "checkpoints").glob("*tmp*")}


def same_as(folder: Path, other: Unbroken) -> None:
    last, first = other.steps, 0 if other.evaluated else 1
    assert [row["step"] for row in rows_of(folder)] == list(range(first, last + 1)), "no step twice, none missing"
    assert rows_of(folder) == rows_of(other.folder)
    names = sorted(file.name for file in (other.folder / "dialogues").iterdir())
    assert names == [f"step_{step:06d}.jsonl" for step in range(1, last + 1)]
    assert sorted(file.name for file in (folder / "dialogues").iterdir()) == names
    for step in range(1, last + 1):
        assert records_of(folder, step) == records_of(other.folder, step)
    assert {f"{last - 2:06d}", f"{last:06d}"} <= saved(other.folder) <= saved(folder)
    for step in map(int, saved(other.folder)):
        mine, theirs = state_of(folder, step), state_of(other.folder, step)
        assert mine.keys() == theirs.keys()
        assert {name.split("/")[0] for name in mine} >= {"params", "opt_state"}
        for name, leaf in mine.items():
            assert leaf.dtype == theirs[name].dtype, name
            assert leaf.tobytes() == theirs[name].tobytes(), f"step {step}: {name}"
        files = [f / f"checkpoints/{step:06d}/record/metadata" for f in (folder, other.folder)]
        assert len({json.dumps(json.loads(file.read_text()), sort_keys=True) for file in files}) == 1


@pytest.mark.parametrize("run", ["short", pytest.param("unbroken", marks=pytest.mark.long)])
def test_there_is_something_to_lose(run, request):
    """What is compared below differs from step to step: rewards within groups and between them, parameters, moments."""
    fixture = request.getfixturevalue(run)
    folder, last, seen = fixture.folder, fixture.steps, set()
    for step in range(1, last + 1):
        rewards = [record["reward"] for record in records_of(folder, step)]
        assert len(set(rewards)) >= 4, f"step {step}: {rewards}"
        assert len(set(rewards[:4])) > 1 < len(set(rewards[4:])), f"step {step}: {rewards}"
        seen.add(tuple(rewards))
    assert len(seen) == last
    before, after = state_of(folder, last - 2), state_of(folder, last)
    for name, leaf in after.items():
        assert name == "skipped" or not np.array_equal(leaf, before[name]), f"{name} has not moved"
    moved = {name: np.linalg.norm(leaf - before[name]) for name, leaf in after.items() if name.startswith("params/")}
    weights = sum(np.linalg.norm(before[name]) ** 2 for name in moved) ** 0.5
    assert sum(x**2 for x in moved.values()) ** 0.5 > 1e-3 * weights


def has_row(folder: Path, step: int, began: float) -> bool:
    """Whether a run that was started at `began`, in seconds of the epoch, has written a step's row."""
    path = folder / "metrics.jsonl"
    new = path.exists() and path.stat().st_mtime > began  # otherwise the rows are those of an earlier start
    return new and any(row["step"] >= step for row in read_metrics(path))


def wait_for(run: subprocess.Popen, sign: Callable[[], bool], seconds: float = 600, late: bool = False) -> None:
    """Until there is a sign of what is waited for; `late`: or the seconds have passed."""
    until = time.monotonic() + seconds
    while not sign():
        assert run.poll() is None, f"has ended: {run.communicate()[0]}"
        if time.monotonic() > until:
            assert late, f"no sign within {seconds} s"
            return
        time.sleep(0.001)


def wait(run: subprocess.Popen, folder: Path, moment: str, row: int, began: float, seconds: dict, share: float) -> None:
    """Until the moment has come, and that share of it has passed; on a machine that is faster now, until its end."""
    names = {"saving": unfinished, "saved": saved}.get(moment)
    if names:
        known = names(folder)
        wait_for(run, lambda: bool(names(folder) - known))
        time.sleep(0.01 * share if moment == "saving" else 0)
    elif moment == "start":  # its end: the metrics are opened
        wait_for(run, lambda: has_row(folder, 0, began), seconds["start"] * share, late=True)
    else:  # a row is written when the next step begins to play
        wait_for(run, lambda: has_row(folder, row, began))
        passed = seconds["playing"] * share if moment == "playing" else seconds["playing"] + seconds["update"] * share
        wait_for(run, lambda: has_row(folder, row + 1, began), passed, late=True)


def kill_and_go_on(folder: Path, other: Unbroken, plan: list) -> list[tuple[str, set[str]]]:
    """Kills a run at each of the plan's moments, and lets the last start end; each moment with its unfinished saves."""
    seed = int.from_bytes(os.urandom(4), "little")
    draw, kills, seconds = random.Random(seed), [], dict(other.seconds)
    print(f"drawn with seed {seed}")
    for number, (moment, row) in enumerate(plan):
        share = (number / len(plan) + draw.random()) % 1
        began = time.time()
        run = start(folder, other.steps, other.evaluated)
        wait(run, folder, moment, row, began, seconds, share)
        run.kill()
        printed = run.communicate()[0]
        assert run.returncode == -signal.SIGKILL, printed
        took = time.time() - began
        if moment != "start":
            seconds["start"] = min(seconds["start"], took)  # the first start also compiled
        rows = rows_of(folder) if (folder / "metrics.jsonl").exists() else []
        kills.append((moment, unfinished(folder)))
        left = f"{len(rows)} rows, checkpoints {', '.join(sorted(saved(folder) | unfinished(folder))) or 'none'}"
        print(f"{number + 1:2d} {moment}, after {took:.2f} s: {left}", flush=True)
    last = start(folder, other.steps, other.evaluated)
    printed = last.communicate(timeout=600)[0]
    assert last.returncode == 0, printed
    same_as(folder, other)
    return kills


def test_killed_amid_a_save(short, tmp_path):
    """The one of those below that leaves the most behind."""
    kill_and_go_on(tmp_path, short, [("saving", 0)])


@pytest.mark.long
@pytest.mark.parametrize("kills", [8, len(PLAN)])
def test_killed_again_and_again(kills, unbroken, tmp_path):
    """While it starts, plays, updates, saves and right after, at moments that are drawn anew."""
    began = time.monotonic()
    history = kill_and_go_on(tmp_path, unbroken, PLAN[:kills])
    print(f"{len(history)} kills in {time.monotonic() - began:.0f} s")
    assert len(history) == kills
    assert any(names for moment, names in history if moment == "saving"), "a save was really cut off"


def test_sigterm_finishes_the_step_and_saves(short, tmp_path):
    run = start(tmp_path, short.steps, short.evaluated)
    wait_for(run, lambda: has_row(tmp_path, 1, 0))
    run.send_signal(signal.SIGTERM)
    printed = run.communicate(timeout=120)[0]
    assert run.returncode == 0, printed
    assert "stopped by a signal: the same command resumes" in printed
    done = rows_of(tmp_path)[-1]["step"]
    assert 1 <= done < short.steps
    again = start(tmp_path, short.steps, short.evaluated)
    printed = again.communicate(timeout=300)[0]
    assert f"resuming after step {done} of {short.steps}" in printed, "its last step was saved"
    same_as(tmp_path, short)


def test_a_truncated_newest_checkpoint_falls_back_and_says_so(short, tmp_path):
    """As after a kill between the last save and the end of the run."""
    folder = shutil.copytree(short.folder, tmp_path / "run")
    (folder / FINISHED).unlink()
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    for file in newest.rglob("d/*"):  # Orbax reads not all of them
        os.truncate(file, file.stat().st_size // 2)
    again = start(folder, short.steps, short.evaluated)
    printed = again.communicate(timeout=300)[0].replace("\n", " ")
    assert f"checkpoint of step {int(newest.name)} cannot be used" in printed
    assert "using the checkpoint of step" in printed
    same_as(folder, short)
