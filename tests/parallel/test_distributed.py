"""Several processes that run one program: real processes, which meet, agree, and end together."""

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlver_jax.parallel.distributed import SILENCE, join

ROOT = Path(__file__).resolve().parents[2]


class Member:
    """A process; what it tells can be waited for."""

    def __init__(self, words: list[str], environ: dict[str, str]):
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.process = subprocess.Popen([sys.executable, "-m", *words], cwd=ROOT, env=os.environ | environ, **pipe)
        self.lines, self._new = [], queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self._new.put(line.rstrip("\n"))
        self._new.put(None)

    def told(self, name: str, seconds: float = 120) -> str:
        """What it says after NAME=, now or later."""
        until = time.monotonic() + seconds
        while not (found := [line for line in self.lines if line.startswith(f"{name}=")]):
            try:
                line = self._new.get(timeout=max(until - time.monotonic(), 0.01))
            except queue.Empty:
                raise AssertionError(f"no {name}= within {seconds} s:\n" + "\n".join(self.lines)) from None
            assert line is not None, f"ended without {name}=:\n" + "\n".join(self.lines)
            self.lines.append(line)
        return found[-1].removeprefix(f"{name}=")

    def ended(self, seconds: float) -> tuple[int, str]:
        """(exit status, all that was printed)."""
        status = self.process.wait(seconds)
        while (line := self._new.get(timeout=10)) is not None:
            self.lines.append(line)
        return status, "\n".join(self.lines)


@pytest.fixture
def two():
    """Starts two processes with four devices each; `two(words, environ)`."""
    started: list[Member] = []

    def start(*words: str, **environ: str) -> list[Member]:
        with socket.socket() as one:
            one.bind(("localhost", 0))
            port = one.getsockname()[1]
        environ |= {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "PYTHONUNBUFFERED": "1"}
        where = [f"--coordinator=localhost:{port}", "--processes=2"]
        started.extend(Member([*words, *where, f"--process={i}"], environ) for i in (0, 1))
        return started

    yield start
    for member in started:
        member.process.kill()
        member.process.wait()


def test_two_processes_from_meeting_to_end(two):
    """One pair for all of it, since starting a process takes seconds."""
    members = two("tests.parallel.member")
    for me, member in enumerate(members):
        assert member.told("devices") == "4 of 8"
        assert member.told("from_main") == "{'process': 0, 'text': '知道'}"
        assert member.told("same") == "nothing"
        assert "the config (b.c): 3 here, 2 on process 0" in members[1].told("other")
        assert member.told("other") != "nothing", "the one that is right is refused as well"
        assert member.told("together") == ("process 1 failed; its own log says why", "disk full on 1")[me]
        assert member.told("main_fails") == ("disk full on 0", "process 0 failed; its own log says why")[me]
        assert member.told("asked") == str([[0, 1, 2, 3], [4, 5, 6, 7]][me]), "each makes its own rows alone"
        assert member.told("addressable") == "False"
        table = [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(8)]
        fetched = {
            "rows": table,
            "odd": table[:3],
            "sum": 277.0,  # 0 + 1 + … + 23, plus one
            "whole": [[2.0 * x for x in row] for row in table],
            "host": [0, 1],
        }
        assert eval(member.told("fetched")) == fetched
    # SIGTERM to one: both stop, after the same step.
    members[0].told("step")
    members[1].told("step")
    members[1].process.send_signal(signal.SIGTERM)
    steps = {member.told("stopped", 30) for member in members}
    assert len(steps) == 1
    assert int(steps.pop()) > 5
    # One dies: the other ends by itself, and says so.
    assert [member.told("going") for member in members] == ["on", "on"]
    began = time.monotonic()
    members[1].process.kill()
    status, printed = members[0].ended(60)
    assert status not in (0, None), printed
    assert time.monotonic() - began < 60
    assert "process 0 of 2 cannot go on without the others" in printed or "another task died" in printed, printed


@pytest.mark.slow
@pytest.mark.parametrize("silent", [0, 1])
def test_a_silent_process_ends_the_others(two, silent):
    """Frozen, not dead: its connections stay open, so that only the missing heartbeats tell."""
    members = two("tests.parallel.member")
    for member in members:
        member.told("step")
    members[0].process.send_signal(signal.SIGTERM)
    for member in members:
        member.told("going", 30)
    began = time.monotonic()
    members[silent].process.send_signal(signal.SIGSTOP)
    status, printed = members[1 - silent].ended(90)
    seconds = time.monotonic() - began
    print(f"ended {seconds:.1f} s after process {silent} fell silent")
    assert status != 0
    assert SILENCE / 2 < seconds < 60
    assert "Terminating process because the JAX distributed service detected fatal errors" in printed, printed


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"coordinator": "localhost:1"}, "--processes (or JAX_NUM_PROCESSES) is missing"),
        ({"coordinator": "localhost:1", "processes": 2}, "--process (or JAX_PROCESS_ID) is missing"),
        ({"coordinator": "localhost", "processes": 2, "process": 0}, "--coordinator=localhost: expected HOST:PORT"),
        ({"coordinator": "localhost:1", "processes": 2, "process": 2}, "--process=2 of --processes=2: expected 0 to 1"),
    ],
)
def test_flags_that_do_not_belong_together(given, why, monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    options = SimpleNamespace(**({"coordinator": None, "processes": None, "process": None} | given))
    with pytest.raises(ValueError, match=why.replace("(", r"\(").replace(")", r"\)")):
        join(options)
