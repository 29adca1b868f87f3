"""`chat` as a person uses it: a process on a terminal of its own, with the debug world."""

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlver_jax.chat import main
from rlver_jax.dialogues.log import read_dialogues
from tests.quick import QUICK

ROOT = Path(__file__).resolve().parents[1]


def environment() -> dict[str, str]:
    return os.environ | {"XLA_FLAGS": QUICK, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100"}


class Screen:
    """A process on a pseudo-terminal."""

    def __init__(self, *args: str):
        try:
            self.master, other = pty.openpty()
        except OSError as error:  # containers without /dev/pts
            pytest.skip(f"no pseudo-terminal here: {error}")
        command = [sys.executable, "-m", "rlver_jax.chat", "--config=configs/debug.py", *args]
        self.process = subprocess.Popen(
            command, stdin=other, stdout=other, stderr=other, cwd=ROOT, env=environment(), start_new_session=True
        )
        os.close(other)
        self.shown = ""

    def until(self, pattern: str, seconds: float = 120) -> str:
        """Reads until a pattern is shown; returns what came before it since the last one."""
        deadline = time.monotonic() + seconds
        while not (match := re.search(pattern, self.shown)):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.shown!r}"
            if select.select([self.master], [], [], 0.2)[0]:
                try:
                    self.shown += os.read(self.master, 65536).decode("utf-8", "replace")
                except OSError:  # the process has ended
                    assert re.search(pattern, self.shown), f"no {pattern!r} in {self.shown!r}"
        before, self.shown = self.shown[: match.start()], self.shown[match.end() :]
        return before

    def type(self, text: str) -> None:
        os.write(self.master, (text + "\n").encode())


@pytest.mark.slow
def test_a_person_talks_as_the_user_on_a_terminal(tmp_path):
    out = tmp_path / "talk.jsonl"
    screen = Screen("--seed=1", f"--out={out}")
    assert "hidden intention" in screen.until("user> ")
    screen.type("I had a bad week, 你好")
    shown = screen.until("user> ")
    for words in ("policy", "change", "your emotion"):
        assert words in shown
    saved = read_dialogues(out)[0]
    assert f"{saved['emotion']:3d}" in shown
    assert [m["role"] for m in saved["messages"]] == ["user", "assistant", "user"]
    screen.type("/help")
    assert "/quit" in screen.until("user> ")
    screen.type("word " * 400)
    assert "say something of 1 to" in screen.until("user> ")
    screen.type("and then nobody asked")
    screen.until("user> ")
    screen.type("/quit")
    screen.until(re.escape(out.name))
    assert screen.process.wait(20) == 0
    record = read_dialogues(out)[0]
    assert [m["content"] for m in record["messages"][::2]] == ["I had a bad week, 你好", "and then nobody asked", None]
    assert len(record["emotions"]) == 3
    assert all(0 <= e <= 100 and abs(e - b) <= 10 for b, e in zip(record["emotions"], record["emotions"][1:]))  # noqa: B905


@pytest.mark.slow
def test_a_person_answers_the_simulated_user_through_a_pipe(tmp_path):
    out = tmp_path / "talk.jsonl"
    command = [sys.executable, "-m", "rlver_jax.chat", "--config=configs/debug.py", "--side=policy", f"--out={out}"]
    typed = "That sounds hard.\nWhat happened then?\nnever read\n"
    done = subprocess.run(
        command, input=typed, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    record = read_dialogues(out)[0]
    profile = json.loads((ROOT / "configs/debug_world/profiles.jsonl").read_text().splitlines()[0])
    assert record["messages"][0]["content"] == profile["first_talk"]
    assert [m["content"] for m in record["messages"][1::2]] == typed.splitlines()[:2]
    assert record["end_reason"] == "turn_limit"
    assert "turn_limit" in done.stdout


@pytest.mark.slow
def test_an_interrupted_talk_is_kept(tmp_path):
    out = tmp_path / "talk.jsonl"
    screen = Screen("--side=policy", f"--out={out}")
    screen.until("policy> ")
    screen.type("That sounds hard.")
    screen.until("policy> ")
    # Python's readline looks for signals before it waits for a key: one that comes between the two waits for the key.
    time.sleep(2)
    screen.process.send_signal(2)
    screen.until("interrupted")
    assert screen.process.wait(20) == 130
    assert read_dialogues(out)[0]["turns"] == 1


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ([], "no --config"),
        (["--config=configs/debug.py", "--profile=nobody"], "no such id among"),
        (["--config=configs/debug.py", "--side=judge"], "side"),
        (["--config=configs/debug.py", "--side=policy", "--checkpoint=x"], "no policy is loaded"),
        (["--config=configs/debug.py", "--checkpoint=/no/such"], "/no/such"),
        (["--config=configs/debug.py", "--out=setup.py"], "exists"),
        (["--config=configs/debug.py", "extra"], "extra"),
        (["--config=configs/base.py"], "data.eval"),
    ],
)
def test_bad_usage(args, told, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(args) == 2
    assert told in capsys.readouterr().err
