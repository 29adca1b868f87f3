"""Two commands and one folder: real processes that train and evaluate, suspended, killed, on hosts of two names."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs import debug
from tests.parallel.processes import processes
from tests.quick import QUICK
from tests.training.test_loop import rows_of

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow
# A command on a host of another name, whose lock is watched for a second and a half.
ELSEWHERE = """
import socket, sys
socket.gethostname = lambda: sys.argv[1]
from rlver_jax.runs import lock
lock.BEAT, lock.WATCH = 0.25, 1.5
from rlver_jax.{command} import main
sys.exit(main(sys.argv[2:]))
"""
FIELDS = {"checkpoint.every": 1, "eval.every": 0, "log.tensorboard": False, "log.dialogues_every": 1}


class Command:
    """A process; `printed` is what it has said when it has ended."""

    def __init__(self, command, *args, host=""):
        program = ["-c", ELSEWHERE.format(command=command), host] if host else ["-m", f"rlver_jax.{command}"]
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        env = os.environ | {"XLA_FLAGS": QUICK, "COLUMNS": "300"}
        self.process = subprocess.Popen([sys.executable, *program, *args], cwd=ROOT, env=env, **pipe)

    def ended(self, seconds=240) -> int:
        self.printed = self.process.communicate(timeout=seconds)[0]
        return self.process.returncode

    def signal(self, number) -> None:
        self.process.send_signal(number)


@contextlib.contextmanager
def started(*args, **kwargs):
    one = Command(*args, **kwargs)
    try:
        yield one
    finally:
        if one.process.poll() is None:
            one.signal(signal.SIGCONT)
            one.process.kill()
            one.process.communicate()


def training(workdir, steps, **fields):
    flags = [f"--config.{name}={value}" for name, value in (FIELDS | {"train.steps": steps} | fields).items()]
    return ["train", f"--config={debug.__file__}", *flags, f"--workdir={workdir}"]


def wait_until(condition, one: Command, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        assert one.process.poll() is None, one.process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.02)


def owner(workdir) -> int | None:
    """The process that holds the folder, if any does at this moment."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((workdir / "lock" / "owner.json").read_text())["pid"]
    return None


def rows(workdir) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_second_training_is_refused_and_a_killed_one_is_followed_at_once(tmp_path):
    with started(*training(tmp_path, 500)) as one:
        wait_until(lambda: rows(tmp_path) > 2, one)
        with started(*training(tmp_path, 500)) as two:
            assert two.ended() == 2
            assert f"is in use by process {one.process.pid} on host" in two.printed
        one.signal(signal.SIGSTOP)
        with started(*training(tmp_path, 500)) as two:
            assert two.ended() == 2, "suspended, it is still there"
        one.signal(signal.SIGKILL)
        one.process.wait()
    assert (tmp_path / "lock").exists()
    done = rows(tmp_path)
    with started(*training(tmp_path, done + 2)) as three:
        assert three.ended() == 0, three.printed
    assert f"taken over from process {one.process.pid}" in three.printed
    assert [row["step"] for row in rows_of(tmp_path)] == list(range(1, done + 3))
    assert not (tmp_path / "lock").exists()


@pytest.mark.long
def test_who_was_suspended_on_another_host_ends_before_it_writes(tmp_path):
    with started(*training(tmp_path, 500), host="elsewhere") as one:
        wait_until(lambda: rows(tmp_path) > 2, one)
        one.signal(signal.SIGSTOP)
        with started(*training(tmp_path, 500), host="here") as two:
            wait_until(lambda: owner(tmp_path) == two.process.pid, two)
            one.signal(signal.SIGCONT)
            assert one.ended() == 1, one.printed
            assert f"is no longer this process's: process {two.process.pid} on host here" in one.printed
            now = rows(tmp_path)
            wait_until(lambda: rows(tmp_path) > now + 1, two)
            two.signal(signal.SIGTERM)
            assert two.ended() == 0, two.printed
    steps = [row["step"] for row in rows_of(tmp_path)]
    assert steps == list(range(1, len(steps) + 1)), "no row is the loser's"
    assert not (tmp_path / "lock").exists()


def test_sigterm_while_loading_leaves_no_lock(tmp_path):
    with started(*training(tmp_path, 500)) as one:
        wait_until(lambda: (tmp_path / "config.json").exists(), one)
        one.signal(signal.SIGTERM)
        assert one.ended(60) in (0, 143)
    assert not (tmp_path / "lock").exists()


def test_evaluations_hold_their_folder_and_only_that(tmp_path):
    """Reading a run needs no lock of it; a second evaluation into one --out is refused."""
    with started(*training(tmp_path / "run", 2)) as one:
        assert one.ended() == 0, one.printed
    played = ["--config.eval.num_profiles=8", "--config.eval.batch=1", f"--checkpoint={tmp_path / 'run'}"]
    command = ["evaluate", f"--config={debug.__file__}", *played, f"--out={tmp_path / 'out'}", "--repeats=20"]
    with started(*training(tmp_path / "run", 500)) as training_on:
        wait_until(lambda: owner(tmp_path / "run") == training_on.process.pid, training_on)
        training_on.signal(signal.SIGSTOP)  # so that the checkpoint stays, and the processors are free
        with started(*command) as first:
            wait_until(lambda: (tmp_path / "out" / "dialogues.jsonl").exists(), first)
            assert owner(tmp_path / "run") == training_on.process.pid
            with started(*command) as second:
                assert second.ended() == 2, second.printed
                assert f"out: is in use by process {first.process.pid} on host" in second.printed
                assert "name another --out" in second.printed
            first.signal(signal.SIGTERM)
            assert first.ended(60) == 143
    assert not (tmp_path / "out" / "lock").exists()


def test_the_refusal_reaches_all_processes(tmp_path):
    with started(*training(tmp_path, 500)) as one:
        wait_until(lambda: rows(tmp_path) > 0, one)
        command, *args = training(tmp_path, 500)
        with processes(2, 1, f"rlver_jax.{command}", *args) as two:
            assert [member.ended(120) for member in two] == [2, 2]
        assert f"is in use by process {one.process.pid} on host" in two[0].printed
        assert "process 0 failed; its own log says why" in two[1].printed
        assert one.process.poll() is None


def test_an_interrupted_run_is_refused_with_other_profiles(tmp_path):
    world = shutil.copytree(debug.WORLD, tmp_path / "world")
    files = {"data.train": world / "profiles.jsonl", "data.eval": world / "profiles.jsonl"}
    with started(*training(tmp_path / "run", 2, **files)) as one:
        assert one.ended() == 0, one.printed
    lines = (world / "profiles.jsonl").read_text().splitlines()
    edited = json.loads(lines[3])
    edited["player"] += " And a dog."
    (world / "profiles.jsonl").write_text("\n".join([*lines[:3], json.dumps(edited), *lines[4:]]) + "\n")
    with started(*training(tmp_path / "run", 4, **files)) as two:
        assert two.ended() == 2
        assert "the training profiles (data.train=" in two.printed
    with started(*training(tmp_path / "run", 3)) as three:
        assert three.ended() == 0, three.printed  # the very same profiles, where they were copied from
