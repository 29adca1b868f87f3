"""Real processes for tests: started, listened to, and always ended."""

import contextlib
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tests.quick import QUICK

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


class Member:
    """A process; what it prints can be waited for."""

    def __init__(self, words: list[str], environ: dict[str, str]):
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        environ = os.environ | {"PYTHONUNBUFFERED": "1", "XLA_FLAGS": ""} | environ
        self.process = subprocess.Popen([sys.executable, "-m", *words], cwd=ROOT, env=environ, **pipe)
        self.lines: list[str] = []
        self._new: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self._new.put(line.rstrip("\n"))
        self._new.put(None)

    def told(self, begin: str, seconds: float = 120) -> str:
        """What follows on the last line that begins with `begin`, now or later."""
        until = time.monotonic() + seconds
        while not (matching := [line for line in self.lines if line.startswith(begin)]):
            try:
                line = self._new.get(timeout=max(until - time.monotonic(), 0.01))
            except queue.Empty:
                raise AssertionError(f"no {begin!r} within {seconds} s:\n{self.printed}") from None
            assert line is not None, f"ended without {begin!r}:\n{self.printed}"
            self.lines.append(line)
        return matching[-1].removeprefix(begin)

    def ended(self, seconds: float) -> int:
        """Its exit status; by then all that it said is in `printed`."""
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"goes on after {seconds} s:\n{self.printed}") from None
        while (line := self._new.get(timeout=10)) is not None:
            self.lines.append(line)
        return status

    @property
    def printed(self) -> str:
        """What has been read so far."""
        return "\n".join(self.lines)


@contextlib.contextmanager
def processes(count: int, devices: int, *words: str, **environ: str) -> Iterator[list[Member]]:
    """`python -m WORDS…` in `count` processes with so many fake devices each, that know how to find each other."""
    environ |= {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICK}"}
    port, members = free_port(), []
    try:
        for index in range(count):
            where = [f"--coordinator=localhost:{port}", f"--processes={count}", f"--process={index}"] * (count > 1)
            members.append(Member([*words, *where], environ))
        yield members
    finally:
        for member in members:
            member.process.kill()
            member.process.wait()
