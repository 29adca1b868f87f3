"""Several processes that run one program: real processes, which meet, agree, and end together."""

import signal
import time
from types import SimpleNamespace

import pytest

from rlver_jax.parallel.distributed import SILENCE, initialize
from tests.parallel.processes import processes


@pytest.fixture
def two():
    """Two processes with four devices each, which go through tests/parallel/member.py."""
    with processes(2, 4, "tests.parallel.member") as two:
        yield two


def test_two_processes_from_meeting_to_end(two):
    """One pair for all of it, since starting a process takes seconds."""
    for me, member in enumerate(two):
        assert member.told("devices=") == "4 of 8"
        assert member.told("from_main=") == "{'process': 0, 'text': '知道'}"
        assert member.told("same=") == "nothing"
        assert "the config (b.c): 3 here, 2 on process 0" in two[1].told("other=")
        assert member.told("other=") != "nothing", "the one that is right is refused as well"
        assert member.told("together=") == ("process 1 failed; its own log says why", "disk full on 1")[me]
        assert member.told("main_fails=") == ("disk full on 0", "process 0 failed; its own log says why")[me]
        assert member.told("asked=") == str([[0, 1, 2, 3], [4, 5, 6, 7]][me]), "each makes its own rows alone"
        assert member.told("addressable=") == "False"
        assert member.told("key=") == "(True, 8)"
        table = [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(8)]
        fetched = {
            "rows": table,
            "odd": table[:3],
            "sum": 277.0,  # 0 + 1 + … + 23, plus one
            "whole": [[2.0 * x for x in row] for row in table],
            "host": [0, 1],
        }
        assert eval(member.told("fetched=")) == fetched
    # SIGTERM to one: both stop, after the same step.
    two[0].told("step=")
    two[1].told("step=")
    two[1].process.send_signal(signal.SIGTERM)
    steps = {member.told("stopped=", 30) for member in two}
    assert len(steps) == 1
    assert int(steps.pop()) > 5
    # One dies: the other ends by itself, and says so.
    assert [member.told("going=") for member in two] == ["on", "on"]
    began = time.monotonic()
    two[1].process.kill()
    assert two[0].ended(60) != 0, two[0].printed
    assert time.monotonic() - began < 60
    expected = ("process 0 of 2 cannot continue without the others", "another task died")
    assert any(text in two[0].printed for text in expected), two[0].printed


@pytest.mark.slow
@pytest.mark.parametrize("silent", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_silent_process_ends_the_others(two, silent):
    """Frozen, not dead: its connections stay open, so that only the missing heartbeats tell."""
    for member in two:
        member.told("step=")
    two[0].process.send_signal(signal.SIGTERM)
    for member in two:
        member.told("going=", 30)
    began = time.monotonic()
    two[silent].process.send_signal(signal.SIGSTOP)
    status, seconds = two[1 - silent].ended(90), time.monotonic() - began
    print(f"ended {seconds:.1f} s after process {silent} fell silent")
    assert status != 0
    assert SILENCE / 2 < seconds < 60
    assert "Terminating process because the JAX distributed service detected fatal errors" in two[1 - silent].printed


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        ({"coordinator": "localhost:1"}, "--processes (or JAX_NUM_PROCESSES) is missing"),
        ({"coordinator": "localhost:1", "processes": 2}, "--process (or JAX_PROCESS_ID) is missing"),
        ({"coordinator": "localhost", "processes": 2, "process": 0}, "--coordinator=localhost: expected HOST:PORT"),
        ({"coordinator": "localhost:1", "processes": 2, "process": 2}, "--process=2 of --processes=2: expected 0 to 1"),
    ],
)
def test_flags_that_do_not_belong_together(overrides, why, monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    options = SimpleNamespace(**({"coordinator": None, "processes": None, "process": None} | overrides))
    with pytest.raises(ValueError, match=why.replace("(", r"\(").replace(")", r"\)")):
        initialize(options, finish_steps=True)
