"""launch/tpu_pod.sh with a stand-in `gcloud` whose workers are processes of this machine; the rest is real."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import orbax.checkpoint
import pytest

from ..parallel.processes import free_port

ROOT = Path(__file__).resolve().parents[2]
SCRIPT, STANDIN = ROOT / "launch" / "tpu_pod.sh", Path(__file__).parent / "standin"


class Pod:
    """A TPU of two workers."""

    def __init__(self, root: Path, devices: int):
        self.root = root
        self.environ = os.environ | {
            "PATH": f"{STANDIN}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "STANDIN_ROOT": str(root),
            "STANDIN_WORKERS": "2",
            "STANDIN_DEVICES": str(devices),
            "STANDIN_PORT": str(free_port()),
            "STANDIN_SITE": str(Path(orbax.checkpoint.__file__).parents[2]),
        }

    def call(self, *words: str, status: int = 0) -> str:
        done = subprocess.run([SCRIPT, *words], env=self.environ, capture_output=True, text=True, timeout=300)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def folder(self, worker: int) -> Path:
        return self.root / f"worker-{worker}" / "rlver_jax_pod"

    def wait(self, seconds: float = 300) -> None:
        """Until the command has ended on both workers."""
        until = time.monotonic() + seconds
        while not all((self.folder(i) / "exit_status").exists() for i in (0, 1)):
            assert time.monotonic() < until, self.call("pod", "--logs=50")
            time.sleep(0.2)


@pytest.fixture
def pod(tmp_path):
    found = Pod(tmp_path / "pod", 1)
    found.root.mkdir()
    yield found
    for worker in (0, 1):  # what a failed test left running
        pid, ended = found.folder(worker) / "pid", found.folder(worker) / "exit_status"
        if pid.exists() and not ended.exists():
            os.kill(int(pid.read_text()), signal.SIGKILL)


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
    ]:
        assert why in pod.call(*words, status=2)


def test_a_command_on_two_workers_from_start_to_stop(pod):
    """Copied, really installed, started, looked at, stopped with SIGTERM and started again."""
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
        assert (pod.folder(worker) / "buckets" / "bucket").samefile(pod.root / "buckets" / "bucket")
    assert pod.call("pod", "--status").count("running · ready") == 2
    assert "still runs python" in pod.call("pod", "--", "true", status=1)
    assert "a worker of pod failed" in pod.call("pod", "--resume", status=1)
    assert pod.call("pod", "--stop").count("ended with exit status 3") == 2
    assert pod.call("pod", "--resume").count("started python") == 2
    assert pod.call("pod", "--stop").count("ended with exit status") == 2
