"""One folder, one process group: a lock that holds across hosts, network folders and mounted buckets.

FOLDER/lock holds `owner.json`, made by whoever comes first, and `beat-TOKEN-N`, an empty file with which the owner
replaces the last one every few seconds. That the owner lives is told by its process id where it runs here, and
elsewhere by the beat's name, which changes: names are not cached where contents are. There is no flock, which buckets
and some network folders don't have. Every change of `owner.json` but its making needs the `claim-TOKEN` of the owner
that it holds: of two newcomers one takes a stale lock away, and none takes away a fresh one.
"""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from rlver_jax.config.paths import PathError, check_folder_to_write
from rlver_jax.parallel import distributed
from rlver_jax.text.console import plain_line

LOCK = "lock"  # folder in the locked one
BEAT = 10.0  # seconds between signs of life
WATCH = 30.0  # seconds without one after which an owner that cannot be asked counts as dead
_CLAIM = 5.0  # seconds after which a claim, which takes milliseconds, counts as left behind
_PAUSE = 0.5  # seconds between two looks
_TERMINATED = 128 + signal.SIGTERM  # exit status, as a shell gives it


class LockedError(ValueError):
    """Another process uses the folder; the message names it, and says what to do."""


class LostLockError(RuntimeError):
    """The folder was taken over by another process; what this one would write does not belong there any more."""


@dataclasses.dataclass(frozen=True)
class Owner:
    """A process that holds a lock, told apart from all others, also of earlier boots and with a number used again."""

    host: str
    pid: int
    folder: str  # that it holds, as it is called there; a copy of it may have been made with the lock
    boot: str  # identity of the host's boot; empty where the system has none
    space: str  # of process ids: those of another container mean nothing here
    started: str  # when the process did, by its host's clock
    since: str  # date and time at which it took the lock
    token: str

    @classmethod
    def here(cls, folder: Path) -> "Owner":
        """This process."""
        boot, space, pid = _text("/proc/sys/kernel/random/boot_id").strip(), "", os.getpid()
        with contextlib.suppress(OSError):
            space = os.readlink("/proc/self/ns/pid")
        now, token = time.strftime("%Y-%m-%d %H:%M:%S %z"), uuid.uuid4().hex[:12]
        return cls(socket.gethostname(), pid, os.path.realpath(folder), boot, space, _started(pid), now, token)

    def __str__(self) -> str:
        return plain_line(f"process {self.pid} on host {self.host}, since {self.since}")

    def lives(self, me: "Owner", last_beat: float) -> bool | None:
        """Whether it still runs, and holds the folder; None where that cannot be seen from here.

        Args:
            me: who asks.
            last_beat: when it last gave a sign of life, in seconds since 1970.
        """
        if self.host != me.host:
            return None
        if self.boot != me.boot:  # an earlier boot of this host, or another host of this name
            return False if last_beat < _booted() else None
        if self.space != me.space:
            return None
        runs = _started(self.pid) in (self.started, "?")
        return None if runs and self.folder != me.folder else runs


class Lock:
    """What the holder of a lock has: a way to see that it is still its own. Processes beside the first hold nothing."""

    def __init__(self, folder: Path, owner: Owner | None):
        self.folder, self.owner = folder, owner
        self._beats, self._lost = 0, False
        self._mutex, self._ended = threading.Lock(), threading.Event()
        if owner:
            self._beat(0)
            self._thread = threading.Thread(target=self._keep_beating, daemon=True, name="lock")
            self._thread.start()

    def check(self) -> None:
        """To be called before anything is written.

        Raises:
            LostLockError: the folder is another process's now.
        """
        if self.owner is None:
            return
        with self._mutex:
            self._lost = self._lost or not self._is_ours()
        if self._lost:
            other = _read_owner(self.folder)
            who = f"{other} has taken it over" if other else f"somebody removed {self.folder / LOCK}"
            raise LostLockError(
                f"{self.folder}: is no longer this process's: {who}, as happens to one that was suspended or cut "
                f"off for more than {WATCH:.0f} s. It ends here and writes nothing more"
            )

    def release(self) -> None:
        """Gives the lock back; nothing is left of it."""
        if self.owner is None:
            return
        self._ended.set()
        self._thread.join(_CLAIM)  # a network folder may keep it waiting
        with contextlib.suppress(OSError), self._mutex:
            _taken_away(self.folder, self.owner.token)
            _remove_beats(self.folder, self.owner.token)  # also where the lock is another's by now

    def _keep_beating(self) -> None:
        while not self._ended.wait(BEAT):
            with contextlib.suppress(OSError), self._mutex:  # a folder that is away for a while
                self._lost = self._lost or not self._is_ours()
                if self._lost:
                    return
                self._beat(self._beats + 1)

    def _beat(self, number: int) -> None:
        self._name(number).touch()
        if number:
            self._name(number - 1).unlink(missing_ok=True)
        self._beats = number

    def _name(self, number: int) -> Path:
        assert self.owner
        return self.folder / LOCK / f"beat-{self.owner.token}-{number}"

    def _is_ours(self) -> bool:
        assert self.owner
        owner = _read_owner(self.folder)
        return owner == self.owner and self._name(self._beats).name in _beats(self.folder, self.owner.token)


@contextlib.contextmanager
def hold(folder: str | os.PathLike[str], flag: str, report: Callable[[str], None]) -> Iterator[Lock]:
    """Holds the lock of a folder, which is made if it is missing. All processes of a group call it; the first holds it.

    Args:
        flag: that named the folder, for messages.
        report: is told when a stale lock is taken over.

    Raises:
        LockedError: another process group uses the folder.
        OSError, ValueError: the folder cannot be written to.
    """
    newcomer = _Newcomer(Path(folder), flag, report)
    if jax.distributed.is_initialized():
        while not distributed.from_main(newcomer.look):  # rounds, since collectives don't wait for long
            pass
        lock = Lock(newcomer.folder, newcomer.owner if distributed.is_main() else None)
    else:  # alone; a judge that needs no device asks for none
        while not newcomer.look():
            pass
        lock = Lock(newcomer.folder, newcomer.owner)
    try:
        with _let_go_at_sigterm(lock):
            yield lock
    finally:
        lock.release()


class _Newcomer:
    """Who wants a lock: looks, watches an owner that it cannot ask, takes over from a dead one."""

    def __init__(self, folder: Path, flag: str, report: Callable[[str], None]):
        self.folder, self.flag, self.report = folder, flag, report
        self.owner = Owner.here(folder)
        self._seen: dict[str, tuple[list[str], float]] = {}  # an owner's first beat here, and when that was
        self._claims: dict[str, float] = {}  # when another's claim on an owner's lock was first seen
        self._before = ""  # whom the lock was taken from

    def look(self) -> bool:
        """Whether the lock is held now; waits a moment where that is still open."""
        if _make(self.folder, self.owner):
            if self._before:
                self.report(f"{self.folder}: taken over from {self._before}")
            return True
        holder = _read_owner(self.folder)
        if holder is None and not _owner_file(self.folder).exists():
            return False  # given back a moment ago
        token = holder.token if holder else ""
        beats = _beats(self.folder, token)
        lives = holder.lives(self.owner, _last_beat(self.folder, beats)) if holder else None
        if lives is None:
            lives = self._watched(holder, token, beats)
        if lives:
            raise LockedError(
                f"{self.folder}: is in use by {holder}; wait until that has ended, end it, or name another {self.flag}"
            )
        if lives is None:
            time.sleep(_PAUSE)
        elif _taken_away(self.folder, token):
            end = f"gave no sign of life for {WATCH:.0f} s" if token in self._seen else "has ended"
            self._before = f"{holder}, which {end}" if holder else "a process that ended before it had written its name"
        else:
            self._pass_claim(token)
        return False

    def _watched(self, holder: Owner | None, token: str, beats: list[str]) -> bool | None:
        """Whether an owner that cannot be asked from here lives; None as long as that is open."""
        if holder and token not in self._seen:
            self.report(f"{self.folder}: locked by {holder}; watching for {WATCH:.0f} s whether it still runs")
        before, since = self._seen.setdefault(token, (beats, time.monotonic()))
        if holder and before != beats:
            return True
        return False if time.monotonic() - since > (WATCH if holder else _CLAIM) else None

    def _pass_claim(self, token: str) -> None:
        """Waits for another newcomer that is about to take the lock away; removes what one that was killed left."""
        if time.monotonic() - self._claims.setdefault(token, time.monotonic()) > _CLAIM:
            _claim(self.folder, token).unlink(missing_ok=True)
            del self._claims[token]
        time.sleep(_PAUSE / 10)


def _make(folder: Path, owner: Owner) -> bool:
    """Makes the lock; False where there is one. Raises PathError where something else is in its place."""
    check_folder_to_write(folder)
    for path, wanted, is_wanted in (
        (folder / LOCK, "folder", Path.is_dir),
        (_owner_file(folder), "file", Path.is_file),
    ):
        if os.path.lexists(path) and not is_wanted(path) and os.path.lexists(path):  # it may go between two looks
            raise PathError(f"{path}: is no {wanted}, as the lock of {folder} has there; remove it")
    (folder / LOCK).mkdir(parents=True, exist_ok=True)
    try:
        with _owner_file(folder).open("x", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(owner), indent=1) + "\n")
    except (FileExistsError, FileNotFoundError):  # whoever held it may have just removed the folder of the lock
        return False
    return True


def _taken_away(folder: Path, token: str) -> bool:
    """Removes the lock of the owner with this token, and nobody else's; False where another process is about to."""
    claim = _claim(folder, token)
    try:
        claim.open("x").close()
    except FileExistsError:
        return False
    except FileNotFoundError:  # gone already
        return True
    try:
        holder = _read_owner(folder)  # again: another may have been here
        if (holder.token if holder else "") == token:
            _remove_beats(folder, token)
            _owner_file(folder).unlink(missing_ok=True)
    finally:
        claim.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # others are there already
        (folder / LOCK).rmdir()
    return True


def _owner_file(folder: Path) -> Path:
    return folder / LOCK / "owner.json"


def _claim(folder: Path, token: str) -> Path:
    return folder / LOCK / f"claim-{token}"


def _read_owner(folder: Path) -> Owner | None:
    """Who holds the lock; None where there is none, or one that is being written."""
    try:
        return Owner(**json.loads(_owner_file(folder).read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
        return None


def _beats(folder: Path, token: str) -> list[str]:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return sorted(name for name in os.listdir(folder / LOCK) if name.startswith(f"beat-{token}-"))
    return []


def _remove_beats(folder: Path, token: str) -> None:
    for name in _beats(folder, token):
        (folder / LOCK / name).unlink(missing_ok=True)


def _last_beat(folder: Path, beats: list[str]) -> float:
    """When an owner last gave a sign of life; infinity where that isn't known."""
    with contextlib.suppress(OSError):
        return max((folder / LOCK / name).stat().st_mtime for name in (*beats, "owner.json"))
    return float("inf")


def _started(pid: int) -> str:
    """When a process started, in ticks after the boot; "" where there is none any more, "?" where that isn't known."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return ""
    except OSError:  # another user's
        pass
    fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()  # a name may hold anything
    if len(fields) < 20:
        return "?"
    return "" if fields[0] in "ZX" else fields[19]  # killed, but its parent has not asked yet


def _booted() -> float:
    """When this host did, in seconds since 1970; minus infinity where that isn't known."""
    lines = dict(line.split(maxsplit=1) for line in _text("/proc/stat").splitlines() if line.startswith("btime "))
    return float(lines.get("btime", "-inf"))


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


@contextlib.contextmanager
def _let_go_at_sigterm(lock: Lock) -> Iterator[None]:
    """Where SIGTERM would end the process at once it still does, but without leaving the lock.

    Python's own handlers wait until the main thread comes back from a compilation, which takes minutes; so a thread
    waits for what the signal writes into a pipe. Handlers that others set, such as `distributed.stop_signal`, go first.
    """
    main = threading.current_thread() is threading.main_thread()
    asked = jax.distributed.is_initialized() and getattr(jax.config, "jax_enable_preemption_service", False)
    if lock.owner is None or not main or asked or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    ours = lambda number, frame: None  # noqa: E731
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def wait() -> None:
        while received := os.read(reading, 1):
            if received[0] == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is ours:
                lock.release()
                os._exit(_TERMINATED)

    thread = threading.Thread(target=wait, daemon=True, name="lock-sigterm")
    thread.start()
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, ours)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.set_wakeup_fd(before)
        os.close(writing)
        thread.join(_PAUSE)
        os.close(reading)
