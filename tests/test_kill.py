"""A run that is killed again and again ends as one that never was: processes, signals, real files."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs import debug

from .test_trainer import policy_of, records_of, rows_of, same

ROOT = Path(__file__).resolve().parents[1]
STEPS = 12
FIELDS = {"train.steps": STEPS, "checkpoint.every": 2, "log.dialogues_every": 3, "eval.every": 4}


def start(workdir: Path) -> subprocess.Popen:
    """A run in a process of its own."""
    fields = [f"--config.{name}={value}" for name, value in FIELDS.items()]
    command = [sys.executable, "-m", "rlver_jax.train", f"--config={debug.__file__}", f"--workdir={workdir}"]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, *fields], cwd=ROOT, env=os.environ | {"XLA_FLAGS": ""}, **pipe)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """(folder of a run that nobody disturbed, its seconds)."""
    folder, began = tmp_path_factory.mktemp("unbroken"), time.monotonic()
    run = start(folder)
    printed = run.communicate(timeout=300)[0]
    assert run.returncode == 0, printed
    return folder, time.monotonic() - began


def same_as(folder: Path, other: Path) -> None:
    assert [row["step"] for row in rows_of(folder)] == list(range(STEPS + 1)), "no step twice, none missing"
    assert rows_of(folder) == rows_of(other)
    assert same(policy_of(folder), policy_of(other))
    names = sorted(file.name for file in (other / "dialogues").iterdir())
    assert sorted(file.name for file in (folder / "dialogues").iterdir()) == names
    for step in (1, 3, 6, 9, 12):
        assert records_of(folder, step) == records_of(other, step)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.long
def test_killed_at_five_random_moments(unbroken, tmp_path):
    """Two kills at any moment of a start, three amid steps and saves; each time the run has gone further."""
    other, seconds = unbroken
    draw = random.Random(int.from_bytes(os.urandom(4), "little"))
    killed = []
    for attempt in range(5):
        run = start(tmp_path)
        if attempt % 2:
            wait = draw.uniform(0, seconds / 2)
            time.sleep(wait)
        else:
            wanted = 4 + 3 * (attempt // 2)  # rows 4, 7, 10: there are checkpoints of steps 2, 4, …
            while lines(tmp_path / "metrics.jsonl") < wanted and run.poll() is None:
                time.sleep(0.005)
            wait = draw.uniform(0, 1.0)
            time.sleep(wait)
        run.kill()
        run.communicate()
        killed.append(f"{wait:.2f} s: {lines(tmp_path / 'metrics.jsonl')} rows")
        if run.returncode == 0:
            break
    print("killed after", "; ".join(killed))
    last = start(tmp_path)
    printed = last.communicate(timeout=300)[0]
    assert last.returncode == 0 or "holds a finished run" in printed, printed
    same_as(tmp_path, other)


@pytest.mark.slow
def test_sigterm_finishes_the_step_and_saves(unbroken, tmp_path):
    other, _ = unbroken
    run = start(tmp_path)
    while lines(tmp_path / "metrics.jsonl") < 4 and run.poll() is None:
        time.sleep(0.005)
    run.send_signal(signal.SIGTERM)
    printed = run.communicate(timeout=120)[0]
    assert run.returncode == 0, printed
    assert "stopped by a signal: the same command goes on" in printed
    done = rows_of(tmp_path)[-1]["step"]
    assert 3 < done < STEPS
    again = start(tmp_path)
    printed = again.communicate(timeout=300)[0]
    assert f"going on after step {done} of {STEPS}" in printed, "its last step was saved"
    same_as(tmp_path, other)


@pytest.mark.slow
def test_a_truncated_newest_checkpoint_falls_back_and_says_so(unbroken, tmp_path):
    other, _ = unbroken
    run = start(tmp_path)
    while lines(tmp_path / "metrics.jsonl") < 7 and run.poll() is None:
        time.sleep(0.005)
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=120)
    newest = sorted((tmp_path / "checkpoints").iterdir())[-1]
    file = max((f for f in newest.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    os.truncate(file, file.stat().st_size // 2)
    again = start(tmp_path)
    printed = again.communicate(timeout=300)[0].replace("\n", " ")
    assert f"checkpoint of step {int(newest.name)} cannot be used" in printed
    assert "using the checkpoint of step" in printed
    same_as(tmp_path, other)
