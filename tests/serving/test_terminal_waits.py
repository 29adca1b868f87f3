"""What a person sees while a model is waited for, and what the terminal does with what is typed meanwhile."""

import io
import os
import pty
import signal
import termios

import pytest
from rich.console import Console

from rlver_jax.parallel.distributed import stop_signal
from rlver_jax.serving.terminal import Terminal, _without_echo


@pytest.fixture
def typed(monkeypatch):
    """A terminal as standard input; its descriptor."""
    try:
        master, slave = pty.openpty()
    except OSError as error:
        pytest.skip(f"no pseudo-terminal here: {error}")
    with os.fdopen(slave) as stream:
        monkeypatch.setattr("sys.stdin", stream)
        yield slave
    os.close(master)


def echoes(descriptor):
    return bool(termios.tcgetattr(descriptor)[3] & termios.ECHO)


def test_nothing_is_echoed_while_a_model_works(typed):
    assert echoes(typed)
    inside = []

    def wait():
        with _without_echo():
            inside.append(echoes(typed))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        wait()
    assert inside == [False]
    assert echoes(typed), "whatever ends the wait"


def test_a_pipe_has_no_echo_to_turn_off(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
    with _without_echo():
        pass


def test_only_the_first_wait_is_called_compiling(tmp_path):
    shown = []
    console = Console(file=io.StringIO(), force_terminal=True)
    console.status = lambda text: shown.append(text) or open(os.devnull)  # noqa: SIM115  # any context manager
    terminal = Terminal(None, None, "user", tmp_path / "out", console)
    for what in ("the policy thinks", "the policy thinks", "the user thinks"):
        with terminal._waiting(what):
            pass
    assert shown == [
        "compiling, once, then the policy thinks",
        "the policy thinks",
        "compiling, once, then the user thinks",
    ]


def test_sigterm_is_acknowledged_at_once(capfd):
    with stop_signal(0) as stop:
        assert not stop(1)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert capfd.readouterr().err.count("SIGTERM: finishing the step that is under way, then saving") == 1
        assert stop(1)
