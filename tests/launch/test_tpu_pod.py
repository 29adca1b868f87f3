"""launch/tpu_pod.sh with a stand-in `gcloud` whose workers are processes of this machine; the rest is real."""

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import orbax.checkpoint
import pytest

from tests.parallel.processes import free_port, processes
from tests.quick import QUICK
from tests.training.test_loop import check_eventful, policy_of, rows_of, same

ROOT = Path(__file__).resolve().parents[2]
SCRIPT, STANDIN = ROOT / "launch" / "tpu_pod.sh", Path(__file__).parent / "standin"


class Pod:
    """A TPU of two workers."""

    def __init__(self, root: Path):
        self.root = root
        root.mkdir()
        self.environ = os.environ | {
            "PATH": f"{STANDIN}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "STANDIN_ROOT": str(root),
            "STANDIN_WORKERS": "2",
            "STANDIN_DEVICES": "4",
            "STANDIN_PORT": str(free_port()),
            "STANDIN_SITE": str(Path(orbax.checkpoint.__file__).parents[2]),
            "STANDIN_XLA": QUICK,
        }

    def call(self, *words: str, status: int = 0) -> str:
        done = subprocess.run([SCRIPT, *words], env=self.environ, capture_output=True, text=True, timeout=900)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def folder(self, worker: int) -> Path:
        return self.root / f"worker-{worker}" / "rlver_jax_pod"

    def give_environment(self) -> None:
        """Instead of an installation: the test's interpreter, and a pip that only notes what it is asked for."""
        for worker in (0, 1):
            python = self.folder(worker) / "venv" / "bin" / "python"
            python.parent.mkdir(parents=True)
            note = f'[ "$1 $2" != "-m pip" ] || {{ echo "$*" >> {self.folder(worker)}/pip; exit; }}'
            python.write_text(f'#!/bin/bash\n{note}\nexec {sys.executable} "$@"\n')
            python.chmod(0o755)

    def wait(self, seconds: float = 900) -> list[str]:
        """The exit statuses, once the command has ended on both workers."""
        until = time.monotonic() + seconds
        ended = [self.folder(i) / "exit_status" for i in (0, 1)]
        while not all(path.exists() and path.read_text() for path in ended):
            assert time.monotonic() < until, self.call("pod", "--logs=50")
            time.sleep(0.2)
        return [path.read_text().strip() for path in ended]

    def close(self) -> None:
        """Ends what a failed test left running."""
        for worker in (0, 1):
            pid, ended = self.folder(worker) / "pid", self.folder(worker) / "exit_status"
            if pid.exists() and not ended.exists():
                os.kill(int(pid.read_text()), signal.SIGKILL)


@pytest.fixture
def pod(tmp_path):
    with contextlib.closing(Pod(tmp_path / "pod")) as fake_pod:
        yield fake_pod


def test_scripts_pass_shellcheck():
    if not shutil.which("shellcheck"):
        pytest.skip("no shellcheck: apt-get install shellcheck")
    scripts = [*(ROOT / "launch").glob("*.sh"), STANDIN / "gcloud", *(STANDIN / "worker").iterdir()]
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_dry_run_prints_the_commands_and_runs_none(pod):
    printed = pod.call("pod", "--zone=z", "--project=p", "--dry-run", "--", "python", "-m", "x", "--flag=a b")
    assert not (pod.root / "calls").exists()
    lines = printed.splitlines()
    assert all(line.startswith(("gcloud compute tpus tpu-vm ", "tar ")) for line in lines)
    assert all("--zone=z --project=p --worker=all" in line for line in lines if line.startswith("gcloud"))
    assert r"start\ python\ -m\ x\ --flag=a\\\ b" in lines[-1], "quoted twice: for this shell and the worker's"
    assert not any(word in printed for word in ("create", "delete"))


def test_what_cannot_be_is_refused(pod):
    for words, why in [
        ([], "no TPU was named"),
        (["pod"], "neither a command"),
        (["pod", "--status", "--stop"], "--status and --stop together"),
        (["pod", "--status", "--", "x"], "--status takes no command"),
        (["pod", "--zoom=z", "--status"], "unknown option --zoom=z"),
        (["pod", "python"], "the command comes after --"),
        (["pod", "--logs=many"], "expected a number"),
        (["pod", "--env=NO_SUCH_VARIABLE", "--", "x"], "--env=NO_SUCH_VARIABLE: no such variable here"),
        (["pod", "--env=PATH", "--stop"], "--stop takes no --env"),
    ]:
        assert why in pod.call(*words, status=2)


def test_a_command_on_two_workers_from_start_to_stop(pod):
    """Copied, installed, started, looked at, stopped with SIGTERM and started again."""
    pod.give_environment()
    code = (
        "import os, signal, sys, time, configs.base, rlver_jax; print('file', rlver_jax.__file__); print(sys.argv);"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(3)); print('ready', flush=True); time.sleep(100)"
    )
    assert "worker-1: nothing was started here" in pod.call("pod", "--status", status=1)
    printed = pod.call(
        "pod", "--setup=mkdir -p was_set_up", "--", "python", "-c", code, "two words", "--workdir=gs://bucket/run"
    )
    assert "worker-0: started python" in printed
    assert "worker-1: started python" in printed
    until = time.monotonic() + 30
    while "worker-1: ready" not in (logs := pod.call("pod", "--logs")) or "worker-0: ready" not in logs:
        assert time.monotonic() < until, logs
    for worker in (0, 1):
        assert f"worker-{worker}: file {pod.folder(worker)}/source/rlver_jax/__init__.py" in logs, "the copy is used"
        assert f"'two words', '--workdir={pod.folder(worker)}/buckets/bucket/run'" in logs
        assert (pod.root / f"worker-{worker}" / "was_set_up").is_dir()
        assert "-e .[tpu,remote]" in (pod.folder(worker) / "pip").read_text()
        assert (pod.folder(worker) / "buckets" / "bucket").samefile(pod.root / "buckets" / "bucket")
    assert pod.call("pod", "--status").count("running · ready") == 2
    assert "still runs python" in pod.call("pod", "--", "true", status=1)
    assert "a worker of pod failed" in pod.call("pod", "--resume", status=1)
    assert pod.call("pod", "--stop").count("ended with exit status 3") == 2
    assert pod.call("pod", "--resume").count("started python") == 2
    assert pod.call("pod", "--stop").count("ended with exit status") == 2


def test_a_key_reaches_the_command_and_nothing_else(pod):
    """In a file of its owner's; --resume has it again, the next command without --env has not."""
    pod.give_environment()
    key = "sk-$(no) 'quoted' \\zq7xw4"
    pod.environ["SOME_KEY"] = key
    code = "import os, hashlib; print('key', hashlib.sha256(os.environ.get('SOME_KEY', '').encode()).hexdigest())"
    wanted = [hashlib.sha256(text.encode()).hexdigest() for text in (key, "")]
    output = pod.call("pod", "--env=SOME_KEY", "--dry-run", "--", "python", "-c", code)
    assert "zq7xw4" not in output
    output = pod.call("pod", "--env=SOME_KEY", "--", "python", "-c", code)
    assert pod.wait() == ["0", "0"]
    assert pod.call("pod", "--logs").count(f"key {wanted[0]}") == 2
    (pod.folder(0) / "exit_status").unlink()
    output += pod.call("pod", "--resume")
    assert pod.wait() == ["0", "0"]
    assert pod.call("pod", "--logs").count(f"key {wanted[0]}") == 2
    for file in pod.root.rglob("*"):
        if file.is_file() and "zq7xw4" in file.read_text(errors="replace"):
            assert file.name == "environment", file
            assert file.stat().st_mode & 0o777 == 0o600
    pod.call("pod", "--", "python", "-c", code)
    assert pod.wait() == ["0", "0"]
    assert pod.call("pod", "--logs").count(f"key {wanted[1]}") == 2
    assert "zq7xw4" not in output + (pod.root / "calls").read_text()


def train_words(workdir, config: str, **fields) -> list[str]:
    fields = [f"--config.{name.replace('__', '.')}={value}" for name, value in fields.items()]
    return ["rlver_jax.train", f"--config={config}", f"--workdir={workdir}", "--config.log.tensorboard=False", *fields]


@pytest.mark.long
def test_two_workers_are_preempted_and_go_on_as_if_nothing_had_been(pod, tmp_path):
    """The debug world: SIGTERM to one worker's process, --resume, and the unbroken run of one process beside it."""
    pod.give_environment()
    fields = {"train__steps": 6, "checkpoint__every": 2, "eval__every": 3}
    words = train_words("gs://bucket/run", "configs/debug.py:direct", **fields)
    pod.call("pod", "--", "python", "-m", *words)
    run, until = pod.root / "buckets" / "bucket" / "run", time.monotonic() + 600
    while not (run / "metrics.jsonl").exists() or len(rows_of(run)) < 3:
        assert not any((pod.folder(i) / "exit_status").exists() for i in (0, 1)), pod.call("pod", "--logs=50")
        assert time.monotonic() < until, pod.call("pod", "--logs=50")
        time.sleep(0.05)
    os.kill(int((pod.folder(1) / "pid").read_text()), signal.SIGTERM)
    assert pod.wait() == ["0", "0"]
    assert "worker-0: ended with exit status 0" in pod.call("pod", "--status")
    assert "stopped by a signal" in pod.call("pod", "--logs")
    done = rows_of(run)[-1]["step"]
    assert 2 <= done < 6
    pod.call("pod", "--resume")
    assert pod.wait() == ["0", "0"], pod.call("pod", "--logs=50")
    assert f"resuming after step {done} of 6" in pod.call("pod", "--logs=50")
    unbroken = {2: tmp_path / "two", 1: tmp_path / "one"}
    for count, folder in unbroken.items():
        with processes(count, 8 // count, *train_words(folder, "configs/debug.py:direct", **fields)) as members:
            assert [member.ended(900) for member in members] == [0] * count, members[0].printed
    check_eventful(run, 1)
    assert rows_of(run) == rows_of(unbroken[2]), "to the bit"
    assert same(policy_of(run), policy_of(unbroken[2]))
    for mine, theirs in zip(rows_of(run), rows_of(unbroken[1]), strict=True):
        for name in ("policy/loss", "emotion/final_mean", "eval/score"):
            if name in theirs:
                assert mine[name] == pytest.approx(theirs[name], abs=1e-3), name


@pytest.mark.long
def test_two_workers_install_and_train_the_miniature(pod, tmp_path):
    """Nothing stands in for the installation here: a virtual environment and pip on each worker (needs a registry)."""
    fields = {"train__steps": 2, "rollout__batch": 8, "rollout__group": 4, "rollout__max_turns": 2}
    fields |= {"train__minibatches": 1, "train__microbatches": 1, "eval__every": 0}
    pod.environ |= {"STANDIN_DEVICES": "1"}
    pod.call("pod", "--", "python", "-m", *train_words("gs://bucket/run", "configs/miniature.py", **fields))
    assert pod.wait() == ["0", "0"], pod.call("pod", "--logs=50")
    assert (pod.folder(0) / "venv" / "bin" / "pip").exists()
    with processes(1, 2, *train_words(tmp_path / "one", "configs/miniature.py", **fields)) as members:
        assert members[0].ended(900) == 0, members[0].printed
    for mine, theirs in zip(rows_of(pod.root / "buckets/bucket/run"), rows_of(tmp_path / "one"), strict=True):
        for name in ("policy/loss", "emotion/final_mean"):
            assert mine[name] == pytest.approx(theirs[name], abs=1e-3), name
