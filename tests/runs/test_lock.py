"""A folder's lock, held by real processes: two at once, killed, suspended, of other hosts, many for one stale lock."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlver_jax.config.paths import PathError
from rlver_jax.runs import lock

ROOT = Path(__file__).resolve().parents[2]
# Holds the lock of argv[1] as host argv[2] until a line comes; says what happens.
HOLDER = """
import sys, time, socket
from rlver_jax.runs import lock
folder, host, watch = sys.argv[1:4]
if host: socket.gethostname = lambda: host
lock.BEAT, lock.WATCH = float(watch) / 6, float(watch)
say = lambda *words: print(*words, flush=True)
say("begun")
try:
    with lock.hold(folder, "--workdir", lambda text: say("report", text)) as held:
        say("held")
        for line in sys.stdin:
            if line.strip() == "end": break
            if line.strip() == "fail": raise KeyboardInterrupt
            held.check()
            say("still")
except (lock.LockedError, lock.LostLockError) as error:
    say(type(error).__name__, error)
except KeyboardInterrupt:
    say("interrupted")
"""


class Holder:
    """A process that wants a lock."""

    def __init__(self, folder, host="", watch=1.5):
        command = [sys.executable, "-c", HOLDER, str(folder), host, str(watch)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, cwd=ROOT, **pipes)
        assert self.line() == "begun"

    def line(self) -> str:
        return self.process.stdout.readline().strip()

    def tell(self, word: str) -> None:
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def end(self, word="end") -> str:
        rest = self.process.communicate(word + "\n", timeout=30)[0]
        return rest.strip()

    def kill(self, number=signal.SIGKILL) -> None:
        self.process.send_signal(number)
        self.process.wait(timeout=30)


@contextlib.contextmanager
def holder(*args, **kwargs):
    one = Holder(*args, **kwargs)
    try:
        yield one
    finally:
        if one.process.poll() is None:
            one.process.send_signal(signal.SIGCONT)
            one.kill()
        one.process.stdout.close()
        with contextlib.suppress(OSError):
            one.process.stdin.close()


def left(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def write_owner(folder, **fields) -> None:
    """A lock as another process may have left it."""
    owner = vars(lock.Owner.here(folder)) | {"token": "f00d"} | fields
    (folder / "lock").mkdir()
    (folder / "lock" / "owner.json").write_text(json.dumps(owner))


def refusal(folder) -> str:
    with pytest.raises(lock.LockedError) as error, lock.hold(folder, "--out", print):
        pass
    return str(error.value)


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(lock, "WATCH", 1.0)
    monkeypatch.setattr(lock, "_CLAIM", 0.5)


def test_a_second_process_is_refused_with_host_and_pid(tmp_path):
    with holder(tmp_path / "run") as one:
        assert one.line() == "held"
        message = refusal(tmp_path / "run")
        assert f"is in use by process {one.process.pid} on host {socket.gethostname()}, since 20" in message
        assert "end it, or name another --out" in message
        assert one.end() == ""
    assert left(tmp_path / "run") == []
    with lock.hold(tmp_path / "run", "--out", print) as held:
        held.check()


@pytest.mark.parametrize("signal_name", ["end", "fail"])
def test_nothing_is_left_after_a_normal_end_or_ctrl_c(tmp_path, signal_name):
    (tmp_path / "config.json").write_text("{}")
    with holder(tmp_path) as one:
        assert one.line() == "held"
        assert "lock" in left(tmp_path)
        one.end(signal_name)
    assert left(tmp_path) == ["config.json"]


def test_nothing_is_left_after_an_error(tmp_path):
    with pytest.raises(RuntimeError), lock.hold(tmp_path, "--out", print):
        raise RuntimeError
    assert left(tmp_path) == []


def test_sigterm_ends_the_process_and_leaves_nothing(tmp_path):
    with holder(tmp_path) as one:
        assert one.line() == "held"
        one.kill(signal.SIGTERM)
        assert one.process.returncode == 143
    assert left(tmp_path) == []
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_sigterm_is_left_to_a_handler_that_is_set_meanwhile(tmp_path):
    """As the training loop does, which finishes its step."""
    came = []
    with lock.hold(tmp_path, "--workdir", print) as held:
        before = signal.signal(signal.SIGTERM, lambda *_: came.append(1))
        os.kill(os.getpid(), signal.SIGTERM)
        until = time.monotonic() + 5
        while not came and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.2)
        held.check()
        signal.signal(signal.SIGTERM, before)
    assert came == [1]


def test_after_a_kill_the_next_one_takes_over_at_once(tmp_path):
    with holder(tmp_path) as one:
        assert one.line() == "held"
        one.process.send_signal(signal.SIGKILL)  # nobody has asked how it ended: a zombie still has its number
        while "Z" not in Path(f"/proc/{one.process.pid}/stat").read_text():
            time.sleep(0.01)
        reports, began = [], time.monotonic()
        with lock.hold(tmp_path, "--workdir", reports.append) as held:
            assert time.monotonic() - began < 0.5
            held.check()
        (line,) = reports
        assert f"taken over from process {one.process.pid} on host {socket.gethostname()}" in line
        assert "which has ended" in line
    assert left(tmp_path) == []


def test_a_suspended_process_of_this_host_still_holds_it(tmp_path):
    with holder(tmp_path) as one:
        assert one.line() == "held"
        one.process.send_signal(signal.SIGSTOP)
        assert f"process {one.process.pid}" in refusal(tmp_path)


def test_a_number_used_again_is_another_process(tmp_path):
    """Process 1 runs on every system, but it did not start when the owner did."""
    write_owner(tmp_path, pid=1, started="123456789")
    with lock.hold(tmp_path, "--workdir", print) as held:
        held.check()


def test_the_same_process_holds_it_once(tmp_path):
    with lock.hold(tmp_path, "--workdir", print):
        assert f"process {os.getpid()} " in refusal(tmp_path)


def test_an_earlier_boot_of_this_host_is_over(tmp_path, monkeypatch):
    """Its last sign of life lies before this boot; then its number means nothing, though a process has it."""
    write_owner(tmp_path, pid=os.getpid(), boot="another")
    os.utime(tmp_path / "lock" / "owner.json", (1e9, 1e9))
    began = time.monotonic()
    with lock.hold(tmp_path, "--workdir", print):
        assert time.monotonic() - began < 0.5


@pytest.mark.parametrize("fields", [{"boot": "another"}, {"space": "pid:[1]"}, {"host": "elsewhere"}])
def test_who_cannot_be_asked_is_watched(tmp_path, fast, fields):
    """Another machine of the same name, another container of this one, another host: all silent."""
    write_owner(tmp_path, pid=2**22 + 1, **fields)  # a number that no process of Linux has
    reports, began = [], time.monotonic()
    with lock.hold(tmp_path, "--workdir", reports.append):
        assert 1.0 < time.monotonic() - began < 3
    assert "watching for 1 s whether it still runs" in reports[0]
    assert "which gave no sign of life for 1 s" in reports[1]


def test_a_living_owner_on_another_host_is_seen_by_its_beats(tmp_path):
    with holder(tmp_path, host="elsewhere") as one, holder(tmp_path, host="here") as two:
        assert one.line() == "held"
        assert "report" in two.line()
        assert f"LockedError {tmp_path}: is in use by process {one.process.pid} on host elsewhere" in two.line()
        one.tell("?")
        assert one.line() == "still"


@pytest.mark.slow
def test_an_owner_that_was_suspended_notices_that_it_lost_the_lock(tmp_path):
    with holder(tmp_path, host="elsewhere") as one, holder(tmp_path, host="here") as two:
        assert one.line() == "held"
        one.process.send_signal(signal.SIGSTOP)
        assert "report" in two.line()
        assert "taken over from" in two.line()
        assert two.line() == "held"
        one.process.send_signal(signal.SIGCONT)
        time.sleep(0.6)  # its heart beats meanwhile, but not in the other's place
        one.tell("?")
        line = one.line()
        assert line.startswith(f"LostLockError {tmp_path}: is no longer this process's: process {two.process.pid} on")
        two.tell("?")
        assert two.line() == "still"
        one.process.wait(timeout=10)
        two.tell("?")
        assert two.line() == "still", "the loser leaves the winner's lock alone"
        two.end()
    assert left(tmp_path) == []


def test_a_copy_of_a_folder_is_not_held(tmp_path, fast):
    """Made while a process trains, with its lock in it."""
    with lock.hold(tmp_path / "run", "--workdir", print) as held:
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        with lock.hold(tmp_path / "copy", "--workdir", print) as other:
            held.check()
            other.check()
        (tmp_path / "link").symlink_to(tmp_path / "run")
        assert "is in use by" in refusal(tmp_path / "link")


def test_no_device_is_asked_for(tmp_path):
    """Scores of finished dialogues need none, and another process may hold it."""
    code = """if True:
        import sys
        from jax._src import xla_bridge
        from rlver_jax.runs import lock
        with lock.hold(sys.argv[1], "--out", print) as held:
            held.check()
        assert not xla_bridge.backends_are_initialized()
    """
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True)


def test_a_lock_that_somebody_removed_is_lost(tmp_path):
    with lock.hold(tmp_path, "-", print) as held:
        for path in (tmp_path / "lock").iterdir():
            path.unlink()
        with pytest.raises(lock.LostLockError, match="somebody removed .*lock"):
            held.check()


@pytest.mark.slow
def test_of_many_newcomers_one_takes_a_stale_lock(tmp_path):
    """Five processes, each of which would hold it until all have tried."""
    write_owner(tmp_path, pid=2**22 + 1)
    (tmp_path / "lock" / "beat-f00d-17").touch()
    with contextlib.ExitStack() as stack:
        all_ = [stack.enter_context(holder(tmp_path)) for _ in range(5)]
        lines = []
        for one in all_:
            line = one.line()
            lines.append(one.line() if line.startswith("report") else line)
        assert sum(line == "held" for line in lines) == 1, lines
        assert sum("is in use by" in line for line in lines) == 4
        (winner,) = (one for one, line in zip(all_, lines, strict=True) if line == "held")
        winner.tell("?")
        assert winner.line() == "still"
        winner.end()
    assert left(tmp_path) == []


@pytest.mark.parametrize("text", ["", '{"host": "a"'])
def test_half_a_lock_is_taken_over(tmp_path, fast, text):
    """A process that was killed while it wrote its name."""
    (tmp_path / "lock").mkdir()
    (tmp_path / "lock" / "owner.json").write_text(text)
    with lock.hold(tmp_path, "--workdir", print) as held:
        held.check()
    assert left(tmp_path) == []


def test_a_claim_that_was_left_behind_does_not_block(tmp_path, fast):
    """A newcomer that was killed amid its takeover."""
    write_owner(tmp_path, pid=2**22 + 1)
    (tmp_path / "lock" / "claim-f00d").touch()
    with lock.hold(tmp_path, "--workdir", print) as held:
        held.check()
    assert left(tmp_path) == []


def test_folders_that_cannot_be_written_are_refused_as_before(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(PathError, match="file: is no folder; name another one"),
        lock.hold(tmp_path / "file", "", print),
    ):
        pass
    assert left(tmp_path) == ["file"]


def test_what_is_no_lock_is_named(tmp_path):
    (tmp_path / "lock").write_text("")
    with (
        pytest.raises(PathError, match="lock: is no folder, as the lock of .* has there; remove it"),
        lock.hold(tmp_path, "--workdir", print),
    ):
        pass
    (tmp_path / "lock").unlink()
    (tmp_path / "lock" / "owner.json").mkdir(parents=True)
    with pytest.raises(PathError, match="owner.json: is no file, as the lock of"), lock.hold(tmp_path, "", print):
        pass


def test_the_killed_owner_of_a_folder_that_was_moved_is_not_waited_for(tmp_path):
    """No such process runs, wherever the folder lies now."""
    write_owner(tmp_path, pid=2**22 + 1)
    (tmp_path / "moved").mkdir()
    (tmp_path / "lock").rename(tmp_path / "moved" / "lock")
    began, reports = time.monotonic(), []
    with lock.hold(tmp_path / "moved", "--workdir", reports.append):
        assert time.monotonic() - began < lock.WATCH / 3
    assert "which has ended" in reports[-1]


def test_the_name_of_a_host_cannot_forge_a_line(tmp_path):
    owner = vars(lock.Owner.here(tmp_path)) | {"host": "a\x1b[2J\ntrain: done \u202e"}
    assert str(lock.Owner(**owner)).startswith(f"process {owner['pid']} on host a[2J train: done , since ")
