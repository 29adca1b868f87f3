"""Training by several processes: what one process does, whatever happens to one of them."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest

from configs import debug
from tests.parallel.processes import processes
from tests.training.test_loop import check_eventful, policy_of, records_of, rows_of, same

STEPS = 6
FIELDS = {
    "train.steps": STEPS,
    "checkpoint.every": 2,
    "log.dialogues_every": 3,
    "eval.every": 3,
    "log.tensorboard": False,
}
CONFIG = f"--config={debug.__file__}:direct"
pytestmark = pytest.mark.slow


def start(count: int, devices: int, workdir: Path, *more: str):
    """A training by so many processes."""
    fields = [f"--config.{name}={value}" for name, value in FIELDS.items()]
    return processes(count, devices, "rlver_jax.train", CONFIG, f"--workdir={workdir}", *fields, *more)


def finish(started) -> str:
    """What process 0 printed, once all have ended well."""
    with started as members:
        for member in members:
            assert member.ended(600) == 0, member.printed
        return members[0].printed


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run by one process with eight devices."""
    folder = tmp_path_factory.mktemp("alone")
    finish(start(1, 8, folder))
    check_eventful(folder, 1, 3, 6)
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A run by two processes with four devices each."""
    folder = tmp_path_factory.mktemp("pair")
    with start(2, 4, folder) as members:
        assert [member.ended(600) for member in members] == [0, 0], members[0].printed + members[1].printed
        assert f"{STEPS} of {STEPS} steps" in members[0].printed
        assert "emotion" not in members[1].printed, "one talks to the terminal"
    check_eventful(folder, 1, 3, 6)
    return folder


def close_to(folder: Path, other: Path) -> None:
    assert [row["step"] for row in rows_of(folder)] == list(range(STEPS + 1)), "no step twice, none missing"
    says = [[m["content"] for r in records_of(f, 1) for m in r["messages"]] for f in (folder, other)]
    assert says[0] == says[1]
    for mine, theirs in zip(rows_of(folder), rows_of(other), strict=True):
        for name in ("policy/loss", "emotion/final_mean", "reward/mean", "eval/score"):
            if name in theirs:
                assert mine[name] == pytest.approx(theirs[name], abs=1e-3), name


def same_as(folder: Path, other: Path) -> None:
    assert rows_of(folder) == rows_of(other)
    assert same(policy_of(folder), policy_of(other))
    for step in (1, 3, 6):
        assert records_of(folder, step) == records_of(other, step)


def wait_for_rows(members, folder: Path, count: int, seconds: float = 300) -> None:
    until = time.monotonic() + seconds
    path = folder / "metrics.jsonl"
    while (path.read_bytes().count(b"\n") if path.exists() else 0) < count:
        for member in members:
            assert member.process.poll() is None, (member.ended(0), member.printed)
        assert time.monotonic() < until
        time.sleep(0.005)


def test_two_processes_do_what_one_does(alone, pair):
    close_to(pair, alone)


def test_sigterm_to_one_stops_both_and_what_goes_on_equals_an_unbroken_run(pair, tmp_path):
    with start(2, 4, tmp_path) as members:
        wait_for_rows(members, tmp_path, 3)
        members[1].process.send_signal(signal.SIGTERM)
        assert [member.ended(120) for member in members] == [0, 0], members[0].printed + members[1].printed
        assert "stopped by a signal: the same command resumes" in members[0].printed
    done = rows_of(tmp_path)[-1]["step"]
    assert 2 <= done < STEPS
    assert f"resuming after step {done} of {STEPS}" in finish(start(2, 4, tmp_path))
    same_as(tmp_path, pair)


@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_and_the_run_goes_on(pair, tmp_path, victim):
    with start(2, 4, tmp_path) as members:
        wait_for_rows(members, tmp_path, 4)
        members[victim].process.kill()
        began = time.monotonic()
        left = members[1 - victim]
        assert left.ended(60) != 0
        print(f"ended {time.monotonic() - began:.1f} s after process {victim} was killed")
        expected = ("cannot continue without the others", "another task died", "leader task")
        assert any(text in left.printed for text in expected), left.printed
    assert "resuming after step" in finish(start(2, 4, tmp_path))
    same_as(tmp_path, pair)


@pytest.mark.long
def test_a_full_disk_on_one_ends_both(pair, tmp_path):
    """The folder of dialogues turns into a file: process 0 cannot write them."""
    shutil.copytree(pair, tmp_path, dirs_exist_ok=True)
    (tmp_path / "finished.json").unlink()
    with start(2, 4, tmp_path, "--config.train.steps=60") as members:
        members[0].told("step 7/60", 300)
        shutil.rmtree(tmp_path / "dialogues")
        (tmp_path / "dialogues").write_text("")
        assert members[0].ended(90) == 2
        assert "train: [Errno" in members[0].printed
        assert members[1].ended(90) != 0


@pytest.mark.long
def test_a_checkpoint_of_eight_devices_goes_on_with_four_then_sixteen(alone, tmp_path):
    """Values equal on every mesh: Checkpoints compares each leaf's checksum with that of the one that saved it."""
    finish(start(2, 4, tmp_path, "--config.train.steps=2"))
    finish(start(1, 4, tmp_path, "--config.train.steps=4"))
    finish(start(2, 8, tmp_path, "--config.mesh.fsdp=8", "--config.mesh.tensor=2"))
    close_to(tmp_path, alone)


def test_two_processes_evaluate_a_checkpoint_as_training_did(pair, tmp_path):
    """The second start finds everything played; the folder of the first is process 0's alone."""
    words = ["rlver_jax.evaluate", CONFIG, f"--checkpoint={pair}", f"--out={tmp_path / 'out'}"]
    words += ["--step=last"]
    finish(processes(2, 4, *words))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["score"] == pytest.approx(rows_of(pair)[-1]["eval/score"])
    assert "8 of 8 dialogues are in" in finish(processes(2, 4, *words))
    with processes(2, 4, *words, "--judge=x") as members:
        assert [member.ended(60) for member in members] == [2, 2]
        assert "--judge: works in one process, but there are 2" in members[1].printed
