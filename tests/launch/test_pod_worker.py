"""What launch/pod_worker.sh takes for its own process: real processes, and files as crashes and reboots leave them."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
OTHER_BOOT = "00000000-0000-4000-8000-000000000000"
LAST_PID = Path("/proc/sys/kernel/ns_last_pid")

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc: pod_worker.sh is for Linux")


class Worker:
    """A worker's home with the scripts."""

    def __init__(self, home: Path):
        self.folder = home / "rlver_jax_pod"
        shutil.copytree(LAUNCH, self.folder / "source" / "launch")
        self.words = ["bash", str(self.folder / "source" / "launch" / "pod_worker.sh")]
        self.environ = os.environ | {"HOME": str(home)}
        self.started: set[int] = set()

    def call(self, *words: str, status: int = 0) -> str:
        done = subprocess.run([*self.words, *words], env=self.environ, capture_output=True, text=True, timeout=60)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def start(self, *command: str) -> int:
        """Starts a command; returns its process id."""
        self.call("start", *command)
        self.started.add(self.pid)
        return self.pid

    @property
    def pid(self) -> int:
        return int((self.folder / "pid").read_text())

    @property
    def identity(self) -> Path:
        return self.folder / "process"

    def lose_power(self) -> None:
        """Ends the command and what waits for it at once: nothing can write an exit status any more."""
        pid = self.pid
        waiting = int(stat(pid)[1])
        for process in (waiting, pid):
            os.kill(process, signal.SIGKILL)
        until = time.monotonic() + 60
        while Path(f"/proc/{pid}").exists():  # init may take its time
            assert time.monotonic() < until
            time.sleep(0.01)

    def close(self) -> None:
        for pid in self.started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third on (proc(5))."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()


def is_running(pid: int) -> bool:
    try:
        return stat(pid)[0] not in "ZX"
    except FileNotFoundError:
        return False


def boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@pytest.fixture
def worker(tmp_path):
    with contextlib.closing(Worker(tmp_path)) as started:
        yield started


@pytest.fixture
def stranger():
    """A process that has nothing to do with the worker."""
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        assert process.poll() is None, "nobody has ended it"
        process.kill()


def check_not_ours(worker: Worker, stranger: int) -> None:
    """The stranger is neither shown nor stopped, and keeps nothing from being started."""
    assert "ended without an exit status" in worker.call("status")
    assert "ended without an exit status" in worker.call("stop")
    worker.call("free")
    assert is_running(stranger)
    assert worker.start("sleep", "600") != stranger
    assert "running" in worker.call("status")
    assert "ended with exit status 143" in worker.call("stop")
    assert is_running(stranger)


def test_its_own_process_is_ours(worker):
    pid = worker.start("sleep", "600")
    assert worker.identity.read_text() == f"{pid} {stat(pid)[19]} {boot()}\n"
    assert "running" in worker.call("status")
    assert "still runs sleep 600" in worker.call("free", status=1)
    assert "still runs sleep 600" in worker.call("start", "true", status=1)
    assert "ended with exit status 143" in worker.call("stop")
    assert not is_running(pid)
    assert "started sleep 600" in worker.call("resume")
    worker.started.add(worker.pid)
    assert "running" in worker.call("status")


def test_a_command_that_ends_at_once_has_its_exit_status(worker):
    for status in range(5):
        worker.call("start", "bash", "-c", f"exit {status}")
        until = time.monotonic() + 20
        while f"ended with exit status {status}" not in (output := worker.call("status")):
            assert time.monotonic() < until, output


def test_a_process_of_another_boot_is_not_ours(worker, stranger):
    """Its start time may even be the same: machines boot alike."""
    worker.start("sleep", "600")
    worker.lose_power()
    worker.identity.write_text(f"{stranger.pid} {stat(stranger.pid)[19]} {OTHER_BOOT}\n")
    (worker.folder / "pid").write_text(f"{stranger.pid}\n")
    check_not_ours(worker, stranger.pid)


def test_a_process_id_that_another_process_has_now_is_not_ours(worker):
    """The kernel is told which id to give next, so it really is used again."""
    worker.start("sleep", "600")
    worker.lose_power()
    for _ in range(100):
        try:
            LAST_PID.write_text(f"{worker.pid - 1}")
        except OSError as error:
            pytest.skip(f"may not set the next process id: {error}")
        with subprocess.Popen(["sleep", "600"]) as process:
            try:
                if process.pid == worker.pid:
                    return check_not_ours(worker, process.pid)
            finally:
                process.kill()
    pytest.fail("another process always came first")


def test_another_start_time_is_another_process(worker, stranger):
    """As above, where the next process id may not be set."""
    worker.start("sleep", "600")
    worker.lose_power()
    worker.identity.write_text(f"{stranger.pid} {int(stat(stranger.pid)[19]) - 1} {boot()}\n")
    check_not_ours(worker, stranger.pid)


def test_a_process_that_has_ended_but_was_not_waited_for_does_not_run(worker):
    pid = worker.start("sleep", "600")
    waiting = int(stat(pid)[1])
    os.kill(waiting, signal.SIGSTOP)
    while stat(waiting)[0] != "T":
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    while stat(pid)[0] != "Z":
        time.sleep(0.01)
    assert "ended without an exit status" in worker.call("status")
    worker.call("free")
    os.kill(waiting, signal.SIGKILL)


@pytest.mark.parametrize("name", ["a) S 1 (b", "two\nlines", ") Z 1 1"])
def test_a_processs_name_may_be_anything(worker, name):
    """The second field of /proc/PID/stat is in parentheses, but nothing in it is escaped."""
    worker.start("python3", "-c", f"open('/proc/self/comm', 'w').write({name!r}); import time; time.sleep(600)")
    until = time.monotonic() + 20
    while Path(f"/proc/{worker.pid}/comm").read_text() != f"{name}\n":
        assert time.monotonic() < until
    assert "running" in worker.call("status")
    assert "ended with exit status 143" in worker.call("stop")


def lengths(pid: int, whole: str) -> list[int]:
    return [0, 1, len(str(pid)), len(str(pid)) + 1, len(whole) - 40, len(whole) - 2, len(whole) - 1]


def test_a_half_written_file_hides_no_running_command(worker):
    """The process id beside it is enough to find the command."""
    pid = worker.start("sleep", "600")
    whole = worker.identity.read_text()
    for length in lengths(pid, whole):
        worker.identity.write_text(whole[:length])
        assert "running" in worker.call("status"), length
        assert "still runs" in worker.call("start", "true", status=1)
    assert "ended with exit status 143" in worker.call("stop")
    assert not is_running(pid)


def test_where_all_files_are_half_written_nothing_is_started_or_ended(worker):
    pid = worker.start("sleep", "600")
    whole = worker.identity.read_text()
    (worker.folder / "pid").write_text(str(pid)[:-1])
    for length in lengths(pid, whole):
        worker.identity.write_text(whole[:length])
        for words in (["status"], ["free"], ["start", "true"], ["resume"], ["stop"]):
            output = worker.call(*words, status=1)
            assert f"{worker.identity} is damaged" in output, (length, words)
            assert "remove the file" in output
    assert is_running(pid)
    worker.identity.write_text(whole)
    assert "running" in worker.call("status")


@pytest.mark.parametrize("name", ["process", "pid"])
def test_a_file_with_anything_else_in_it_ends_nothing(worker, name):
    """Not even where a shell would take it for all processes."""
    (worker.folder / "command").write_text("sleep 600")
    file = worker.folder / name
    for text in ("", "1", "-1\n", "0\n", "1 2 3\n", "x\n", "$(kill 0)\n", "12345678901234567890 1 b\n", "\0" * 50):
        file.write_text(text)
        for action in ("status", "stop"):
            assert f"{file} is damaged" in worker.call(action, status=1)


@pytest.mark.parametrize("name", ["process", "pid"])
def test_a_half_written_file_from_before_this_boot_stops_nobody(worker, name):
    """As after a power failure: whatever it said, that process is gone."""
    worker.start("sleep", "600")
    worker.lose_power()
    for file in (worker.identity, worker.folder / "pid"):
        file.unlink()
    path = worker.folder / name
    path.write_text("12")
    os.utime(path, (1.7e9, 1.7e9))
    assert "ended without an exit status" in worker.call("status")
    worker.call("free")
    worker.start("sleep", "600")
    assert "running" in worker.call("status")


def test_a_file_of_an_earlier_version_with_our_live_process(worker):
    """Earlier versions wrote the process id alone."""
    pid = worker.start("sleep", "600")
    worker.identity.unlink()
    assert "running" in worker.call("status")
    assert "still runs" in worker.call("start", "true", status=1)
    assert is_running(pid)
    assert "ended with exit status 143" in worker.call("stop")
    assert not is_running(pid)


def test_a_file_of_an_earlier_version_with_another_process(worker, stranger):
    worker.start("sleep", "600")
    worker.lose_power()
    worker.identity.unlink()
    (worker.folder / "pid").write_text(f"{stranger.pid}\n")
    check_not_ours(worker, stranger.pid)


def test_a_file_of_an_earlier_version_with_no_process(worker):
    worker.start("sleep", "600")
    worker.lose_power()
    worker.identity.unlink()
    assert "ended without an exit status" in worker.call("status")
    worker.call("free")


def test_without_proc_it_says_what_it_needs(worker):
    """In a mount namespace of its own with nothing on /proc."""
    worker.start("sleep", "600")
    space = ["unshare", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*space, "true"], capture_output=True).returncode:
        pytest.skip("may make no mount namespace")
    worker.words = [*space, "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh", *worker.words]
    for words in (["status"], ["free"], ["start", "true"], ["stop"], ["resume"]):
        assert "/proc" in worker.call(*words, status=1)
    assert is_running(worker.pid)


def test_a_command_that_cannot_be_started_says_so(worker):
    """No pid file can be written: its name is taken by a folder."""
    (worker.folder / "pid.tmp").mkdir()
    noted = worker.folder / "noted"
    output = worker.call("start", "bash", "-c", f"echo $$ > {noted}; exec sleep 600", status=1)
    assert "did not start" in output
    assert "cannot be written" in output
    assert not noted.exists() or not is_running(int(noted.read_text())), "nor does it run where nobody can stop it"
