"""How commands end: the rule in one place, as exit status and as what a real process prints."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rlver_jax.config.validate import ConfigError
from rlver_jax.runs.lock import LockedError, LostLockError
from rlver_jax.text.command import Ending, run_command

ROOT = Path(__file__).resolve().parents[2]
OWN = {LostLockError: Ending(1), KeyboardInterrupt: Ending(130, "interrupted; the same command resumes in {output}")}


def ended(error, capsys, output="", endings=OWN):
    """(exit status, what is printed on standard error) of a command in which that happens."""

    def body(command, argv):
        command.output = output
        raise error

    status = run_command("train", body, [], endings)
    out, err = capsys.readouterr()
    assert out == ""
    return status, err


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (ConfigError("a.b=1: expected 2"), 2, "train: a.b=1: expected 2\n"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no"), 2, "train: 'utf-8' codec can't decode byte 0xff in "),
        (FileNotFoundError(2, "No such file", "x"), 2, "train: [Errno 2] No such file: 'x'\n"),
        (LockedError("in use"), 2, "train: in use\n"),
        (LostLockError("[red]taken {over}[/red]"), 1, "train: [red]taken {over}[/red]\n"),
    ],
)
def test_errors_that_are_no_bugs_are_one_line(error, status, told, capsys):
    exit_status, output = ended(error, capsys)
    assert (exit_status, output.startswith(told)) == (status, True), output


def test_an_interruption_names_what_is_left(capsys):
    interrupted = (130, "train: interrupted; the same command resumes in runs/{a}\n")
    assert ended(KeyboardInterrupt(), capsys, "runs/{a}") == interrupted
    assert ended(KeyboardInterrupt(), capsys) == (130, "train: interrupted\n"), "before there is a folder"
    assert ended(KeyboardInterrupt(), capsys, endings=None) == (130, "train: interrupted\n")


def test_a_bug_keeps_its_traceback_and_help_its_status(capsys):
    for error in (KeyError("x"), TypeError("x"), RuntimeError("x"), SystemExit(0)):
        with pytest.raises(type(error)) as caught:
            ended(error, capsys)
        assert caught.value is error
    assert capsys.readouterr() == ("", "")


def test_the_more_specific_class_counts(capsys):
    endings = {ValueError: Ending(3, "value: {error}"), ConfigError: Ending(4, "config: {error}")}
    assert ended(ConfigError("x"), capsys, endings=endings) == (4, "train: config: x\n")
    assert ended(LockedError("x"), capsys, endings=endings) == (3, "train: value: x\n")


SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's children ignore it
from rlver_jax.text.command import run_command
def body(command, argv):
    command.print(f"[b]{argv}[/b] " + "x" * 200)
    sys.stdout.flush()
    time.sleep(60)
sys.exit(run_command("slow", body, None))
"""


def test_control_c_in_a_real_process():
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", SLOW, "--a=b"], env=environment, **pipes) as process:
        assert process.stdout.readline() == f"[b]['--a=b'][/b] {'x' * 200}\n", "as it is, in one line"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "slow: interrupted\n")


def test_no_command_has_a_rule_of_its_own():
    """Each `main(argv)` ends by `run_command`, or hands on to one that does."""
    for file in (ROOT / "rlver_jax").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        if 'if __name__ == "__main__":' in text and file.name != "__main__.py":
            assert "run_command(" in text, file
            assert not re.search(r"except \(ValueError, OSError\) as error:\n +\w*\.print", text), file
